// Vectors of 16 floats, for the source files of AVX-512 and of what extends it. Included after the
// target has been set.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

struct Vector {
  static constexpr int64_t kLanes = 16;
  __m512 value;

  static inline __mmask16 mask(int64_t lanes) { return static_cast<__mmask16>((1u << lanes) - 1u); }
  static inline Vector zero() { return {_mm512_setzero_ps()}; }
  static inline Vector load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static inline Vector load(const float* p, int64_t lanes) {
    return {_mm512_maskz_loadu_ps(mask(lanes), p)};
  }
  static inline Vector broadcast(const float* p) { return {_mm512_set1_ps(*p)}; }
  inline void store(float* p) const { _mm512_storeu_ps(p, value); }
  inline void store(float* p, int64_t lanes) const { _mm512_mask_storeu_ps(p, mask(lanes), value); }
  inline void multiply_add(Vector a, Vector b) { value = _mm512_fmadd_ps(a.value, b.value, value); }
  // maxps and minps return their second operand when either is NaN.
  inline void relu() { value = _mm512_max_ps(_mm512_setzero_ps(), value); }
  inline void at_most(Vector most) { value = _mm512_min_ps(most.value, value); }
  inline void maximum(Vector other) {
    const __mmask16 take = _mm512_cmp_ps_mask(other.value, value, _CMP_GT_OQ) |
                           _mm512_cmp_ps_mask(other.value, other.value, _CMP_UNORD_Q);
    value = _mm512_mask_mov_ps(value, take, other.value);
  }
  inline void add(Vector other) { value = _mm512_add_ps(value, other.value); }
  inline void subtract(Vector other) { value = _mm512_sub_ps(value, other.value); }
  // A NaN is neither positive nor not.
  inline void drop_where_not_positive(Vector other) {
    value = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(other.value, _mm512_setzero_ps(), _CMP_NLE_UQ),
                                value);
  }
  // A NaN in `a` equals everything.
  inline void drop_where_equal(Vector a, Vector b) {
    const __mmask16 keep = _mm512_cmp_ps_mask(a.value, b.value, _CMP_NEQ_UQ) &
                           _mm512_cmp_ps_mask(a.value, a.value, _CMP_ORD_Q);
    value = _mm512_maskz_mov_ps(keep, value);
  }
  inline void at_least(Vector least) { value = _mm512_max_ps(least.value, value); }
  inline void multiply(Vector other) { value = _mm512_mul_ps(value, other.value); }
  inline void divide(Vector other) { value = _mm512_div_ps(value, other.value); }
  // Two to the power in the lowest bits.
  inline Vector power_of_two() const {
    const __m512i power = _mm512_slli_epi32(_mm512_castps_si512(value), 23);
    return {_mm512_castsi512_ps(_mm512_add_epi32(power, _mm512_set1_epi32(127 << 23)))};
  }
  inline void scale(float factor) { value = _mm512_mul_ps(value, _mm512_set1_ps(factor)); }
};

}  // namespace
