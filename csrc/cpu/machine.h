// What the processor could do at best. Free of torch.
#pragma once

#include <cstdint>

#include "parallel_for.h"

namespace threshnet_fast::cpu {

// Of a clock that only goes forward.
int64_t now_nanoseconds();

// Floating-point operations a second that threads reach together in a loop of nothing but
// multiply-adds on registers, by the instructions that the micro-kernels of `isa` use.
double measure_peak(int64_t isa, int64_t threads, ParallelFor parallel_for);

// Bytes a second that threads reach together in reading an array from end to end.
double measure_bandwidth(const float* data, int64_t count, int64_t threads,
                         ParallelFor parallel_for);

}  // namespace threshnet_fast::cpu
