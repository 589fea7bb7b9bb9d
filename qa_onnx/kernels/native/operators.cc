// The operators of the domain "qa_onnx", for ONNX Runtime. `export/kernel_decoder.py` tells what they are for.
//
//   Linear{Int8,BFloat16}   x [M, K] float32 -> y [M, N] float32
//     inputs      x, norm_scale?, norm_shift?, weight (packed), column_scales?, column_sums?, bias?, residual?
//     attributes  columns (N), activation, epsilon
//   Unpack{Int8,BFloat16}   ids [N] int64 -> the columns of a packed weight as rows [N, K] float32
//     inputs      ids, weight (packed), column_scales?
//     attributes  width (K)
//   SharedAttention         context [M, H D] and the caches, into which keys and values are written in place
//     inputs      query [M, *], key_value [N, *], segments [S, 5], prefix_lengths [G], suffix_starts [G, R],
//                 prefix keys and values [G, H, 1, P, D], own keys and values [G, H, R, C, D], output_index? [M]
//     attributes  key_offset, scale
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <string>
#include <vector>

#include "kernels.h"
#include "ort_api.h"
#include "tensors.h"

#if defined(__GNUC__)
#define QA_EXPORT __attribute__((visibility("default")))
#else
#define QA_EXPORT
#endif

namespace qa {
namespace {

struct Features {
  bool amx, avx_vnni;
};

// What `__builtin_cpu_supports` has no name for in older Clang (14 of Debian 12), from leaf 7 of CPUID.
Features more_features() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kAmx = 1u << 22 | 1u << 24 | 1u << 25;  // of d: bf16, tile, int8
  const bool amx = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kAmx) == kAmx;
  const bool avx_vnni = __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 4);
  return {amx, avx_vnni};
}

// Whether the processor has AMX and the system lets this process use its registers, which it has to be asked for
// (https://docs.kernel.org/arch/x86/xstate.html).
bool may_use_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  static const bool allowed =
      more_features().amx && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return allowed;
}

// The kernels of this processor, best first; none where it has not even AVX2.
std::vector<const Kernels*> supported() {
  std::vector<const Kernels*> found;
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni");
  const bool bfloat16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (bfloat16 && may_use_tiles()) found.push_back(&kAmx);
  if (bfloat16) found.push_back(&kAvx512);
  if (avx512) found.push_back(&kAvx512Vnni);
  if (avx2 && more_features().avx_vnni) found.push_back(&kAvxVnni);
  if (avx2) found.push_back(&kAvx2);
  return found;
}

const Kernels* g_kernels = nullptr;

// -- Linear ----------------------------------------------------------------------------------------------------------

// Whether the kernels in use multiply in a type, or the graph should not have been loaded.
void want_type(Type type) {
  want(type == Type::kInt8 || g_kernels->has_bfloat16, "these kernels do not multiply in bfloat16");
}

constexpr int64_t kRowsPerTask = 8, kTileRows = 96, kTileColumns = 256, kFewColumns = 64;

template <Type TYPE>
struct Linear {
  int64_t columns;
  Activation activation;
  float epsilon;

  explicit Linear(const ort::KernelInfo* info)
      : columns(int_attribute(info, "columns")),
        activation(Activation(int_attribute(info, "activation"))),
        epsilon(float_attribute(info, "epsilon")) {}

  void compute(ort::KernelContext* context) const {
    const Tensor x = input(context, 0), norm_scale = input(context, 1), norm_shift = input(context, 2),
                 weight = input(context, 3), column_scales = input(context, 4), column_sums = input(context, 5),
                 bias = input(context, 6), residual = input(context, 7);
    constexpr int64_t group = group_size(TYPE);
    want_type(TYPE);
    want((norm_scale.data == nullptr) == (norm_shift.data == nullptr), "a norm has to have a scale and a shift");
    want(x.sizes.size() == 2, "x has to have two dimensions");
    want(columns > 0 && columns < kMaxSize, "the number of columns is out of range");
    const int64_t rows = x.sizes[0], width = x.sizes[1], groups = steps(width, group);
    want(weight.sizes == std::vector<int64_t>{steps(columns, kPanel), groups, kPanel, group},
         "a packed weight does not fit its input and its columns");
    want(residual.data == nullptr || residual.sizes == std::vector<int64_t>{rows, columns},
         "the residual is not of the output's shape");
    for (const Tensor* one : {&column_scales, &column_sums, &bias})
      want(one->data == nullptr || one->sizes == std::vector<int64_t>{columns}, "one number a column is expected");
    for (const Tensor* one : {&norm_scale, &norm_shift})
      want(one->data == nullptr || one->sizes == std::vector<int64_t>{width}, "one number a channel is expected");
    auto* y = static_cast<float*>(output(context, 0, {rows, columns}));
    if (rows == 0) return;
    const int64_t row_bytes = steps(width * element_size(TYPE), kCacheLine) * kCacheLine;
    const int64_t stride = row_bytes / element_size(TYPE);
    void* memory = aligned_scratch(size_t(steps(rows, kPanel) * kPanel * row_bytes));
    const RowsArgs prepare{TYPE, x.as<float>(), width, stride, norm_scale.as<float>(), norm_shift.as<float>(),
                               epsilon, memory, scratch<float>(size_t(rows)), scratch<int32_t>(size_t(rows))};
    const MatmulArgs product{TYPE, memory, prepare.row_scales, prepare.row_zeros, weight.data,
                                 column_scales.as<float>(), column_sums.as<int32_t>(), bias.as<float>(),
                                 residual.as<float>(), y, stride, groups * group, columns, activation};
    parallel(context, steps(rows, kRowsPerTask), [&](int64_t task) {
      thread_local std::vector<float> row;
      if (row.size() < size_t(width)) row.resize(size_t(width));
      g_kernels->prepare_rows(prepare, task * kRowsPerTask, std::min(rows, (task + 1) * kRowsPerTask), row.data());
    });
    const int64_t tile_columns = rows > kTileRows ? kTileColumns : kFewColumns;
    const int64_t across = steps(columns, tile_columns);
    parallel(context, steps(rows, kTileRows) * across, [&](int64_t task) {
      const int64_t row = task / across * kTileRows, column = task % across * tile_columns;
      g_kernels->matmul(product, row, std::min(rows, row + kTileRows), column, std::min(columns, column + tile_columns));
    });
  }
};

// -- Unpack ----------------------------------------------------------------------------------------------------------

template <Type TYPE>
struct Unpack {
  int64_t width;

  explicit Unpack(const ort::KernelInfo* info) : width(int_attribute(info, "width")) {}

  void compute(ort::KernelContext* context) const {
    const Tensor ids = input(context, 0), weight = input(context, 1), scales = input(context, 2);
    want(width > 0 && width < kMaxSize, "the width is out of range");
    constexpr int64_t group = group_size(TYPE);
    want(ids.sizes.size() == 1 && weight.sizes.size() == 4 &&
             weight.sizes == std::vector<int64_t>{weight.sizes[0], steps(width, group), kPanel, group},
         "a packed weight does not fit its width");
    const int64_t count = ids.sizes[0], padded = weight.sizes[0] * kPanel;
    want(scales.data == nullptr || (scales.sizes.size() == 1 && scales.sizes[0] <= padded),
         "one number a column is expected");
    const int64_t columns = scales.data == nullptr ? padded : scales.sizes[0];
    auto* y = static_cast<float*>(output(context, 0, {count, width}));
    for (int64_t i = 0; i < count; ++i)
      want(ids.as<int64_t>()[i] >= 0 && ids.as<int64_t>()[i] < columns, "a token is not in the vocabulary");
    parallel(context, count, [&](int64_t i) {
      g_kernels->unpack_column(TYPE, weight.data, scales.as<float>(), ids.as<int64_t>()[i], width, y + i * width);
    });
  }
};

// -- SharedAttention -------------------------------------------------------------------------------------------------

constexpr int64_t kTokensPerTask = 8 * kAttentionTokens;

struct Segment {  // a row of `segments`
  int64_t group, row, token, count, column;
};

struct SharedAttention {
  int64_t key_offset;
  float scale;

  explicit SharedAttention(const ort::KernelInfo* info)
      : key_offset(int_attribute(info, "key_offset")), scale(float_attribute(info, "scale")) {}

  void compute(ort::KernelContext* context) const {
    const Tensor query = input(context, 0), key_value = input(context, 1), segments = input(context, 2),
                 prefix_lengths = input(context, 3), suffix_starts = input(context, 4), prefix_keys = input(context, 5),
                 prefix_values = input(context, 6), keys = input(context, 7), values = input(context, 8),
                 outputs = input(context, 9);
    want(keys.sizes.size() == 5 && prefix_keys.sizes.size() == 5, "caches have to have five dimensions");
    want(query.sizes.size() == 2 && key_value.sizes.size() == 2, "a token has to have one row");
    const int64_t groups = keys.sizes[0], heads = keys.sizes[1], rows = keys.sizes[2], columns = keys.sizes[3],
                  size = keys.sizes[4], tokens = key_value.sizes[0], prefix_columns = prefix_keys.sizes[3];
    want(values.sizes == keys.sizes && prefix_values.sizes == prefix_keys.sizes, "keys and values differ in shape");
    want(prefix_keys.sizes == std::vector<int64_t>{groups, heads, 1, prefix_columns, size},
         "the prefix cache does not fit the other");
    want(columns % kPanel == 0 && prefix_columns % kPanel == 0, "caches have to have whole blocks of columns");
    want(prefix_lengths.sizes == std::vector<int64_t>{groups} &&
             suffix_starts.sizes == std::vector<int64_t>{groups, rows},
         "lengths do not fit the caches");
    want(segments.sizes.size() == 2 && segments.sizes[1] == 5, "segments have to have five columns");
    const int64_t queries = query.sizes[0], width = heads * size;
    want(key_offset >= 0 && key_offset < kMaxSize && query.sizes[1] >= width &&
             key_value.sizes[1] >= key_offset + 2 * width,
         "a token has too few numbers");

    auto* result = static_cast<float*>(output(context, 0, {queries, width}));
    auto* new_keys = static_cast<float*>(output(context, 1, keys.sizes));
    auto* new_values = static_cast<float*>(output(context, 2, values.sizes));
    const size_t bytes = size_t(groups * heads * rows * columns * size) * sizeof(float);
    if (new_keys != keys.data) std::memcpy(new_keys, keys.data, bytes);
    if (new_values != values.data) std::memcpy(new_values, values.data, bytes);

    // The query of each packed token, or -1: all tokens have one, or those of output_index.
    std::vector<int64_t> query_of(size_t(tokens), -1);
    if (outputs.data != nullptr) {
      want(outputs.sizes == std::vector<int64_t>{queries}, "one output_index a query is expected");
      for (int64_t m = 0; m < queries; ++m) {
        const int64_t token = outputs.as<int64_t>()[m];
        want(token >= 0 && token < tokens, "output_index is out of range");
        query_of[size_t(token)] = m;
      }
    } else {
      want(queries == tokens, "one query a token is expected");
      for (int64_t n = 0; n < tokens; ++n) query_of[size_t(n)] = n;
    }
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t length = prefix_lengths.as<int64_t>()[g];
      want(length >= 0 && (length <= prefix_columns || prefix_columns == 0), "a prefix is longer than its cache");
    }
    const int64_t count = segments.sizes[0];
    const auto* all = segments.as<Segment>();
    std::vector<std::vector<Token>> tokens_of(static_cast<size_t>(groups));
    for (const Segment* one = all; one < all + count; ++one) {
      want(one->group >= 0 && one->group < groups && one->row >= 0 && one->row < rows && one->count >= 0 &&
               one->token >= 0 && one->token + one->count <= tokens && one->column >= 0 &&
               one->column + one->count <= columns,
           "a segment lies outside of its cache");
      const int64_t start = suffix_starts.as<int64_t>()[one->group * rows + one->row];
      want(start >= 0 && start <= one->column, "a segment begins before its suffix");
      for (int64_t i = 0; i < one->count; ++i)
        if (query_of[size_t(one->token + i)] >= 0)
          tokens_of[size_t(one->group)].push_back(
              {query_of[size_t(one->token + i)], one->row, start, one->column + i + 1});
    }

    const AttentionArgs args{query.as<float>(), key_value.as<float>(), query.sizes[1], key_value.sizes[1],
                                 key_offset, scale, heads, size, rows, prefix_columns, columns,
                                 prefix_keys.as<float>(), prefix_values.as<float>(), new_keys, new_values,
                                 prefix_lengths.as<int64_t>(), result};
    parallel(context, heads, [&](int64_t head) {
      for (const Segment* one = all; one < all + count; ++one)
        g_kernels->write_keys(args, one->group, head, one->row, one->token, one->count, one->column);
    });
    struct Task {
      int64_t group, head, first, count;
    };
    std::vector<Task> tasks;
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t head = 0; head < heads; ++head)
        for (int64_t first = 0; first < int64_t(tokens_of[size_t(g)].size()); first += kTokensPerTask)
          tasks.push_back({g, head, first, std::min(kTokensPerTask, int64_t(tokens_of[size_t(g)].size()) - first)});
    parallel(context, int64_t(tasks.size()), [&](int64_t task) {
      const Task& one = tasks[size_t(task)];
      float* memory = scratch<float>(size_t(attention_scratch(prefix_columns, columns, size)));
      g_kernels->attend(args, one.group, one.head, tokens_of[size_t(one.group)].data() + one.first, one.count, memory);
    });
  }
};

// -- registration ----------------------------------------------------------------------------------------------------

struct Description : ort::CustomOp {
  const char* name;
  std::vector<ort::ElementType> inputs, outputs;
  std::vector<bool> optional;
};

const Description& described(const ort::CustomOp* op) { return *static_cast<const Description*>(op); }

template <class Function>
ort::Status* guarded(const Function& function) {
  try {
    function();
    return nullptr;
  } catch (const Failure& failure) {
    return failure.status;
  } catch (const std::exception& error) {
    return ort::make_error(g_api, error.what());
  }
}

template <class Operator>
Description describe(const char* name, std::vector<ort::ElementType> inputs, std::vector<ort::ElementType> outputs,
                     std::vector<size_t> optional) {
  Description op{};
  op.version = ort::kCustomOpVersion;
  op.name = name;
  op.optional.assign(inputs.size(), false);
  for (size_t index : optional) op.optional[index] = true;
  op.inputs = std::move(inputs);
  op.outputs = std::move(outputs);
  op.get_name = [](const ort::CustomOp* one) { return described(one).name; };
  op.get_provider = [](const ort::CustomOp*) -> const char* { return "CPUExecutionProvider"; };
  op.get_input_type = [](const ort::CustomOp* one, size_t index) { return described(one).inputs[index]; };
  op.get_input_count = [](const ort::CustomOp* one) { return described(one).inputs.size(); };
  op.get_output_type = [](const ort::CustomOp* one, size_t index) { return described(one).outputs[index]; };
  op.get_output_count = [](const ort::CustomOp* one) { return described(one).outputs.size(); };
  op.get_input_characteristic = [](const ort::CustomOp* one, size_t index) {
    return described(one).optional[index] ? ort::kOptional : ort::kRequired;
  };
  op.get_output_characteristic = [](const ort::CustomOp*, size_t) { return ort::kRequired; };
  op.get_input_memory = [](const ort::CustomOp*, size_t) { return 0; };
  op.get_variadic_input_min = [](const ort::CustomOp*) { return 0; };
  op.get_variadic_input_homogeneity = [](const ort::CustomOp*) { return 1; };
  op.get_variadic_output_min = [](const ort::CustomOp*) { return 0; };
  op.get_variadic_output_homogeneity = [](const ort::CustomOp*) { return 1; };
  op.create_kernel_v2 = [](const ort::CustomOp*, const ort::Api*, const ort::KernelInfo* info, void** kernel) {
    return guarded([&] { *kernel = new Operator(info); });
  };
  op.compute_v2 = [](void* kernel, ort::KernelContext* context) {
    return guarded([&] { static_cast<const Operator*>(kernel)->compute(context); });
  };
  op.destroy_kernel = [](void* kernel) { delete static_cast<Operator*>(kernel); };
  return op;
}

std::vector<Description> make_operators() {
  using namespace ort;
  std::vector<ElementType> linear{kFloat, kFloat, kFloat, kInt8, kFloat, kInt32, kFloat, kFloat};
  std::vector<ElementType> unpack{kInt64, kInt8, kFloat};
  std::vector<Description> made;
  made.push_back(describe<Linear<Type::kInt8>>("LinearInt8", linear, {kFloat}, {1, 2, 6, 7}));
  made.push_back(describe<Unpack<Type::kInt8>>("UnpackInt8", unpack, {kFloat}, {}));
  linear[3] = unpack[1] = kBFloat16;
  made.push_back(describe<Linear<Type::kBFloat16>>("LinearBFloat16", linear, {kFloat}, {1, 2, 4, 5, 6, 7}));
  made.push_back(describe<Unpack<Type::kBFloat16>>("UnpackBFloat16", unpack, {kFloat}, {2}));
  made.push_back(describe<SharedAttention>(
      "SharedAttention", {kFloat, kFloat, kInt64, kInt64, kInt64, kFloat, kFloat, kFloat, kFloat, kInt64},
      {kFloat, kFloat, kFloat}, {9}));
  return made;
}

}  // namespace

// The instruction sets that this processor has kernels for, best first: names, divided by commas.
extern "C" QA_EXPORT const char* qa_onnx_instruction_sets() {
  static const std::string names = [] {
    std::string joined;
    for (const Kernels* one : supported()) joined += (joined.empty() ? "" : ",") + std::string(one->name);
    return joined;
  }();
  return names.c_str();
}

// Whether one of them multiplies in bfloat16.
extern "C" QA_EXPORT int qa_onnx_has_bfloat16(const char* name) {
  for (const Kernels* one : supported())
    if (std::strcmp(one->name, name) == 0) return one->has_bfloat16;
  return 0;
}

// Chooses the one that all sessions use from now on; returns 0 where the processor does not have it.
extern "C" QA_EXPORT int qa_onnx_use(const char* name) {
  for (const Kernels* one : supported())
    if (std::strcmp(one->name, name) == 0) {
      g_kernels = one;
      return 1;
    }
  return 0;
}

extern "C" QA_EXPORT ort::Status* RegisterCustomOps(ort::SessionOptions* options, const ort::ApiBase* base) {
  g_api = base->get_api(ort::kApiVersion);
  if (g_kernels == nullptr) {
    const auto found = supported();
    if (found.empty()) return ort::make_error(g_api, "qa_onnx: this processor has no AVX2");
    g_kernels = found[0];
  }
  static const std::vector<Description> operators = make_operators();
  static ort::OpDomain* domain = nullptr;
  return guarded([&] {
    if (domain == nullptr) {
      check(ort::create_domain(g_api, "qa_onnx", &domain));
      for (const Description& one : operators) check(ort::add_to_domain(g_api, domain, &one));
    }
    check(ort::add_domain(g_api, options, domain));
  });
}

}  // namespace qa
