// What operators read and write: tensors and attributes of ONNX Runtime, threads, memory for a run.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels.h"
#include "ort_api.h"

namespace qa {

inline const ort::Api* g_api = nullptr;

// An error of ONNX Runtime, on its way to the status that an operator returns.
struct Failure {
  ort::Status* status;
};

inline void check(ort::Status* status) {
  if (status != nullptr) throw Failure{status};
}

[[noreturn]] inline void fail(const std::string& message) { throw Failure{ort::make_error(g_api, message.c_str())}; }

struct Tensor {
  void* data = nullptr;  // null: an optional input that is not there
  std::vector<int64_t> sizes;

  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

inline Tensor input(ort::KernelContext* context, size_t index) {
  const ort::Value* value = nullptr;
  check(ort::get_input(g_api, context, index, &value));
  Tensor tensor;
  if (value == nullptr) return tensor;
  check(ort::get_mutable_data(g_api, const_cast<ort::Value*>(value), &tensor.data));
  ort::ShapeInfo* info = nullptr;
  check(ort::get_shape_info(g_api, value, &info));
  size_t count = 0;
  ort::Status* status = ort::get_dimension_count(g_api, info, &count);
  tensor.sizes.resize(count);
  if (status == nullptr) status = ort::get_dimensions(g_api, info, tensor.sizes.data(), count);
  ort::release_shape_info(g_api, info);
  check(status);
  static char empty;  // a tensor of no elements may have no memory, and is there all the same
  if (tensor.data == nullptr) tensor.data = &empty;
  return tensor;
}

inline void* output(ort::KernelContext* context, size_t index, const std::vector<int64_t>& sizes) {
  ort::Value* value = nullptr;
  check(ort::get_output(g_api, context, index, sizes.data(), sizes.size(), &value));
  void* data = nullptr;
  check(ort::get_mutable_data(g_api, value, &data));
  return data;
}

template <class Body>
void parallel(ort::KernelContext* context, int64_t total, const Body& body) {
  if (total == 1) body(0);
  if (total <= 1) return;
  auto call = [](void* data, size_t index) { (*static_cast<const Body*>(data))(int64_t(index)); };
  check(ort::parallel_for(g_api, context, call, size_t(total), const_cast<Body*>(&body)));
}

inline int64_t steps(int64_t total, int64_t step) { return (total + step - 1) / step; }

// Memory of the calling thread that grows and is used again: a first touch of fresh memory is slow.
template <class T>
T* scratch(size_t count) {
  thread_local std::vector<T> memory;
  if (memory.size() < count) memory.resize(count);
  return memory.data();
}

// Bytes of such memory that begin with a cache line.
inline void* aligned_scratch(size_t count) {
  const auto address = reinterpret_cast<uintptr_t>(scratch<uint8_t>(count + kCacheLine));
  return reinterpret_cast<void*>((address + kCacheLine - 1) / kCacheLine * kCacheLine);
}

inline void want(bool holds, const char* what) {
  if (!holds) fail(std::string("qa_onnx: ") + what);
}

constexpr int64_t kMaxSize = int64_t{1} << 31;

inline int64_t int_attribute(const ort::KernelInfo* info, const char* name) {
  int64_t value = 0;
  check(ort::get_int_attribute(g_api, info, name, &value));
  return value;
}

inline float float_attribute(const ort::KernelInfo* info, const char* name) {
  float value = 0;
  check(ort::get_float_attribute(g_api, info, name, &value));
  return value;
}

}  // namespace qa
