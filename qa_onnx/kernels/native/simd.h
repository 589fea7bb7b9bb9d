// Vectors of float32 and int32 as AVX-512 or AVX2 has them, whichever the file is compiled for.
//
// All of it has internal linkage, and nothing of the standard library is used: a function compiled for AVX-512 must not
// be the copy that the linker keeps for everybody.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

#if defined(__AVX512F__)

constexpr int kLanes = 16;
using Floats = __m512;
using Ints = __m512i;
using Mask = __mmask16;

inline Mask first_lanes(int64_t count) {
  return count >= kLanes ? Mask(0xffff) : count <= 0 ? Mask(0) : Mask((1u << count) - 1);
}
inline Floats zeros() { return _mm512_setzero_ps(); }
inline Floats all(float x) { return _mm512_set1_ps(x); }
inline Ints all_ints(int32_t x) { return _mm512_set1_epi32(x); }
inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline Floats load(const float* p, Mask mask) { return _mm512_maskz_loadu_ps(mask, p); }
inline Ints load_ints(const int32_t* p, Mask mask) { return _mm512_maskz_loadu_epi32(mask, p); }
inline void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
inline void store(float* p, Floats x, Mask mask) { _mm512_mask_storeu_ps(p, mask, x); }
inline Floats keep(Floats x, Mask mask) { return _mm512_maskz_mov_ps(mask, x); }
inline Floats pick(Floats otherwise, Floats x, Mask mask) { return _mm512_mask_mov_ps(otherwise, mask, x); }
inline Mask without(Mask a, Mask b) { return a & ~b; }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats magnitude(Floats a) { return _mm512_abs_ps(a); }
inline Floats sign_of(Floats a) { return _mm512_and_ps(a, _mm512_set1_ps(-0.0f)); }
inline Floats either_bits(Floats a, Floats b) { return _mm512_or_ps(a, b); }
inline Floats round_to_even(Floats a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Ints to_ints(Floats a) { return _mm512_cvtps_epi32(a); }
inline Floats to_floats(Ints a) { return _mm512_cvtepi32_ps(a); }
inline Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline Ints sub(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
inline Ints mul(Ints a, Ints b) { return _mm512_mullo_epi32(a, b); }
inline Floats scale_by_power(Floats x, Floats n) { return _mm512_scalef_ps(x, n); }
inline float sum_of(Floats a) { return _mm512_reduce_add_ps(a); }
inline float max_of(Floats a) { return _mm512_reduce_max_ps(a); }
inline float min_of(Floats a) { return _mm512_reduce_min_ps(a); }
// Stores int32 as uint8, saturated.
inline void store_bytes(uint8_t* p, Ints x, Mask mask) {
  _mm512_mask_cvtusepi32_storeu_epi8(p, mask, _mm512_max_epi32(x, _mm512_setzero_si512()));
}

#else

constexpr int kLanes = 8;
using Floats = __m256;
using Ints = __m256i;
using Mask = __m256i;

inline Mask first_lanes(int64_t count) {
  const int32_t limit = count > kLanes ? kLanes : count < 0 ? 0 : int32_t(count);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(limit), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Floats zeros() { return _mm256_setzero_ps(); }
inline Floats all(float x) { return _mm256_set1_ps(x); }
inline Ints all_ints(int32_t x) { return _mm256_set1_epi32(x); }
inline Floats load(const float* p) { return _mm256_loadu_ps(p); }
inline Floats load(const float* p, Mask mask) { return _mm256_maskload_ps(p, mask); }
inline Ints load_ints(const int32_t* p, Mask mask) { return _mm256_maskload_epi32(p, mask); }
inline void store(float* p, Floats x) { _mm256_storeu_ps(p, x); }
inline void store(float* p, Floats x, Mask mask) { _mm256_maskstore_ps(p, mask, x); }
inline Floats keep(Floats x, Mask mask) { return _mm256_and_ps(x, _mm256_castsi256_ps(mask)); }
inline Floats pick(Floats otherwise, Floats x, Mask mask) {
  return _mm256_blendv_ps(otherwise, x, _mm256_castsi256_ps(mask));
}
inline Mask without(Mask a, Mask b) { return _mm256_andnot_si256(b, a); }
inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats div(Floats a, Floats b) { return _mm256_div_ps(a, b); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
inline Floats min(Floats a, Floats b) { return _mm256_min_ps(a, b); }
inline Floats magnitude(Floats a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
inline Floats sign_of(Floats a) { return _mm256_and_ps(a, _mm256_set1_ps(-0.0f)); }
inline Floats either_bits(Floats a, Floats b) { return _mm256_or_ps(a, b); }
inline Floats round_to_even(Floats a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Ints to_ints(Floats a) { return _mm256_cvtps_epi32(a); }
inline Floats to_floats(Ints a) { return _mm256_cvtepi32_ps(a); }
inline Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
inline Ints sub(Ints a, Ints b) { return _mm256_sub_epi32(a, b); }
inline Ints mul(Ints a, Ints b) { return _mm256_mullo_epi32(a, b); }
// x * 2^n for whole n from -126 to 127, as exp() has them.
inline Floats scale_by_power(Floats x, Floats n) {
  const Ints exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(x, _mm256_castsi256_ps(exponent));
}
inline float sum_of(Floats a) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
inline float max_of(Floats a) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}
inline float min_of(Floats a) {
  __m128 half = _mm_min_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  half = _mm_min_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_min_ss(half, _mm_movehdup_ps(half)));
}
inline void store_bytes(uint8_t* p, Ints x, Mask mask) {
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  alignas(16) uint8_t bytes[16];
  _mm_store_si128((__m128i*)bytes, _mm_packus_epi16(words, words));
  alignas(32) int32_t wanted[8];
  _mm256_store_si256((__m256i*)wanted, mask);
  for (int i = 0; i < kLanes && wanted[i]; ++i) p[i] = bytes[i];
}

#endif

constexpr int kVectors = 16 / kLanes;  // of a panel's 16 columns

// Calls body(0), body(1)... body(COUNT - 1), each with a constant: arrays that they index stay in registers.
template <int INDEX>
struct Constant {
  constexpr operator int() const { return INDEX; }
};
template <int COUNT, int FIRST = 0, class Body>
__attribute__((always_inline)) inline void repeat(const Body& body) {
  if constexpr (FIRST < COUNT) {
    body(Constant<FIRST>());
    repeat<COUNT, FIRST + 1>(body);
  }
}

// Calls body with the constant that equals `count`, from 1 to MOST.
template <int MOST, class Body>
inline void with_constant(int count, const Body& body) {
  if constexpr (MOST > 1) {
    if (count < MOST) return with_constant<MOST - 1>(count, body);
  }
  body(Constant<MOST>());
}

template <class T>
constexpr T smaller(T a, T b) {
  return a < b ? a : b;
}
template <class T>
constexpr T larger(T a, T b) {
  return a > b ? a : b;
}

// e^x, relative error below 2e-7, 0 below -87 (Cody and Waite's reduction, Cephes' polynomial).
inline Floats exp(Floats x) {
  x = min(max(x, all(-87.0f)), all(88.0f));
  const Floats n = round_to_even(mul(x, all(1.44269504f)));
  Floats r = fma(n, all(-0.693359375f), x);
  r = fma(n, all(2.12194440e-4f), r);
  Floats p = all(1.9875691500e-4f);
  p = fma(p, r, all(1.3981999507e-3f));
  p = fma(p, r, all(8.3334519073e-3f));
  p = fma(p, r, all(4.1665795894e-2f));
  p = fma(p, r, all(1.6666665459e-1f));
  p = fma(p, r, all(5.0000001201e-1f));
  p = fma(p, mul(r, r), add(r, all(1.0f)));
  return scale_by_power(p, n);
}

// GELU by the hyperbolic tangent: x / (1 + e^(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3).
inline Floats gelu_tanh(Floats x) {
  const Floats u = mul(mul(x, all(-2.0f * 0.7978845608f)), fma(mul(x, x), all(0.044715f), all(1.0f)));
  return div(x, add(exp(u), all(1.0f)));
}

// GELU by the error function (Abramowitz and Stegun 7.1.26, absolute error of erf below 1.5e-7).
inline Floats gelu_erf(Floats x) {
  const Floats z = mul(magnitude(x), all(0.70710678f));
  const Floats t = div(all(1.0f), fma(z, all(0.3275911f), all(1.0f)));
  Floats p = all(1.061405429f);
  p = fma(p, t, all(-1.453152027f));
  p = fma(p, t, all(1.421413741f));
  p = fma(p, t, all(-0.284496736f));
  p = fma(p, t, all(0.254829592f));
  const Floats tail = mul(mul(p, t), exp(mul(mul(z, z), all(-1.0f))));
  const Floats erf = either_bits(sub(all(1.0f), tail), sign_of(x));
  return mul(mul(x, all(0.5f)), add(erf, all(1.0f)));
}

}  // namespace
