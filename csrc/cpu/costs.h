// What convolution takes on the processors that the micro-kernels are for, so that the compiler can
// choose every layer's algorithm. Measured once for each kind (docs/performance.md).
#pragma once

#include <cstdint>

#include "cpu/ukernels/ukernels.h"

namespace threshnet_fast::cpu {

// Of one thread, in nanoseconds.
struct Costs {
  double products;             // products that the micro-kernels add up in one
  double weight_bytes;         // bytes of weights that arrive from memory in one
  double winograd_2x2_input;   // to transform a vector of channels of a tile's inputs
  double winograd_2x2_output;  // and of its products
  double winograd_4x4_input;
  double winograd_4x4_output;
  double step;  // until all threads have begun another step
};

inline Costs costs_of(int64_t isa) {
  switch (isa) {
    case kAvx512Bf16:
      return {250, 25, 10, 9, 25, 28, 1000};
    case kAvx512:
      return {130, 25, 13, 9, 31, 28, 1000};
    case kAvx2:
      return {65, 25, 10, 8, 35, 29, 1000};
    case kNeon:
      return {5, 3, 40, 25, 120, 90, 2000};
    default:
      return {25, 20, 12, 8, 35, 29, 1000};
  }
}

}  // namespace threshnet_fast::cpu
