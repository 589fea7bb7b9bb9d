// What the operators compute, for one instruction set: `kernels.cc` is compiled once for each.
#pragma once

#include <cstddef>
#include <cstdint>

namespace qa {

constexpr int64_t kPanel = 16;
// Columns of a packed weight, and of keys, that lie together; `qa_onnx.engine.kv_cache.ALIGNMENT` is the same.

enum class Type { kInt8, kBFloat16 };
enum class Activation : int64_t { kNone = 0, kGeluTanh = 1, kGelu = 2, kRelu = 3 };

constexpr int64_t kCacheLine = 64;  // bytes
constexpr int64_t group_size(Type type) { return type == Type::kInt8 ? 4 : 2; }
constexpr int64_t element_size(Type type) { return type == Type::kInt8 ? 1 : 2; }

// Rows of activations on their way into a matmul: float32 [rows, width] -> the matmul's type [rows, stride].
struct RowsArgs {
  Type type;
  const float* x;       // [rows, width]
  int64_t width;        // K
  int64_t stride;       // K, rounded up to whole cache lines; zeros behind K
  const float* scale;   // of a LayerNorm that comes first, [K], or null
  const float* shift;   // [K]
  float epsilon;
  void* values;         // uint8 or bfloat16 [rows, stride]
  float* row_scales;    // int8: x is about row_scale * (value - row_zero); NaN where x is not finite
  int32_t* row_zeros;
};

// y = activation(x @ weight + bias) + residual
struct MatmulArgs {
  Type type;
  const void* x;              // from RowsArgs, [M, stride]; memory goes on to a whole block of 16 rows
  const float* row_scales;    // int8: [M]
  const int32_t* row_zeros;   // int8: [M]
  const void* weight;         // packed [columns / 16, K / group, 16, group], zeros where padded
  const float* column_scales; // int8: [N]
  const int32_t* column_sums; // int8: [N], of the weight's values
  const float* bias;          // [N] or null
  const float* residual;      // [M, N] or null
  float* y;                   // [M, N]
  int64_t stride;             // of x
  int64_t padded;             // K, rounded up to a whole group
  int64_t columns;            // N
  Activation activation;
};

// A token whose context is computed: its query, its row in the group, and the columns of its own that it attends to.
struct Token {
  int64_t query, row, first, last;
};

// Attention of one layer. Keys of 16 columns lie together, transposed: [columns / 16, D, 16].
struct AttentionArgs {
  const float* query;      // [M, query_stride], the heads' queries from its start
  const float* key_value;  // [N, key_stride]: keys from key_offset, values behind them
  int64_t query_stride, key_stride, key_offset;
  float scale;
  int64_t heads, head_size;
  int64_t rows, prefix_columns, columns;  // R, P and C
  const float *prefix_keys, *prefix_values;  // [G, H, 1, P, D]
  float *keys, *values;                      // [G, H, R, C, D]
  const int64_t* prefix_lengths;             // [G]
  float* context;                            // [M, H * D]
};

struct Kernels {
  const char* name;
  bool has_bfloat16;
  // Prepares rows `first` to `last` (not included). `scratch` has room for a row, [K].
  void (*prepare_rows)(const RowsArgs&, int64_t first, int64_t last, float* scratch);
  // Computes a tile; its columns begin with a panel.
  void (*matmul)(const MatmulArgs&, int64_t first_row, int64_t last_row, int64_t first_column, int64_t last_column);
  // Writes keys and values of `count` packed tokens from `token` on to columns from `column` on.
  void (*write_keys)(const AttentionArgs&, int64_t group, int64_t head, int64_t row, int64_t token, int64_t count,
                     int64_t column);
  // Computes the context of some tokens of a group, sorted by row. `scratch` has attention_scratch() floats.
  void (*attend)(const AttentionArgs&, int64_t group, int64_t head, const Token* tokens, int64_t count, float* scratch);
  // One row of a packed weight's transpose, [K]: the embedding of a token.
  void (*unpack_column)(Type, const void* weight, const float* column_scales, int64_t column, int64_t width, float* y);
};

constexpr int64_t kAttentionTokens = 6;
inline int64_t attention_scratch(int64_t prefix_columns, int64_t columns, int64_t head_size) {
  return kAttentionTokens * (prefix_columns + columns + 2 * kPanel + 2 * (head_size + kPanel)) + kPanel;
}

extern const Kernels kAmx, kAvx512, kAvx512Vnni, kAvxVnni, kAvx2;

}  // namespace qa
