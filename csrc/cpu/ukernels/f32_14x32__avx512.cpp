#include <cstdint>

#if defined(__x86_64__) || defined(_M_X64)

// GCC's own header starts some intrinsics from a deliberately undefined register.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512vl,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512vl,avx2,fma")
#endif

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
  // maxps returns its second operand when either is NaN.
  inline void relu() { value = _mm512_max_ps(_mm512_setzero_ps(), value); }
  inline void maximum(Vector other) {
    const __mmask16 take = _mm512_cmp_ps_mask(other.value, value, _CMP_GT_OQ) |
                           _mm512_cmp_ps_mask(other.value, other.value, _CMP_UNORD_Q);
    value = _mm512_mask_mov_ps(value, take, other.value);
  }
  inline void add(Vector other) { value = _mm512_add_ps(value, other.value); }
  inline void subtract(Vector other) { value = _mm512_sub_ps(value, other.value); }
  inline void scale(float factor) { value = _mm512_mul_ps(value, _mm512_set1_ps(factor)); }
};

}  // namespace

#include "f32_ukernels.h"

namespace threshnet_fast::cpu {

static constexpr ConvTileFunction kConvTile[kMaxTileVectors + 1][kMaxTilePixels + 1] = {
    {},
    {THRESHNET_FAST_ROW_14(1)},
    {THRESHNET_FAST_ROW_14(2)},
    {THRESHNET_FAST_ROW_9(3)},
};

// 32 registers: 14 x 2 or 9 x 3 accumulators, the weights and a broadcast.
const UkernelTable kAvx512Table = {"avx512",
                                   Vector::kLanes,
                                   {0, 14, 14, 9},
                                   kConvTile,
                                   bn_relu,
                                   max_pool,
                                   average_pool,
                                   {winograd_input_2x2, winograd_output_2x2},
                                   {winograd_input_4x4, winograd_output_4x4}};

}  // namespace threshnet_fast::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
