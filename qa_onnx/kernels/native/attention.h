// Attention in float32: keys and values into the caches, and the contexts of some tokens.
#pragma once

#include <cmath>

#include "kernels.h"
#include "simd.h"

namespace qa {
namespace {

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
}  // namespace qa
