// Matmuls of rounded rows and packed weights, and columns of those weights.
#pragma once

#include <cstring>

#include "kernels.h"
#include "simd.h"
#if defined(__AMX_INT8__)
#include "tiles.h"
#endif

namespace qa {
namespace {

// A type of matmul: how a group of a row is multiplied by the groups of a panel, and added up.
//
// Sums are vectors of int32 to GCC, too: it keeps arrays of __m512i, which are int64 to it, in memory.
typedef int32_t Words __attribute__((vector_size(4 * kLanes)));

// A group of a row: four values of a byte, or two of two.
inline int32_t word_at(const uint8_t* p) {
  int32_t word;
  std::memcpy(&word, p, 4);
  return word;
}

// kParts vectors hold the sums of a row and a panel. Where they are more than kVectors, join() makes one of each two.
struct Int8 {
  static constexpr int kGroup = 4;
  using Sum = Words;
  static Words zero() { return Words{}; }
#if defined(__AVX512VNNI__)
  static constexpr int kParts = 1, kRows = 6, kPanels = 4;
  static Ints broadcast(const uint8_t* p) { return _mm512_set1_epi32(word_at(p)); }
  static Ints load_part(const uint8_t* p, int) { return _mm512_loadu_si512(p); }
  static Words dot(Words sum, Ints a, Ints b) { return (Words)_mm512_dpbusd_epi32((Ints)sum, a, b); }
#if defined(__AMX_INT8__)
  template <int SUMS, int A, int B>
  static void dot_tiles() {
    dot_int8_tiles<SUMS, A, B>();
  }
#endif
#elif defined(__AVXVNNI__)
  static constexpr int kParts = 2, kRows = 6, kPanels = 1;
  static Ints broadcast(const uint8_t* p) { return _mm256_set1_epi32(word_at(p)); }
  static Ints load_part(const uint8_t* p, int part) { return _mm256_loadu_si256((const __m256i*)(p + 32 * part)); }
  static Words dot(Words sum, Ints a, Ints b) { return (Words)_mm256_dpbusd_avx_epi32((Ints)sum, a, b); }
#else
  // Products of bytes are added up in pairs of 16 bits by vpmaddubsw, which saturates; as 16 bits they are exact.
  static constexpr int kParts = 4, kRows = 3, kPanels = 1;
  static Ints broadcast(const uint8_t* p) { return _mm256_cvtepu8_epi16(_mm_set1_epi32(word_at(p))); }
  static Ints load_part(const uint8_t* p, int part) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(p + 16 * part)));
  }
  static Words dot(Words sum, Ints a, Ints b) { return sum + (Words)_mm256_madd_epi16(a, b); }
  static Words join(Words left, Words right) {
    return (Words)_mm256_permute4x64_epi64(_mm256_hadd_epi32((Ints)left, (Ints)right), 0xd8);
  }
#endif
  // x @ weight, of the sums of a row and a panel's vector: columns from `column` on, `mask` of them.
  static Floats value(const MatmulArgs& a, Words sum, int64_t row, int64_t column, Mask mask) {
    const Ints moved = sub((Ints)sum, mul(all_ints(a.row_zeros[row]), load_ints(a.column_sums + column, mask)));
    return mul(to_floats(moved), mul(all(a.row_scales[row]), load(a.column_scales + column, mask)));
  }
};

#if defined(__AVX512BF16__)
struct BFloat16 {
  static constexpr int kGroup = 2, kParts = 1, kRows = 6, kPanels = 4;
  using Sum = Floats;
  static Floats zero() { return zeros(); }
  static Ints broadcast(const uint8_t* p) { return _mm512_set1_epi32(word_at(p)); }
  static Ints load_part(const uint8_t* p, int) { return _mm512_loadu_si512(p); }
  static Floats dot(Floats sum, Ints a, Ints b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
  static Floats value(const MatmulArgs&, Floats sum, int64_t, int64_t, Mask) { return sum; }
#if defined(__AMX_BF16__)
  template <int SUMS, int A, int B>
  static void dot_tiles() {
    dot_bfloat16_tiles<SUMS, A, B>();
  }
#endif
};
#endif

inline Floats activate(Floats x, Activation activation) {
  switch (activation) {
    case Activation::kGeluTanh: return gelu_tanh(x);
    case Activation::kGelu: return gelu_erf(x);
    case Activation::kRelu: return max(x, zeros());
    case Activation::kNone: break;
  }
  return x;
}

// Stores what a row's sums and a panel's vector make: columns from `column` on.
template <class T>
__attribute__((always_inline)) inline void finish(const MatmulArgs& a, typename T::Sum sum, int64_t row,
                                                  int64_t column) {
  const Mask mask = first_lanes(a.columns - column);
  Floats y = T::value(a, sum, row, column, mask);
  if (a.bias != nullptr) y = add(y, load(a.bias + column, mask));
  y = activate(y, a.activation);
  if (a.residual != nullptr) y = add(y, load(a.residual + row * a.columns + column, mask));
  store(a.y + row * a.columns + column, y, mask);
}

#if defined(__AMX_INT8__)

// kTiles accumulators. Of many rows, two tiles of rows meet two panels, and each is loaded half as often.
constexpr int kTiles = 4;

// 16 or 32 rows by PANELS panels, of which `rows` are stored. `tails` has the panels' last groups, padded to a tile.
template <class T, int ROW_TILES, int PANELS>
void micro(const MatmulArgs& a, int64_t row, int64_t rows, int64_t column, const uint8_t* tails) {
  const int64_t groups = a.padded / T::kGroup, panel_bytes = 64 * groups, row_bytes = a.stride * 4 / T::kGroup;
  const uint8_t* x = static_cast<const uint8_t*>(a.x) + row * row_bytes;
  const uint8_t* weight = static_cast<const uint8_t*>(a.weight) + column / kPanel * panel_bytes;
  constexpr int kFirstPanel = kTiles + ROW_TILES, kPanelTiles = 8 - kFirstPanel;
  repeat<ROW_TILES * PANELS>([](auto i) __attribute__((always_inline)) { zero_tile<i>(); });
  const auto add_step = [&](int64_t step, const uint8_t* panels, int64_t stride) __attribute__((always_inline)) {
    repeat<ROW_TILES>([&](auto r) __attribute__((always_inline)) {
      load_tile<kTiles + r>(x + r * kTileSide * row_bytes + step * kTileRowBytes, row_bytes);
    });
    repeat<PANELS>([&](auto p) __attribute__((always_inline)) {
      constexpr int panel = kFirstPanel + p % kPanelTiles;
      load_tile<panel>(panels + p * stride, kTileRowBytes);
      repeat<ROW_TILES>([&](auto r) __attribute__((always_inline)) {
        T::template dot_tiles<r * PANELS + p, kTiles + r, panel>();
      });
    });
  };
  const int64_t steps = groups / kTileSide;
  for (int64_t step = 0; step < steps; ++step) add_step(step, weight + step * kTileBytes, panel_bytes);
  if (groups % kTileSide != 0) add_step(steps, tails, kTileBytes);
  repeat<ROW_TILES * PANELS>([&](auto i) __attribute__((always_inline)) {
    constexpr int r = i / PANELS, p = i % PANELS;
    alignas(64) typename T::Sum sums[kTileSide];
    store_tile<i>(sums, kTileRowBytes);
    for (int64_t j = 0; j < smaller(rows - r * kTileSide, kTileSide); ++j)
      finish<T>(a, sums[j], row + r * kTileSide + j, column + p * kPanel);
  });
}

template <class T, int PANELS>
void rows_by_panels(const MatmulArgs& a, int64_t first_row, int64_t last_row, int64_t column) {
  const int64_t groups = a.padded / T::kGroup, whole = groups / kTileSide * kTileBytes, panel_bytes = 64 * groups;
  alignas(64) uint8_t tails[PANELS * kTileBytes] = {};
  for (int p = 0; p < PANELS && whole < panel_bytes; ++p)
    std::memcpy(tails + p * kTileBytes,
                static_cast<const uint8_t*>(a.weight) + (column / kPanel + p) * panel_bytes + whole,
                size_t(panel_bytes - whole));
  int64_t row = first_row;
  if constexpr (2 * PANELS <= kTiles) {
    for (; row + kTileSide < last_row; row += 2 * kTileSide) micro<T, 2, PANELS>(a, row, last_row - row, column, tails);
  }
  for (; row < last_row; row += kTileSide) micro<T, 1, PANELS>(a, row, last_row - row, column, tails);
}

template <class T>
void tile(const MatmulArgs& a, int64_t first_row, int64_t last_row, int64_t first_column, int64_t last_column) {
  const int64_t rows = last_row - first_row, most = rows > kTileSide ? 2 : kTiles;
  configure_tiles(kTiles + 1, smaller(rows, kTileSide));  // a tile of rows and its sums; of many rows all have 16
  for (int64_t column = first_column; column < last_column;) {
    const int panels = int(smaller((last_column - column + kPanel - 1) / kPanel, most));
    with_constant<kTiles>(panels, [&](auto count) { rows_by_panels<T, count>(a, first_row, last_row, column); });
    column += panels * kPanel;
  }
  release_tiles();
}

#else

// ROWS rows by PANELS panels; a row's groups, and a panel's, are 4 and 64 bytes in every type.
template <class T, int ROWS, int PANELS>
void micro(const MatmulArgs& a, int64_t row, int64_t column) {
  const int64_t groups = a.padded / T::kGroup, panel_bytes = 64 * groups, row_bytes = a.stride * 4 / T::kGroup;
  const uint8_t* x = static_cast<const uint8_t*>(a.x) + row * row_bytes;
  const uint8_t* weight = static_cast<const uint8_t*>(a.weight) + column / kPanel * panel_bytes;
  constexpr int kParts = PANELS * T::kParts;
  typename T::Sum sums[ROWS][kParts];
  repeat<ROWS * kParts>([&](auto i) __attribute__((always_inline)) { sums[i / kParts][i % kParts] = T::zero(); });
  for (int64_t g = 0; g < groups; ++g) {
    // What there are fewer of stays in registers, and of the others there is one at a time.
    if constexpr (kParts <= ROWS) {
      Ints b[kParts];
      repeat<kParts>([&](auto p) __attribute__((always_inline)) {
        b[p] = T::load_part(weight + p / T::kParts * panel_bytes + g * 64, p % T::kParts);
      });
      repeat<ROWS>([&](auto r) __attribute__((always_inline)) {
        const Ints word = T::broadcast(x + r * row_bytes + g * 4);
        repeat<kParts>([&](auto p) __attribute__((always_inline)) { sums[r][p] = T::dot(sums[r][p], word, b[p]); });
      });
    } else {
      Ints words[ROWS];
      repeat<ROWS>([&](auto r) __attribute__((always_inline)) { words[r] = T::broadcast(x + r * row_bytes + g * 4); });
      repeat<kParts>([&](auto p) __attribute__((always_inline)) {
        const Ints b = T::load_part(weight + p / T::kParts * panel_bytes + g * 64, p % T::kParts);
        repeat<ROWS>([&](auto r) __attribute__((always_inline)) { sums[r][p] = T::dot(sums[r][p], words[r], b); });
      });
    }
  }
  repeat<ROWS * PANELS>([&](auto i) __attribute__((always_inline)) {
    constexpr int r = i / PANELS, p = i % PANELS;
    repeat<kVectors>([&](auto v) __attribute__((always_inline)) {
      typename T::Sum sum;
      if constexpr (T::kParts == kVectors) {
        sum = sums[r][p * kVectors + v];
      } else {
        sum = T::join(sums[r][p * T::kParts + 2 * v], sums[r][p * T::kParts + 2 * v + 1]);
      }
      finish<T>(a, sum, row + r, column + p * kPanel + v * kLanes);
    });
  });
}

template <class T, int PANELS>
void rows_by_panels(const MatmulArgs& a, int64_t first_row, int64_t last_row, int64_t column) {
  for (int64_t row = first_row; row < last_row;) {
    const int64_t left = last_row - row;
    const int64_t count = (left + (left + T::kRows - 1) / T::kRows - 1) / ((left + T::kRows - 1) / T::kRows);
    with_constant<T::kRows>(int(count), [&](auto rows) { micro<T, rows, PANELS>(a, row, column); });
    row += count;
  }
}

template <class T>
void tile(const MatmulArgs& a, int64_t first_row, int64_t last_row, int64_t first_column, int64_t last_column) {
  for (int64_t column = first_column; column < last_column;) {
    if (column + (T::kPanels - 1) * kPanel < last_column) {
      rows_by_panels<T, T::kPanels>(a, first_row, last_row, column);
      column += T::kPanels * kPanel;
    } else {
      rows_by_panels<T, 1>(a, first_row, last_row, column);
      column += kPanel;
    }
  }
}

#endif

void matmul(const MatmulArgs& a, int64_t first_row, int64_t last_row, int64_t first_column, int64_t last_column) {
  if (a.type == Type::kInt8) {
    tile<Int8>(a, first_row, last_row, first_column, last_column);
  } else {
#if defined(__AVX512BF16__)
    tile<BFloat16>(a, first_row, last_row, first_column, last_column);
#endif
  }
}

void unpack_column(Type type, const void* weight, const float* column_scales, int64_t column, int64_t width, float* y) {
  const int64_t group = group_size(type), groups = (width + group - 1) / group;
  const int64_t start = (column / kPanel * groups * kPanel + column % kPanel) * group;
  for (int64_t k = 0; k < width; ++k) {
    const int64_t place = start + k / group * kPanel * group + k % group;
    if (type == Type::kInt8) {
      y[k] = float(static_cast<const int8_t*>(weight)[place]) * column_scales[column];
    } else {
      const uint32_t bits = uint32_t(static_cast<const uint16_t*>(weight)[place]) << 16;
      std::memcpy(y + k, &bits, 4);
    }
  }
}

}  // namespace
}  // namespace qa
