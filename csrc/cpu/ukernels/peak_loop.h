// What the loops are made of that find the most floating-point operations a processor can do: each
// instruction set's source file has one. Free of torch and of the standard library, as ukernels.h
// is.
#pragma once

#include <cstdint>

namespace threshnet_fast::cpu {

using PeakLoop = int64_t (*)();

int64_t peak_loop_scalar();
#if defined(__x86_64__) || defined(_M_X64)
int64_t peak_loop_avx2();
int64_t peak_loop_avx512();
int64_t peak_loop_avx512_bf16();
#elif defined(__aarch64__)
int64_t peak_loop_neon();
#endif

namespace {

// A loop runs kIterations times over as many independent sums as hide the latency of an operation
// and fit in registers, and returns its floating-point operations.
constexpr int64_t kIterations = 1024;

// Neither sum * kFactor + kTerm nor sum + kFactor * kTerm, again and again, meets a denormal
// number.
constexpr float kFactor = 0.75f;
constexpr float kTerm = 0.25f;

// A value that the compiler cannot know.
inline float hidden(float value) {
  volatile float place = value;
  return place;
}

}  // namespace
}  // namespace threshnet_fast::cpu
