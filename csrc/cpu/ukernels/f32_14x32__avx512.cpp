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

#include "avx512_vector.h"

namespace {
using Element = float;
}  // namespace

#include "peak_loop.h"
#include "templates.h"
#include "training_templates.h"

namespace threshnet_fast::cpu {

static constexpr ConvTileFunction<Element> kConvTile[kMaxTileVectors + 1][kMaxTilePixels + 1] = {
    {},
    {THRESHNET_FAST_ROW_14(1)},
    {THRESHNET_FAST_ROW_14(2)},
    {THRESHNET_FAST_ROW_9(3)},
};

// 32 registers: 14 x 2 or 9 x 3 accumulators, the weights and a broadcast.
const UkernelTable<Element> kAvx512Table =
    table_of({"avx512", Vector::kLanes, {0, 14, 14, 9}}, kConvTile);

static constexpr WeightGradientFunction kWeightGradient[kMaxTileVectors + 1][kMaxTilePixels + 1] = {
    {},
    {THRESHNET_FAST_GRADIENT_ROW_14(1)},
    {THRESHNET_FAST_GRADIENT_ROW_14(2)},
};

const TrainingTable kAvx512Training = training_table_of(kWeightGradient);

int64_t peak_loop_avx512() {
  constexpr int64_t kSums = 16;
  const __m512 factor = _mm512_set1_ps(hidden(kFactor));
  const __m512 term = _mm512_set1_ps(hidden(kTerm));
  __m512 sums[kSums];
  for (__m512& sum : sums) sum = term;
  for (int64_t i = 0; i < kIterations; ++i) {
    for (__m512& sum : sums) sum = _mm512_fmadd_ps(sum, factor, term);
  }
  for (int64_t s = 1; s < kSums; ++s) sums[0] = _mm512_add_ps(sums[0], sums[s]);
  float lanes[16];
  _mm512_storeu_ps(lanes, sums[0]);
  for (const float lane : lanes) hidden(lane);
  return 2 * 16 * kSums * kIterations;
}

}  // namespace threshnet_fast::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
