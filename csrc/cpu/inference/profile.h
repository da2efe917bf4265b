// What the steps of a program take.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "program.h"

namespace threshnet_fast::cpu {

// Nanoseconds of a step of the description: of transforming its inputs in a step before, of the
// step itself, and of adding up its partial sums in a step behind. What a program has not is 0.
constexpr int64_t kStepParts = 3;
using StepTime = std::array<int64_t, kStepParts>;

// Runs a program as `run` does; returns the times of the description's steps, in its order. A step
// lasts from the end of the one before it to the end of its own last task.
std::vector<StepTime> profile(const Program& program, const float* packed, float* workspace,
                              const Binding& binding, int64_t threads, ParallelFor parallel_for);

}  // namespace threshnet_fast::cpu
