#include <cstdint>

#if defined(__aarch64__)

#include <arm_neon.h>

namespace {

using Element = float;

// Part of the baseline of every 64-bit ARM processor, so no function asks for a target.
struct Vector {
  static constexpr int64_t kLanes = 4;
  static constexpr bool kMultipliesByLane = true;
  float32x4_t value;

  static inline Vector zero() { return {vdupq_n_f32(0.0f)}; }
  static inline Vector load(const float* p) { return {vld1q_f32(p)}; }
  static inline Vector load(const float* p, int64_t lanes) {
    const float32x2_t none = vdup_n_f32(0.0f);
    switch (lanes) {
      case 1:
        return {vcombine_f32(vld1_lane_f32(p, none, 0), none)};
      case 2:
        return {vcombine_f32(vld1_f32(p), none)};
      case 3:
        return {vcombine_f32(vld1_f32(p), vld1_lane_f32(p + 2, none, 0))};
      default:
        return load(p);
    }
  }
  static inline Vector broadcast(const float* p) { return {vld1q_dup_f32(p)}; }
  inline void store(float* p) const { vst1q_f32(p, value); }
  inline void store(float* p, int64_t lanes) const {
    if (lanes == kLanes) return store(p);
    if (lanes & 2) vst1_f32(p, vget_low_f32(value));
    if (lanes == 1) vst1q_lane_f32(p, value, 0);
    if (lanes == 3) vst1q_lane_f32(p + 2, value, 2);
  }
  inline void multiply_add(Vector a, Vector b) { value = vfmaq_f32(value, a.value, b.value); }
  template <int kLane>
  inline void multiply_add_lane(Vector a, Vector b) {
    value = vfmaq_laneq_f32(value, a.value, b.value, kLane);
  }
  // fmax and fmin give NaN when either is NaN.
  inline void relu() { value = vmaxq_f32(value, vdupq_n_f32(0.0f)); }
  inline void at_most(Vector most) { value = vminq_f32(value, most.value); }
  inline void maximum(Vector other) { value = vmaxq_f32(value, other.value); }
  inline void add(Vector other) { value = vaddq_f32(value, other.value); }
  inline void subtract(Vector other) { value = vsubq_f32(value, other.value); }
  // A NaN is neither positive nor not.
  inline void drop_where_not_positive(Vector other) {
    value = vbslq_f32(vcleq_f32(other.value, vdupq_n_f32(0.0f)), vdupq_n_f32(0.0f), value);
  }
  // A NaN in `a` equals everything.
  inline void drop_where_equal(Vector a, Vector b) {
    const uint32x4_t keep = vbicq_u32(vceqq_f32(a.value, a.value), vceqq_f32(a.value, b.value));
    value = vbslq_f32(keep, value, vdupq_n_f32(0.0f));
  }
  inline void at_least(Vector least) { value = vmaxq_f32(value, least.value); }
  inline void multiply(Vector other) { value = vmulq_f32(value, other.value); }
  inline void divide(Vector other) { value = vdivq_f32(value, other.value); }
  // Two to the power in the lowest bits.
  inline Vector power_of_two() const {
    const uint32x4_t power = vshlq_n_u32(vreinterpretq_u32_f32(value), 23);
    return {vreinterpretq_f32_u32(vaddq_u32(power, vdupq_n_u32(127u << 23)))};
  }
  inline void scale(float factor) { value = vmulq_n_f32(value, factor); }
};

}  // namespace

#include "peak_loop.h"
#include "templates.h"
#include "training_templates.h"

namespace threshnet_fast::cpu {

static constexpr ConvTileFunction<Element> kConvTile[kMaxTileVectors + 1][kMaxTilePixels + 1] = {
    {},
    {THRESHNET_FAST_ROW_14(1)},
    {THRESHNET_FAST_ROW_6(2), conv_tile<7, 2>, conv_tile<8, 2>},
    {THRESHNET_FAST_ROW_6(3)},
};

// 32 registers: 14 x 1, 8 x 2 or 6 x 3 accumulators, a vector of each pixel's channels, and the
// weights. The shapes follow from what is published about the Cortex-A72, not from timings on one:
// it starts three instructions a cycle, of them one load of 128 bits, and multiplies in two pipes,
// where a result takes seven cycles. A load that fills a vector with one value occupies one of the
// pipes too: 8 of those to 16 multiply-adds could cost a third of their time. Multiplying by a lane
// needs none: 8 loads of pixels and 8 of weights serve four channels, which are 64 multiply-adds.
// So even if both pipes took a whole vector every cycle, the loads would need half of that time,
// and 16 independent chains of additions cover the seven cycles. 12 x 2 would need 12 registers for
// pixels, as those do not lie side by side, and 9 x 2 spares but one load in eighteen. A panel's
// weights pass by once for every tile, 32 bytes for 16 multiply-adds, which L2 can deliver.
const UkernelTable<Element> kNeonTable =
    table_of({"neon", Vector::kLanes, {0, 14, 8, 6}}, kConvTile);

static constexpr WeightGradientFunction kWeightGradient[kMaxTileVectors + 1][kMaxTilePixels + 1] = {
    {},
    {THRESHNET_FAST_GRADIENT_ROW_8(1)},
    {THRESHNET_FAST_GRADIENT_ROW_8(2)},
};

const TrainingTable kNeonTraining = training_table_of(kWeightGradient);

int64_t peak_loop_neon() {
  constexpr int64_t kSums = 16;
  const float32x4_t factor = vdupq_n_f32(hidden(kFactor));
  const float32x4_t term = vdupq_n_f32(hidden(kTerm));
  float32x4_t sums[kSums];
  for (float32x4_t& sum : sums) sum = term;
  for (int64_t i = 0; i < kIterations; ++i) {
    // The instruction adds to what it overwrites, as in the micro-kernels.
    for (float32x4_t& sum : sums) sum = vfmaq_f32(sum, factor, term);
  }
  for (int64_t s = 1; s < kSums; ++s) sums[0] = vaddq_f32(sums[0], sums[s]);
  hidden(vaddvq_f32(sums[0]));
  return 2 * 4 * kSums * kIterations;
}

}  // namespace threshnet_fast::cpu

#endif
