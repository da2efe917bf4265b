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

}  // namespace threshnet_fast::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
