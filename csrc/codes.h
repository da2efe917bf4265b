// Numbers by which Python and C++ call the same things. threshnet_fast/plan/codes.py has the same
// ones. Free of torch and of the standard library.
#pragma once

#include <cstdint>

namespace threshnet_fast {

// What a step of a plan's description is.
enum class PlanStepKind : int64_t {
  kConvolution = 0,
  kPool = 1,
  kDepthwise = 2,
  kPointwise = 3,
  kResize = 4
};

// What follows a sum: nothing, max(x, 0), min(max(x, 0), 6), and behind kRelu6 what pointwise steps
// alone have. A NaN stays a NaN.
enum Activation : int64_t {
  kIdentity = 0,
  kRelu = 1,
  kRelu6 = 2,
  kLeakyRelu = 3,
  kSilu = 4,
  kHardswish = 5,
  kSigmoid = 6
};

// Where a pixel of a resized map is taken from.
enum ResizeMode : int64_t { kNearest = 0, kNearestExact = 1, kBilinear = 2 };

namespace cpu {

using threshnet_fast::Activation;
using threshnet_fast::kIdentity;
using threshnet_fast::kRelu;
using threshnet_fast::kRelu6;

// A kind of micro-kernels, by the instructions that they use; ukernels/kinds.cpp has what belongs
// to each. All compute in float32 but the last, which multiplies bfloat16 and adds up in float32.
enum Isa : int64_t { kScalar = 0, kAvx2 = 1, kAvx512 = 2, kNeon = 3, kAvx512Bf16 = 4 };

// How a step of a description is computed.
enum Algorithm : int64_t { kDirect = 0, kPacked = 1, kWinograd2 = 2, kWinograd4 = 3 };

}  // namespace cpu
}  // namespace threshnet_fast
