// The kernels for one instruction set, QA_KERNELS: kAmx, kAvx512, kAvx512Vnni, kAvxVnni or kAvx2.
//
// No number depends on what else is computed: a row's sums take the same steps alone and among others.
#include "kernels.h"

#include <cmath>
#include <cstring>

#include "attention.h"
#include "matmul.h"
#include "simd.h"

namespace qa {
namespace {

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

}  // namespace

#if defined(__AVX512BF16__)
constexpr bool kHasBFloat16 = true;
#else
constexpr bool kHasBFloat16 = false;
#endif

extern const Kernels QA_KERNELS = {QA_NAME, kHasBFloat16, prepare_rows, matmul, write_keys, attend, unpack_column};

}  // namespace qa
