#include "profile.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <limits>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace threshnet_fast::cpu {
namespace {

constexpr int64_t kRounds = 8;
constexpr int64_t kRoundNanoseconds = 8'000'000;
constexpr int64_t kIterations = 4096;

int64_t now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

// A value that the compiler cannot know.
float hidden(float value) {
  volatile float place = value;
  return place;
}

// Sums that stay near 1, so that no operation meets a denormal number: sum * kFactor + kTerm.
constexpr float kFactor = 0.75f;
constexpr float kTerm = 0.25f;

// Each loop runs kIterations times over as many independent sums as hide the latency of an
// operation and fit in registers, and returns its floating-point operations.
using PeakLoop = int64_t (*)();

int64_t loop_scalar() {
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

#if defined(__x86_64__) || defined(_M_X64)
__attribute__((target("avx2,fma"))) int64_t loop_avx2() {
  constexpr int64_t kSums = 12;
  const __m256 factor = _mm256_set1_ps(hidden(kFactor));
  const __m256 term = _mm256_set1_ps(hidden(kTerm));
  __m256 sums[kSums];
  for (__m256& sum : sums) sum = term;
  for (int64_t i = 0; i < kIterations; ++i) {
    for (__m256& sum : sums) sum = _mm256_fmadd_ps(sum, factor, term);
  }
  for (int64_t s = 1; s < kSums; ++s) sums[0] = _mm256_add_ps(sums[0], sums[s]);
  float lanes[8];
  _mm256_storeu_ps(lanes, sums[0]);
  for (const float lane : lanes) hidden(lane);
  return 2 * 8 * kSums * kIterations;
}

__attribute__((target("avx512f"))) int64_t loop_avx512() {
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
#endif

PeakLoop peak_loop(int64_t isa) {
#if defined(__x86_64__) || defined(_M_X64)
  if (isa == kAvx512) return loop_avx512;
  if (isa == kAvx2) return loop_avx2;
#endif
  (void)isa;
  return loop_scalar;
}

// Work that one thread did, and when.
struct alignas(64) Share {
  int64_t begin = std::numeric_limits<int64_t>::max();
  int64_t end = std::numeric_limits<int64_t>::min();
  int64_t work = 0;
};

// The work of all threads a second: that of all in the time from the first one's beginning to the
// last one's end, which holds however many threads there really are.
double rate(const std::vector<Share>& shares) {
  Share total;
  for (const Share& share : shares) {
    total.begin = std::min(total.begin, share.begin);
    total.end = std::max(total.end, share.end);
    total.work += share.work;
  }
  return 1e9 * static_cast<double>(total.work) /
         static_cast<double>(std::max<int64_t>(total.end - total.begin, 1));
}

int64_t step_count(const Program& program) {
  int64_t count = 0;
  for (int64_t i = 0; i < program.header().step_count; ++i) {
    const int64_t kind = program.step(i).kind;
    count += kind == kConvolution || kind == kPool;
  }
  return count;
}

}  // namespace

std::vector<StepTime> profile(const Program& program, const float* packed, float* workspace,
                              const Binding& binding, int64_t threads, ParallelFor parallel_for) {
  const int64_t steps = program.header().step_count;
  struct Context {
    std::vector<int64_t> ends;  // [thread][step]: when its last task was over, 0: it did none
    int64_t steps;
  } context{std::vector<int64_t>(threads * steps), steps};
  const TaskObserver observer{[](void* opaque, int64_t step, int64_t thread) {
                                Context& context = *static_cast<Context*>(opaque);
                                context.ends[thread * context.steps + step] = now();
                              },
                              &context};
  int64_t before = now();
  run(program, packed, workspace, binding, threads, parallel_for, &observer);

  std::vector<StepTime> times(step_count(program));
  int64_t index = 0;
  for (int64_t i = 0; i < steps; ++i) {
    int64_t end = before;
    for (int64_t thread = 0; thread < threads; ++thread)
      end = std::max(end, context.ends[thread * steps + i]);
    const int64_t taken = end - before;
    before = end;
    switch (program.step(i).kind) {
      case kTransform:
        times[index][0] += taken;
        break;
      case kReduction:
        times[index - 1][2] += taken;
        break;
      default:
        times[index++][1] += taken;
    }
  }
  return times;
}

double measure_peak(int64_t isa, int64_t threads, ParallelFor parallel_for) {
  struct Context {
    PeakLoop loop;
    std::vector<Share> shares;
  } context{peak_loop(isa), {}};
  double best = 0.0;
  for (int64_t round = 0; round < kRounds; ++round) {
    context.shares.assign(threads, Share());
    parallel_for(
        threads,
        [](void* opaque, int64_t begin, int64_t) {
          Context& context = *static_cast<Context*>(opaque);
          Share share;
          share.begin = share.end = now();
          for (; share.end < share.begin + kRoundNanoseconds; share.end = now())
            share.work += context.loop();
          context.shares[begin] = share;
        },
        &context);
    best = std::max(best, rate(context.shares));
  }
  return best;
}

double measure_bandwidth(const float* data, int64_t count, int64_t threads,
                         ParallelFor parallel_for) {
  struct Context {
    const float* data;
    int64_t count, threads;
    std::vector<Share> shares;
  } context{data, count, threads, {}};
  double best = 0.0;
  for (int64_t round = 0; round < kRounds; ++round) {
    context.shares.assign(threads, Share());
    parallel_for(
        threads,
        [](void* opaque, int64_t begin, int64_t end) {
          Context& context = *static_cast<Context*>(opaque);
          const int64_t first = context.count * begin / context.threads;
          const int64_t last = context.count * end / context.threads;
          Share share;
          share.begin = now();
          // As integers: no compiler may change the order of floating-point sums, and one after
          // the other they are slower than the memory.
          uint32_t sum = 0;
          for (int64_t i = first; i < last; ++i) {
            uint32_t bits;
            std::memcpy(&bits, context.data + i, sizeof bits);
            sum += bits;
          }
          hidden(static_cast<float>(sum));
          share.end = now();
          share.work = (last - first) * static_cast<int64_t>(sizeof(float));
          context.shares[begin] = share;
        },
        &context);
    best = std::max(best, rate(context.shares));
  }
  return best;
}

}  // namespace threshnet_fast::cpu
