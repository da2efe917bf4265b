#include <cstdint>

#if defined(__x86_64__) || defined(_M_X64)

// GCC's own header starts some intrinsics from a deliberately undefined register.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512vl,avx512bw,avx512bf16,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512bf16,avx2,fma")
#endif

#include "avx512_vector.h"
#include "ukernels.h"

namespace threshnet_fast::cpu {
namespace {

using Element = Bfloat16;

inline Vector widened(__m256i halves) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16))};
}
inline Vector load_elements(const Element* p) {
  return widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Vector load_elements(const Element* p, int64_t lanes) {
  return widened(_mm256_maskz_loadu_epi16(Vector::mask(lanes), p));
}

// To the nearest, ties to even; what float32 would call denormal becomes 0.
inline __m256i narrowed(Vector vector) { return (__m256i)_mm512_cvtneps_pbh(vector.value); }
inline void store_elements(Vector vector, Element* p) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrowed(vector));
}
inline void store_elements(Vector vector, Element* p, int64_t lanes) {
  _mm256_mask_storeu_epi16(p, Vector::mask(lanes), narrowed(vector));
}

inline Vector load_words(const Element* p) { return {_mm512_loadu_ps(p)}; }
inline Vector broadcast_word(const Element* p) {
  int32_t word;
  __builtin_memcpy(&word, p, sizeof word);
  return {_mm512_castsi512_ps(_mm512_set1_epi32(word))};
}
inline void multiply_add_words(Vector& sum, Vector a, Vector b, const Element*) {
  sum.value = _mm512_dpbf16_ps(sum.value, (__m512bh)a.value, (__m512bh)b.value);
}

}  // namespace
}  // namespace threshnet_fast::cpu

#include "peak_loop.h"
#include "templates.h"

namespace threshnet_fast::cpu {

static constexpr ConvTileFunction<Element> kConvTile[kMaxTileVectors + 1][kMaxTilePixels + 1] = {
    {},
    {THRESHNET_FAST_ROW_14(1)},
    {THRESHNET_FAST_ROW_14(2)},
    {THRESHNET_FAST_ROW_9(3)},
};

// 32 registers: 14 x 2 or 9 x 3 accumulators, the weights and a broadcast.
const UkernelTable<Element> kAvx512Bf16Table =
    table_of({"avx512_bf16", Vector::kLanes, {0, 14, 14, 9}}, kConvTile);

int64_t peak_loop_avx512_bf16() {
  constexpr int64_t kSums = 16;
  // A pair of bfloat16 in each lane, 0.25 both.
  const __m512bh factor = (__m512bh)_mm512_set1_epi32(0x3e803e80);
  __m512 sums[kSums];
  for (__m512& sum : sums) sum = _mm512_set1_ps(hidden(kTerm));
  for (int64_t i = 0; i < kIterations; ++i) {
    for (__m512& sum : sums) sum = _mm512_dpbf16_ps(sum, factor, factor);
  }
  for (int64_t s = 1; s < kSums; ++s) sums[0] = _mm512_add_ps(sums[0], sums[s]);
  float lanes[16];
  _mm512_storeu_ps(lanes, sums[0]);
  for (const float lane : lanes) hidden(lane);
  return 2 * 32 * kSums * kIterations;
}

}  // namespace threshnet_fast::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
