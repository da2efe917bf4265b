#include <cstdint>

namespace {

using Element = float;

// Four lanes in the compiler's own vector type: plain C++ that becomes SSE2 or NEON where the
// baseline of the target has it, and scalar code elsewhere.
struct Vector {
  static constexpr int64_t kLanes = 4;
  typedef float Lanes __attribute__((vector_size(16)));
  Lanes value;

  static inline Vector zero() { return Vector{Lanes{}}; }
  static inline Vector load(const float* p) {
    Lanes value;
    __builtin_memcpy(&value, p, sizeof value);
    return Vector{value};
  }
  static inline Vector load(const float* p, int64_t lanes) {
    Lanes value = {};
    for (int64_t i = 0; i < lanes; ++i) value[i] = p[i];
    return Vector{value};
  }
  static inline Vector broadcast(const float* p) { return Vector{Lanes{*p, *p, *p, *p}}; }
  inline void store(float* p) const { __builtin_memcpy(p, &value, sizeof value); }
  inline void store(float* p, int64_t lanes) const {
    for (int64_t i = 0; i < lanes; ++i) p[i] = value[i];
  }
  inline void multiply_add(Vector a, Vector b) { value += a.value * b.value; }
  inline void relu() { value = value < 0.0f ? Lanes{} : value; }
  inline void at_most(Vector most) { value = value > most.value ? most.value : value; }
  inline void maximum(Vector other) {
    value = ((other.value > value) | (other.value != other.value)) ? other.value : value;
  }
  inline void add(Vector other) { value += other.value; }
  inline void subtract(Vector other) { value -= other.value; }
  // A NaN is neither positive nor not.
  inline void drop_where_not_positive(Vector other) {
    value = other.value <= 0.0f ? Lanes{} : value;
  }
  // A NaN in `a` equals everything.
  inline void drop_where_equal(Vector a, Vector b) {
    value = ((a.value == b.value) | (a.value != a.value)) ? Lanes{} : value;
  }
  inline void at_least(Vector least) { value = value < least.value ? least.value : value; }
  inline void multiply(Vector other) { value *= other.value; }
  inline void divide(Vector other) { value /= other.value; }
  // Two to the power in the lowest bits.
  inline Vector power_of_two() const {
    typedef uint32_t Words __attribute__((vector_size(16)));
    return Vector{(Lanes)(((Words)value << 23) + (127u << 23))};
  }
  inline void scale(float factor) { value *= factor; }
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

const UkernelTable<Element> kScalarTable =
    table_of({"scalar", Vector::kLanes, {0, 9, 6, 4}}, kConvTile);

static constexpr WeightGradientFunction kWeightGradient[kMaxTileVectors + 1][kMaxTilePixels + 1] = {
    {},
    {THRESHNET_FAST_GRADIENT_ROW_6(1)},
    {THRESHNET_FAST_GRADIENT_ROW_6(2)},
};

const TrainingTable kScalarTraining = training_table_of(kWeightGradient);

int64_t peak_loop_scalar() {
  constexpr int64_t kSums = 12;
  // What the micro-kernels without a named instruction set compute with.
  typedef float Lanes __attribute__((vector_size(16)));
  const float factor_value = hidden(kFactor);
  const float term_value = hidden(kTerm);
  const Lanes factor = {factor_value, factor_value, factor_value, factor_value};
  const Lanes term = {term_value, term_value, term_value, term_value};
  Lanes sums[kSums];
  for (Lanes& sum : sums) sum = term;
  for (int64_t i = 0; i < kIterations; ++i) {
    for (Lanes& sum : sums) sum = sum * factor + term;
  }
  for (int64_t s = 1; s < kSums; ++s) sums[0] += sums[s];
  hidden(sums[0][0] + sums[0][1] + sums[0][2] + sums[0][3]);
  return 2 * 4 * kSums * kIterations;
}

}  // namespace threshnet_fast::cpu
