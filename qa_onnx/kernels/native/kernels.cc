// The kernels for one instruction set, QA_KERNELS: kAmx, kAvx512, kAvx512Vnni, kAvxVnni or kAvx2.
//
// No number depends on what else is computed: a row's sums take the same steps alone and among others.
#include "kernels.h"

#include <cmath>
#include <cstring>

#include "simd.h"
#if defined(__AMX_INT8__)
#include "tiles.h"
#endif

namespace qa {
namespace {

constexpr int kVectors = kPanel / kLanes;  // of float32 or int32, a panel

// -- rows ------------------------------------------------------------------------------------------------------------

// Writes a row's LayerNorm to `y`. The variance is of the differences from the mean, as in PyTorch.
void layer_norm(const float* x, int64_t width, const float* scale, const float* shift, float epsilon, float* y) {
  Floats sum = zeros();
  for (int64_t k = 0; k < width; k += kLanes) sum = add(sum, load(x + k, first_lanes(width - k)));
  const Floats mean = all(sum_of(sum) / float(width));
  Floats squares = zeros();
  for (int64_t k = 0; k < width; k += kLanes) {
    const Mask mask = first_lanes(width - k);
    const Floats difference = keep(sub(load(x + k, mask), mean), mask);
    squares = fma(difference, difference, squares);
  }
  const Floats inverse = all(1.0f / std::sqrt(sum_of(squares) / float(width) + epsilon));
  for (int64_t k = 0; k < width; k += kLanes) {
    const Mask mask = first_lanes(width - k);
    const Floats normal = mul(sub(load(x + k, mask), mean), inverse);
    store(y + k, fma(normal, load(scale + k, mask), load(shift + k, mask)), mask);
  }
}

// Rounds a row to uint8 with a scale and a zero of its own.
void quantize(const float* x, int64_t width, int64_t stride, uint8_t* values, float* row_scale, int32_t* row_zero) {
  Floats low = zeros(), high = zeros(), check = zeros();
  for (int64_t k = 0; k < width; k += kLanes) {
    const Floats part = load(x + k, first_lanes(width - k));
    low = min(low, part);
    high = max(high, part);
    check = fma(part, zeros(), check);  // NaN once a value is not finite
  }
  const float least = min_of(low), most = max_of(high);
  const float range = larger(most - least, 1e-20f);
  if (!(sum_of(check) == 0.0f)) {
    *row_scale = NAN;
    *row_zero = 0;
    std::memset(values, 0, size_t(stride));
    return;
  }
  *row_scale = range / 255.0f;
  *row_zero = int32_t(std::nearbyint(-least * (255.0f / range)));
  const Floats inverse = all(255.0f / range);
  const Ints zero = all_ints(*row_zero);
  for (int64_t k = 0; k < width; k += kLanes) {
    const Mask mask = first_lanes(width - k);
    store_bytes(values + k, add(to_ints(mul(load(x + k, mask), inverse)), zero), mask);
  }
  for (int64_t k = width; k < stride; ++k) values[k] = 0;
}

#if defined(__AVX512BF16__)
void round_to_bfloat16(const float* x, int64_t width, int64_t stride, uint16_t* values) {
  for (int64_t k = 0; k < width; k += kLanes) {
    const Mask mask = first_lanes(width - k);
    const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(load(x + k, mask));
    _mm256_mask_storeu_epi16(values + k, mask, rounded);
  }
  for (int64_t k = width; k < stride; ++k) values[k] = 0;
}
#endif

void prepare_rows(const RowsArgs& a, int64_t first, int64_t last, float* scratch) {
  for (int64_t row = first; row < last; ++row) {
    const float* x = a.x + row * a.width;
    if (a.scale != nullptr) {
      layer_norm(x, a.width, a.scale, a.shift, a.epsilon, scratch);
      x = scratch;
    }
    if (a.type == Type::kInt8) {
      quantize(x, a.width, a.stride, static_cast<uint8_t*>(a.values) + row * a.stride, a.row_scales + row,
               a.row_zeros + row);
    } else {
#if defined(__AVX512BF16__)
      round_to_bfloat16(x, a.width, a.stride, static_cast<uint16_t*>(a.values) + row * a.stride);
#endif
    }
  }
}

// -- matmul ----------------------------------------------------------------------------------------------------------

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
__attribute__((always_inline)) inline void finish(const MatmulArgs& a, typename T::Sum sum, int64_t row, int64_t column) {
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

// -- attention -------------------------------------------------------------------------------------------------------

void write_keys(const AttentionArgs& a, int64_t group, int64_t head, int64_t row, int64_t token, int64_t count,
                int64_t column) {
  const int64_t size = a.head_size, start = ((group * a.heads + head) * a.rows + row) * a.columns * size;
  float *keys = a.keys + start, *values = a.values + start;
  for (int64_t i = 0; i < count; ++i, ++column) {
    const float* key = a.key_value + (token + i) * a.key_stride + a.key_offset + head * size;
    float* target = keys + column / kPanel * kPanel * size + column % kPanel;
    for (int64_t d = 0; d < size; ++d) target[d * kPanel] = key[d];
    for (int64_t d = 0; d < size; d += kLanes) {
      const Mask mask = first_lanes(size - d);
      store(values + column * size + d, load(key + a.heads * size + d, mask), mask);
    }
  }
}

// Scores of ROWS queries [ROWS, D] and `blocks` blocks of 16 keys.
template <int ROWS, int BLOCKS>
void block_scores(const float* queries, int64_t size, const float* keys, float* scores, int64_t stride) {
  constexpr int kWidth = BLOCKS * kVectors;
  Floats sums[ROWS][kWidth];
  repeat<ROWS * kWidth>([&](auto i) __attribute__((always_inline)) { sums[i / kWidth][i % kWidth] = zeros(); });
  for (int64_t d = 0; d < size; ++d) {
    Floats k[kWidth];
    repeat<kWidth>([&](auto v) __attribute__((always_inline)) {
      k[v] = load(keys + v / kVectors * kPanel * size + d * kPanel + v % kVectors * kLanes);
    });
    repeat<ROWS>([&](auto r) __attribute__((always_inline)) {
      const Floats q = all(queries[r * size + d]);
      repeat<kWidth>([&](auto v) __attribute__((always_inline)) { sums[r][v] = fma(q, k[v], sums[r][v]); });
    });
  }
  repeat<ROWS * kWidth>([&](auto i) __attribute__((always_inline)) {
    store(scores + i / kWidth * stride + i % kWidth * kLanes, sums[i / kWidth][i % kWidth]);
  });
}

constexpr int kScoreBlocks = kVectors == 1 ? 4 : 1;

template <int ROWS>
void score_rows(const float* queries, int64_t size, const float* keys, float* scores, int64_t stride, int64_t blocks) {
  int64_t block = 0;
  for (; block + kScoreBlocks <= blocks; block += kScoreBlocks)
    block_scores<ROWS, kScoreBlocks>(queries, size, keys + block * kPanel * size, scores + block * kPanel, stride);
  for (; block < blocks; ++block)
    block_scores<ROWS, 1>(queries, size, keys + block * kPanel * size, scores + block * kPanel, stride);
}

// Adds weights [ROWS, columns] @ values [columns, D] to VECTORS vectors of the contexts, those from `d` on.
template <int ROWS, int VECTORS>
void add_values(const float* weights, int64_t stride, const float* values, int64_t size, int64_t columns, int64_t d,
                float* contexts) {
  const Mask mask = first_lanes(size - d - (VECTORS - 1) * kLanes);
  const int64_t context_stride = size + kPanel;
  Floats sums[ROWS][VECTORS];
  repeat<ROWS * VECTORS>([&](auto i) __attribute__((always_inline)) {
    sums[i / VECTORS][i % VECTORS] = load(contexts + i / VECTORS * context_stride + d + i % VECTORS * kLanes);
  });
  for (int64_t c = 0; c < columns; ++c) {
    Floats value[VECTORS];
    repeat<VECTORS>([&](auto v) __attribute__((always_inline)) {
      value[v] = v + 1 < VECTORS ? load(values + c * size + d + v * kLanes)
                                 : load(values + c * size + d + v * kLanes, mask);
    });
    repeat<ROWS>([&](auto r) __attribute__((always_inline)) {
      const Floats weight = all(weights[r * stride + c]);
      repeat<VECTORS>([&](auto v) __attribute__((always_inline)) { sums[r][v] = fma(weight, value[v], sums[r][v]); });
    });
  }
  repeat<ROWS * VECTORS>([&](auto i) __attribute__((always_inline)) {
    store(contexts + i / VECTORS * context_stride + d + i % VECTORS * kLanes, sums[i / VECTORS][i % VECTORS]);
  });
}

constexpr int kValueVectors = kVectors == 1 ? 4 : 2;

template <int ROWS>
void value_rows(const float* weights, int64_t stride, const float* values, int64_t size, int64_t columns,
                float* contexts) {
  int64_t d = 0;
  for (; d + kValueVectors * kLanes <= size; d += kValueVectors * kLanes)
    add_values<ROWS, kValueVectors>(weights, stride, values, size, columns, d, contexts);
  for (; d < size; d += kLanes) add_values<ROWS, 1>(weights, stride, values, size, columns, d, contexts);
}

void score(int rows, const float* queries, int64_t size, const float* keys, float* scores, int64_t stride,
           int64_t blocks) {
  with_constant<kAttentionTokens>(
      rows, [&](auto count) { score_rows<count>(queries, size, keys, scores, stride, blocks); });
}

void weigh(int rows, const float* weights, int64_t stride, const float* values, int64_t size, int64_t columns,
           float* contexts) {
  with_constant<kAttentionTokens>(
      rows, [&](auto count) { value_rows<count>(weights, stride, values, size, columns, contexts); });
}

// Calls body(c, mask, is_whole) for the vectors that hold columns [first, last): all but the outer ones are whole.
template <class Body>
void each_vector(int64_t first, int64_t last, const Body& body) {
  for (int64_t c = first / kLanes * kLanes; c < last; c += kLanes) {
    const bool is_whole = c >= first && c + kLanes <= last;
    body(c, is_whole ? first_lanes(kLanes) : without(first_lanes(last - c), first_lanes(first - c)), is_whole);
  }
}

// Scores of columns [first, last): their maximum, and e^(score - maximum) in their place, zeros in the other lanes.
Floats top_of(const float* scores, int64_t first, int64_t last, Floats top) {
  each_vector(first, last, [&](int64_t c, Mask mask, bool is_whole) {
    const Floats score = load(scores + c);
    top = max(top, is_whole ? score : pick(all(-INFINITY), score, mask));
  });
  return top;
}
Floats to_weights(float* scores, int64_t first, int64_t last, Floats top, Floats sum) {
  each_vector(first, last, [&](int64_t c, Mask mask, bool is_whole) {
    Floats weight = exp(sub(load(scores + c), top));
    if (!is_whole) weight = keep(weight, mask);
    store(scores + c, weight);
    sum = add(sum, weight);
  });
  return sum;
}

// The softmax of a token, but for the division: returns the sum of its weights. Its columns are those of the prefix, and
// [first, last) of the `width` columns of its own; weights of the columns from `last` on are zeros.
float soften(float* scores, int64_t prefix, float* own, int64_t first, int64_t last, int64_t width) {
  const Floats top = all(max_of(top_of(own, first, last, top_of(scores, 0, prefix, all(-INFINITY)))));
  const Floats sum = to_weights(own, first, last, top, to_weights(scores, 0, prefix, top, zeros()));
  for (int64_t c = (last + kLanes - 1) / kLanes * kLanes; c < width; c += kLanes) store(own + c, zeros());
  return sum_of(sum);
}

// How many tokens are computed together: some of one row, or several that are alone in their rows and share the prefix.
int count_together(const Token* tokens, int64_t count, bool has_prefix) {
  int64_t run = 1;
  while (run < count && tokens[run].row == tokens[0].row) ++run;
  if (run > 1) {
    const int64_t blocks = (run + kAttentionTokens - 1) / kAttentionTokens;
    return int((run + blocks - 1) / blocks);
  }
  if (!has_prefix) return 1;
  int64_t alone = 1;
  while (alone < smaller(count, kAttentionTokens) && tokens[alone].row != tokens[alone - 1].row &&
         (alone + 1 == count || tokens[alone + 1].row != tokens[alone].row))
    ++alone;
  return int(alone);
}

void attend(const AttentionArgs& a, int64_t group, int64_t head, const Token* tokens, int64_t count, float* scratch) {
  const int64_t size = a.head_size, place = group * a.heads + head;
  const int64_t prefix = a.prefix_columns > 0 ? a.prefix_lengths[group] : 0;
  const int64_t prefix_blocks = (prefix + kPanel - 1) / kPanel, prefix_width = prefix_blocks * kPanel;
  const int64_t stride = a.prefix_columns + a.columns + 2 * kPanel, context_stride = size + kPanel;
  const float *prefix_keys = a.prefix_keys + place * a.prefix_columns * size,
              *prefix_values = a.prefix_values + place * a.prefix_columns * size;
  float *scores = scratch, *queries = scores + kAttentionTokens * stride,
        *contexts = queries + kAttentionTokens * context_stride;
  for (int64_t begin = 0; begin < count;) {
    const Token* some = tokens + begin;
    const int rows = count_together(some, count - begin, prefix > 0);
    const bool is_one_row = some[rows - 1].row == some[0].row;
    for (int i = 0; i < rows; ++i) {
      const float* query = a.query + some[i].query * a.query_stride + head * size;
      for (int64_t d = 0; d < size; d += kLanes) {
        const Mask mask = first_lanes(size - d);
        store(queries + i * size + d, mul(load(query + d, mask), all(a.scale)), mask);
      }
    }
    if (prefix_blocks > 0) score(rows, queries, size, prefix_keys, scores, stride, prefix_blocks);
    // The columns of each token's own row: whole blocks, from the first that it attends to.
    int64_t from[kAttentionTokens], width[kAttentionTokens];
    for (int i = 0; i < rows; ++i) {
      const Token& one = some[is_one_row ? 0 : i];
      const int64_t last = is_one_row ? some[rows - 1].last : some[i].last;
      from[i] = one.first / kPanel * kPanel;
      width[i] = (last - from[i] + kPanel - 1) / kPanel * kPanel;
    }
    for (int i = 0; i < rows; i += is_one_row ? rows : 1) {
      const int64_t start = ((place * a.rows + some[i].row) * a.columns + from[i]) * size;
      score(is_one_row ? rows : 1, queries + i * size, size, a.keys + start, scores + i * stride + prefix_width, stride,
            width[i] / kPanel);
    }
    float inverse[kAttentionTokens];
    for (int i = 0; i < rows; ++i) {
      float* row = scores + i * stride;
      inverse[i] = 1.0f / soften(row, prefix, row + prefix_width, some[i].first - from[i], some[i].last - from[i],
                                 width[i]);
    }
    for (int64_t d = 0; d < rows * context_stride; d += kLanes) store(contexts + d, zeros());
    if (prefix > 0) weigh(rows, scores, stride, prefix_values, size, prefix, contexts);
    for (int i = 0; i < rows; i += is_one_row ? rows : 1) {
      // From the first column on: what is before it in its block may hold anything, NaN too.
      const int64_t first = some[i].first, last = is_one_row ? some[rows - 1].last : some[i].last;
      const int64_t start = ((place * a.rows + some[i].row) * a.columns + first) * size;
      weigh(is_one_row ? rows : 1, scores + i * stride + prefix_width + first - from[i], stride, a.values + start, size,
            last - first, contexts + i * context_stride);
    }
    for (int i = 0; i < rows; ++i) {
      float* context = a.context + some[i].query * a.heads * size + head * size;
      for (int64_t d = 0; d < size; d += kLanes)
        store(context + d, mul(load(contexts + i * context_stride + d), all(inverse[i])), first_lanes(size - d));
    }
    begin += rows;
  }
}

}  // namespace

#if defined(__AVX512BF16__)
constexpr bool kHasBFloat16 = true;
#else
constexpr bool kHasBFloat16 = false;
#endif

extern const Kernels QA_KERNELS = {QA_NAME, kHasBFloat16, prepare_rows, matmul, write_keys, attend, unpack_column};

}  // namespace qa
