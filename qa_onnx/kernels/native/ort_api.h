// The part of ONNX Runtime's C API that custom operators need, declared by position.
//
// No registry carries ONNX Runtime's headers. Its C API is an append-only table of functions ("OrtApi" in
// onnxruntime_c_api.h), so an entry keeps its number for ever; version 17 has all that are used here.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ort {

constexpr uint32_t kApiVersion = 17;
constexpr uint32_t kCustomOpVersion = 16;

struct Status;
struct Value;
struct ShapeInfo;
struct KernelInfo;
struct KernelContext;
struct SessionOptions;
struct OpDomain;
struct Api;

struct ApiBase {
  const Api* (*get_api)(uint32_t version);
  const char* (*get_version_string)();
};

enum ElementType : int { kFloat = 1, kInt8 = 3, kInt32 = 6, kInt64 = 7, kBFloat16 = 16 };
enum Characteristic : int { kRequired = 0, kOptional = 1 };

// "OrtCustomOp". ONNX Runtime reads only the fields of the version that the first one names.
struct CustomOp {
  uint32_t version;
  void* (*create_kernel)(const CustomOp*, const Api*, const KernelInfo*);
  const char* (*get_name)(const CustomOp*);
  const char* (*get_provider)(const CustomOp*);
  ElementType (*get_input_type)(const CustomOp*, size_t);
  size_t (*get_input_count)(const CustomOp*);
  ElementType (*get_output_type)(const CustomOp*, size_t);
  size_t (*get_output_count)(const CustomOp*);
  void (*compute)(void*, KernelContext*);
  void (*destroy_kernel)(void*);
  Characteristic (*get_input_characteristic)(const CustomOp*, size_t);
  Characteristic (*get_output_characteristic)(const CustomOp*, size_t);
  int (*get_input_memory)(const CustomOp*, size_t);
  int (*get_variadic_input_min)(const CustomOp*);
  int (*get_variadic_input_homogeneity)(const CustomOp*);
  int (*get_variadic_output_min)(const CustomOp*);
  int (*get_variadic_output_homogeneity)(const CustomOp*);
  Status* (*create_kernel_v2)(const CustomOp*, const Api*, const KernelInfo*, void** kernel);
  Status* (*compute_v2)(void* kernel, KernelContext*);
};

// Calls entry `number` of the table.
template <class... Arguments>
Status* call(const Api* api, size_t number, Arguments... arguments) {
  using Function = Status* (*)(Arguments...);
  return reinterpret_cast<Function const*>(api)[number](arguments...);
}

inline Status* make_error(const Api* api, const char* message) { return call(api, 0, /*ORT_FAIL*/ 1, message); }

inline Status* get_mutable_data(const Api* api, Value* value, void** data) { return call(api, 51, value, data); }
inline Status* get_dimension_count(const Api* api, const ShapeInfo* info, size_t* count) {
  return call(api, 61, info, count);
}
inline Status* get_dimensions(const Api* api, const ShapeInfo* info, int64_t* sizes, size_t count) {
  return call(api, 62, info, sizes, count);
}
inline Status* get_shape_info(const Api* api, const Value* value, ShapeInfo** info) {
  return call(api, 65, value, info);
}
inline void release_shape_info(const Api* api, ShapeInfo* info) {
  reinterpret_cast<void (*const*)(ShapeInfo*)>(api)[99](info);
}
inline Status* create_domain(const Api* api, const char* name, OpDomain** domain) {
  return call(api, 26, name, domain);
}
inline Status* add_to_domain(const Api* api, OpDomain* domain, const CustomOp* op) {
  return call(api, 27, domain, op);
}
inline Status* add_domain(const Api* api, SessionOptions* options, OpDomain* domain) {
  return call(api, 28, options, domain);
}
inline Status* get_float_attribute(const Api* api, const KernelInfo* info, const char* name, float* out) {
  return call(api, 85, info, name, out);
}
inline Status* get_int_attribute(const Api* api, const KernelInfo* info, const char* name, int64_t* out) {
  return call(api, 86, info, name, out);
}
inline Status* get_input(const Api* api, const KernelContext* context, size_t index, const Value** value) {
  return call(api, 90, context, index, value);
}
inline Status* get_output(const Api* api, KernelContext* context, size_t index, const int64_t* sizes, size_t count,
                          Value** value) {
  return call(api, 91, context, index, sizes, count, value);
}
inline Status* parallel_for(const Api* api, const KernelContext* context, void (*body)(void*, size_t), size_t total,
                            void* data) {
  return call(api, 274, context, body, total, /*no limit of batches*/ size_t{0}, data);
}

}  // namespace ort
