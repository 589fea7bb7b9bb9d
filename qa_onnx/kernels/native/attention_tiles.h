// Attention on AMX: queries, keys, values and weights are rounded to bfloat16, sums and the softmax are float32.
//
// The caches stay float32. What a task reads of them is rounded once, to the layout of a tile, for all of its tokens.
// Tiles have 16 tokens; where there are fewer, the tile's other tokens are computed, and what comes of it is overwritten
// or left. A token's sums take the same steps whoever is in its tile.
#pragma once

#include <cstring>

#include "attention.h"
#include "kernels.h"
#include "simd.h"
#include "tiles.h"

namespace qa {
namespace {

constexpr int64_t kPairs = 2 * kTileSide;  // bfloat16 of a tile's row

inline int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

// Two rows of 16 float32 to one of 16 pairs of bfloat16.
inline void round_pairs(Floats even, Floats odd, uint16_t* pairs) {
  alignas(64) static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
  _mm512_storeu_si512(pairs, _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), both));
}

inline void round_one(Floats x, uint16_t* values) {
  _mm256_storeu_si256((__m256i*)values, (__m256i)_mm512_cvtneps_pbh(x));
}

// Where the parts of a task's memory are: `size` is D, of which tiles take whole rows.
struct TileMemory {
  int64_t depth, width, stride;  // D in products of queries and keys, D of values, columns of a token's scores
  float *scores, *contexts, *own;
  uint16_t *queries, *keys, *values;

  TileMemory(float* memory, int64_t prefix_columns, int64_t columns, int64_t size)
      : depth(round_up(size, kPairs)),
        width(round_up(size, kTileSide)),
        stride(round_up(prefix_columns, kPairs) + round_up(columns, kPairs) + kPairs) {
    const int64_t tokens = kTileTokens + kTileSide;
    scores = memory;
    contexts = scores + tokens * stride;
    own = contexts + tokens * width;
    queries = reinterpret_cast<uint16_t*>(own + kTileSide * width);
    keys = queries + tokens * depth;
    values = keys + stride * depth;
  }
};

// `blocks` blocks of 16 columns of keys: [D, 16] -> [depth / 2, 16, 2].
void round_keys(const float* keys, int64_t size, int64_t blocks, int64_t depth, uint16_t* rounded) {
  for (int64_t block = 0; block < blocks; ++block, keys += size * kPanel, rounded += depth * kPanel) {
    for (int64_t d = 0; d < size; d += 2)
      round_pairs(load(keys + d * kPanel), load(keys + (d + 1) * kPanel), rounded + d * kPanel);
    std::memset(rounded + size * kPanel, 0, size_t(2 * (depth - size) * kPanel));
  }
}

// Columns [0, round_up(last, 32)) of values [C, D] -> [columns / 32, width / 16, 16, 16, 2]; zeros but for [first, last),
// for what is there may be anything, NaN too.
void round_values(const float* values, int64_t size, int64_t first, int64_t last, int64_t width, uint16_t* rounded) {
  for (int64_t c = 0; c < last; c += 2) {
    const bool has_even = c >= first, has_odd = c + 1 >= first && c + 1 < last;
    uint16_t* pairs = rounded + c / kPairs * kPairs * width + c % kPairs * kTileSide;
    for (int64_t d = 0; d < width; d += kTileSide, pairs += kPairs * kTileSide) {
      const Mask mask = first_lanes(size - d);
      round_pairs(load(values + c * size + d, has_even ? mask : Mask(0)),
                  load(values + (c + 1) * size + d, has_odd ? mask : Mask(0)), pairs);
    }
  }
  for (int64_t c = round_up(last, 2); c < round_up(last, kPairs); c += 2)
    for (int64_t d = 0; d < width; d += kTileSide)
      std::memset(rounded + c / kPairs * kPairs * width + d * kPairs + c % kPairs * kTileSide, 0, kTileRowBytes);
}

// Scores of 16 queries and `blocks` blocks of keys; a query is STEPS tiles deep.
template <int STEPS>
void score_tiles(const uint16_t* queries, const uint16_t* keys, int64_t blocks, float* scores, int64_t stride) {
  constexpr int64_t kDepth = STEPS * kPairs;
  repeat<STEPS>([&](auto k) __attribute__((always_inline)) {
    load_tile<2 + k>(queries + k * kPairs, 2 * kDepth);
  });
  const auto add_block = [&](auto sum, int64_t block) __attribute__((always_inline)) {
    zero_tile<sum>();
    repeat<STEPS>([&](auto k) __attribute__((always_inline)) {
      load_tile<6 + sum>(keys + block * kDepth * kPanel + k * kPairs * kPanel, kTileRowBytes);
      dot_bfloat16_tiles<sum, 2 + k, 6 + sum>();
    });
    store_tile<sum>(scores + block * kPanel, 4 * stride);
  };
  int64_t block = 0;
  for (; block + 1 < blocks; block += 2) {
    add_block(Constant<0>(), block);
    add_block(Constant<1>(), block + 1);
  }
  if (block < blocks) add_block(Constant<0>(), block);
}

void score_tiles(const TileMemory& m, int64_t token, int64_t blocks, float* scores) {
  with_constant<4>(int(m.depth / kPairs), [&](auto steps) {
    score_tiles<steps>(m.queries + token * m.depth, m.keys, blocks, scores, m.stride);
  });
}

// Weights of 16 tokens, of which each row of scores has `columns` from `weights` on, times values [columns, 16 TILES].
template <int TILES>
void weigh_tiles(const uint16_t* weights, int64_t stride, const uint16_t* values, int64_t columns, int64_t width,
                 float* contexts) {
  repeat<TILES>([](auto t) __attribute__((always_inline)) { zero_tile<t>(); });
  for (int64_t c = 0; c < columns; c += kPairs) {
    load_tile<4>(weights + c, 4 * stride);
    repeat<TILES>([&](auto t) __attribute__((always_inline)) {
      load_tile<5 + t % 3>(values + c * width + t * kPairs * kTileSide, kTileRowBytes);
      dot_bfloat16_tiles<t, 4, 5 + t % 3>();
    });
  }
  repeat<TILES>([&](auto t) __attribute__((always_inline)) { store_tile<t>(contexts + t * kTileSide, 4 * width); });
}

void weigh_tiles(const TileMemory& m, int64_t token, int64_t column, int64_t columns, float* contexts) {
  const uint16_t* weights = reinterpret_cast<const uint16_t*>(m.scores + token * m.stride) + column;
  for (int64_t d = 0; d < m.width; d += 4 * kTileSide) {
    with_constant<4>(int(smaller((m.width - d) / kTileSide, int64_t(4))), [&](auto tiles) {
      weigh_tiles<tiles>(weights, m.stride, m.values + d * kPairs, columns, m.width, contexts + d);
    });
  }
}

// Rounds a row's first `count` weights in place: bfloat16 at the row's start, `count` is a multiple of 16.
void round_weights(float* row, int64_t count) {
  for (int64_t c = 0; c < count; c += kLanes) round_one(load(row + c), reinterpret_cast<uint16_t*>(row) + c);
}

// Tokens of one row of a group that follow each other: their columns, and those of them that are computed.
struct Run {
  int64_t begin, count, from, width;  // the first token and their number; the first column, a panel's, and columns
  const float *keys, *values;         // from `from` on
};

Run find_run(const AttentionArgs& a, int64_t place, const Token* tokens, int64_t begin, int64_t count) {
  int64_t end = begin + 1;
  while (end < count && tokens[end].row == tokens[begin].row) ++end;
  const int64_t from = tokens[begin].first / kPanel * kPanel;
  const int64_t start = ((place * a.rows + tokens[begin].row) * a.columns + from) * a.head_size;
  return {begin, end - begin, from, tokens[end - 1].last - from, a.keys + start, a.values + start};
}

// As attend(), for at most kTileTokens tokens.
void attend_on_tiles(const AttentionArgs& a, int64_t group, int64_t head, const Token* tokens, int64_t count,
                     float* scratch) {
  const int64_t size = a.head_size, place = group * a.heads + head;
  const int64_t prefix = a.prefix_columns > 0 ? a.prefix_lengths[group] : 0, own_column = round_up(prefix, kPairs);
  const float *prefix_keys = a.prefix_keys + place * a.prefix_columns * size,
              *prefix_values = a.prefix_values + place * a.prefix_columns * size;
  const TileMemory m(scratch, a.prefix_columns, a.columns, size);
  configure_tiles(0, kTileSide);
  for (int64_t i = 0; i < count; ++i) {
    const float* query = a.query + tokens[i].query * a.query_stride + head * size;
    for (int64_t d = 0; d < m.depth; d += kLanes) {
      const Mask mask = first_lanes(size - d);
      round_one(mul(load(query + d, mask), all(a.scale)), m.queries + i * m.depth + d);
    }
  }
  if (prefix > 0) {
    const int64_t blocks = (prefix + kPanel - 1) / kPanel;
    round_keys(prefix_keys, size, blocks, m.depth, m.keys);
    for (int64_t i = 0; i < count; i += kTileSide) score_tiles(m, i, blocks, m.scores + i * m.stride);
  }
  // In order: what a tile has beyond its run is overwritten by the next.
  for (int64_t begin = 0; begin < count;) {
    const Run run = find_run(a, place, tokens, begin, count);
    const int64_t blocks = (run.width + kPanel - 1) / kPanel;
    round_keys(run.keys, size, blocks, m.depth, m.keys);
    for (int64_t i = begin; i < begin + run.count; i += kTileSide)
      score_tiles(m, i, blocks, m.scores + i * m.stride + own_column);
    begin += run.count;
  }
  float inverse[kTileTokens];
  for (int64_t begin = 0; begin < count;) {
    const Run run = find_run(a, place, tokens, begin, count);
    const int64_t width = round_up(run.width, kPairs);
    for (int64_t i = begin; i < begin + run.count; ++i) {
      float* row = m.scores + i * m.stride;
      inverse[i] = 1.0f / soften(row, prefix, row + own_column, tokens[i].first - run.from, tokens[i].last - run.from,
                                 width);
      for (int64_t c = round_up(prefix, kLanes); c < own_column; c += kLanes) store(row + c, zeros());
      round_weights(row, own_column + width);
    }
    begin += run.count;
  }
  if (prefix > 0) {
    round_values(prefix_values, size, 0, prefix, m.width, m.values);
    for (int64_t i = 0; i < count; i += kTileSide) weigh_tiles(m, i, 0, own_column, m.contexts + i * m.width);
  } else {
    std::memset(m.contexts, 0, size_t(4 * count * m.width));
  }
  for (int64_t begin = 0; begin < count;) {
    const Run run = find_run(a, place, tokens, begin, count);
    round_values(run.values, size, tokens[begin].first - run.from, run.width, m.width, m.values);
    for (int64_t i = begin; i < begin + run.count; i += kTileSide) {
      weigh_tiles(m, i, own_column, round_up(run.width, kPairs), m.own);
      for (int64_t j = i; j < smaller(i + kTileSide, begin + run.count); ++j) {
        float* context = a.context + tokens[j].query * a.heads * size + head * size;
        for (int64_t d = 0; d < size; d += kLanes) {
          const Floats sum = add(load(m.contexts + j * m.width + d), load(m.own + (j - i) * m.width + d));
          store(context + d, mul(sum, all(inverse[j])), first_lanes(size - d));
        }
      }
    }
    begin += run.count;
  }
  release_tiles();
}

}  // namespace
}  // namespace qa
