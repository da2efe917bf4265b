#include <cstdint>

#if defined(__x86_64__) || defined(_M_X64)

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

namespace {

using Element = float;

struct Vector {
  static constexpr int64_t kLanes = 8;
  __m256 value;

  static inline __m256i mask(int64_t lanes) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(lanes)),
                              _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static inline Vector zero() { return {_mm256_setzero_ps()}; }
  static inline Vector load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static inline Vector load(const float* p, int64_t lanes) {
    return {_mm256_maskload_ps(p, mask(lanes))};
  }
  static inline Vector broadcast(const float* p) { return {_mm256_broadcast_ss(p)}; }
  inline void store(float* p) const { _mm256_storeu_ps(p, value); }
  inline void store(float* p, int64_t lanes) const { _mm256_maskstore_ps(p, mask(lanes), value); }
  inline void multiply_add(Vector a, Vector b) { value = _mm256_fmadd_ps(a.value, b.value, value); }
  // maxps and minps return their second operand when either is NaN.
  inline void relu() { value = _mm256_max_ps(_mm256_setzero_ps(), value); }
  inline void at_most(Vector most) { value = _mm256_min_ps(most.value, value); }
  inline void maximum(Vector other) {
    const __m256 take = _mm256_or_ps(_mm256_cmp_ps(other.value, value, _CMP_GT_OQ),
                                     _mm256_cmp_ps(other.value, other.value, _CMP_UNORD_Q));
    value = _mm256_blendv_ps(value, other.value, take);
  }
  inline void add(Vector other) { value = _mm256_add_ps(value, other.value); }
  inline void subtract(Vector other) { value = _mm256_sub_ps(value, other.value); }
  // A NaN is neither positive nor not.
  inline void drop_where_not_positive(Vector other) {
    value = _mm256_and_ps(_mm256_cmp_ps(other.value, _mm256_setzero_ps(), _CMP_NLE_UQ), value);
  }
  // A NaN in `a` equals everything.
  inline void drop_where_equal(Vector a, Vector b) {
    const __m256 keep = _mm256_and_ps(_mm256_cmp_ps(a.value, b.value, _CMP_NEQ_UQ),
                                      _mm256_cmp_ps(a.value, a.value, _CMP_ORD_Q));
    value = _mm256_and_ps(keep, value);
  }
  inline void at_least(Vector least) { value = _mm256_max_ps(least.value, value); }
  inline void multiply(Vector other) { value = _mm256_mul_ps(value, other.value); }
  inline void divide(Vector other) { value = _mm256_div_ps(value, other.value); }
  // Two to the power in the lowest bits.
  inline Vector power_of_two() const {
    const __m256i power = _mm256_slli_epi32(_mm256_castps_si256(value), 23);
    return {_mm256_castsi256_ps(_mm256_add_epi32(power, _mm256_set1_epi32(127 << 23)))};
  }
  inline void scale(float factor) { value = _mm256_mul_ps(value, _mm256_set1_ps(factor)); }
};

}  // namespace

#include "peak_loop.h"
#include "templates.h"
#include "training_templates.h"

namespace threshnet_fast::cpu {

static constexpr ConvTileFunction<Element> kConvTile[kMaxTileVectors + 1][kMaxTilePixels + 1] = {
    {},
    {THRESHNET_FAST_ROW_9(1)},
    {THRESHNET_FAST_ROW_6(2)},
    {THRESHNET_FAST_ROW_4(3)},
};

// 16 registers: 9 x 1, 6 x 2 or 4 x 3 accumulators, the weights and a broadcast.
const UkernelTable<Element> kAvx2Table =
    table_of({"avx2", Vector::kLanes, {0, 9, 6, 4}}, kConvTile);

static constexpr WeightGradientFunction kWeightGradient[kMaxTileVectors + 1][kMaxTilePixels + 1] = {
    {},
    {THRESHNET_FAST_GRADIENT_ROW_6(1)},
    {THRESHNET_FAST_GRADIENT_ROW_6(2)},
};

const TrainingTable kAvx2Training = training_table_of(kWeightGradient);

int64_t peak_loop_avx2() {
  constexpr int64_t kSums = 12;
  const __m256 factor = _mm256_set1_ps(hidden(kFactor));
  const __m256 term = _mm256_set1_ps(hidden(kTerm));
  __m256 sums[kSums];
  for (__m256& sum : sums) sum = term;
  for (int64_t i = 0; i < kIterations; ++i) {
    for (__m256& sum : sums) sum = _mm256_fmadd_ps(sum, factor, term);
  }
  for (int64_t s = 1; s < kSums; ++s) sums[0] = _mm256_add_ps(sums[0], sums[s]);
  float lanes[8];
  _mm256_storeu_ps(lanes, sums[0]);
  for (const float lane : lanes) hidden(lane);
  return 2 * 8 * kSums * kIterations;
}

}  // namespace threshnet_fast::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
