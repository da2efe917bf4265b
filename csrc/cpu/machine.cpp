#include "machine.h"

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstring>
#include <vector>

#include "cpu/ukernels/ukernels.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace threshnet_fast::cpu {
namespace {

constexpr int64_t kRounds = 20;
constexpr int64_t kRoundNanoseconds = 8'000'000;
constexpr int64_t kIterations = 1024;
constexpr int64_t kLoopsPerWindow = 32;
constexpr int64_t kFloatsPerWindow = 1 << 18;

// A value that the compiler cannot know.
float hidden(float value) {
  volatile float place = value;
  return place;
}

// Neither sum * kFactor + kTerm nor sum + kFactor * kTerm, again and again, meets a denormal
// number.
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

__attribute__((target("avx512f,avx512bf16"))) int64_t loop_avx512_bf16() {
  constexpr int64_t kSums = 16;
  // A pair of bfloat16 in each lane, 0.25 both.
  const __m512bh factor = (__m512bh)_mm512_set1_epi32(0x3e803e80);
  __m512 sums[kSums];
  for (__m512& sum : sums) sum = _mm512_set1_ps(hidden(kTerm));
  for (int64_t i = 0; i < kIterations; ++i) {
    for (__m512& sum : sums) sum = _mm512_dpbf16_ps(sum, factor, factor);
  }
  for (int64_t s = 1; s < kSums; ++s) sums[0] = _mm512_add_ps(sums[0], sums[s]);
  float lanes[16];
  _mm512_storeu_ps(lanes, sums[0]);
  for (const float lane : lanes) hidden(lane);
  return 2 * 32 * kSums * kIterations;
}
#elif defined(__aarch64__)
int64_t loop_neon() {
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
#endif

PeakLoop peak_loop(int64_t isa) {
#if defined(__x86_64__) || defined(_M_X64)
  if (isa == kAvx512Bf16) return loop_avx512_bf16;
  if (isa == kAvx512) return loop_avx512;
  if (isa == kAvx2) return loop_avx2;
#elif defined(__aarch64__)
  if (isa == kNeon) return loop_neon;
#endif
  (void)isa;
  return loop_scalar;
}

// Work that one thread did in windows of time, one after the other.
struct alignas(64) Log {
  std::vector<int64_t> times;  // beginning of the first window, end of each
  std::vector<double> work;    // done by then

  void start() {
    times.assign(1, now_nanoseconds());
    work.assign(1, 0.0);
  }
  void add(double amount) {
    work.push_back(work.back() + amount);
    times.push_back(now_nanoseconds());
  }
  double done_at(int64_t time) const {
    const auto next = std::upper_bound(times.begin(), times.end(), time);
    if (next == times.begin()) return 0.0;
    if (next == times.end()) return work.empty() ? 0.0 : work.back();
    const int64_t window = next - times.begin() - 1;
    const double part = static_cast<double>(time - times[window]) /
                        static_cast<double>(times[window + 1] - times[window]);
    return work[window] + part * (work[window + 1] - work[window]);
  }
};

// The most work that all threads together did, a second, during a window of one of them. Other
// processes take processors away for much longer than a window, so that it is enough if all threads
// run at the same time once; threads that a pool runs one after the other are never added up.
double best_rate(const std::vector<Log>& logs) {
  double best = 0.0;
  for (const Log& log : logs) {
    for (size_t window = 1; window < log.times.size(); ++window) {
      const int64_t begin = log.times[window - 1];
      const int64_t end = log.times[window];
      if (end == begin) continue;
      double work = 0.0;
      for (const Log& other : logs) work += other.done_at(end) - other.done_at(begin);
      best = std::max(best, 1e9 * work / static_cast<double>(end - begin));
    }
  }
  return best;
}

}  // namespace

int64_t now_nanoseconds() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

double measure_peak(int64_t isa, int64_t threads, ParallelFor parallel_for) {
  struct Context {
    PeakLoop loop;
    std::vector<Log> logs;
  } context{peak_loop(isa), {}};
  double best = 0.0;
  for (int64_t round = 0; round < kRounds; ++round) {
    context.logs.assign(threads, Log());
    parallel_for(
        threads,
        [](void* opaque, int64_t begin, int64_t) {
          Context& context = *static_cast<Context*>(opaque);
          Log& log = context.logs[begin];
          log.start();
          while (log.times.back() < log.times.front() + kRoundNanoseconds) {
            int64_t operations = 0;
            for (int64_t i = 0; i < kLoopsPerWindow; ++i) operations += context.loop();
            log.add(static_cast<double>(operations));
          }
        },
        &context);
    best = std::max(best, best_rate(context.logs));
  }
  return best;
}

double measure_bandwidth(const float* data, int64_t count, int64_t threads,
                         ParallelFor parallel_for) {
  struct Context {
    const float* data;
    int64_t count, threads;
    std::vector<Log> logs;
  } context{data, count, threads, {}};
  double best = 0.0;
  for (int64_t round = 0; round < kRounds; ++round) {
    context.logs.assign(threads, Log());
    parallel_for(
        threads,
        [](void* opaque, int64_t begin, int64_t end) {
          Context& context = *static_cast<Context*>(opaque);
          Log& log = context.logs[begin];
          log.start();
          const int64_t last = context.count * end / context.threads;
          for (int64_t first = context.count * begin / context.threads; first < last;) {
            const int64_t next = std::min(first + kFloatsPerWindow, last);
            // As integers: no compiler may change the order of floating-point sums, and one after
            // the other they are slower than the memory.
            uint32_t sum = 0;
            for (int64_t i = first; i < next; ++i) {
              uint32_t bits;
              std::memcpy(&bits, context.data + i, sizeof bits);
              sum += bits;
            }
            hidden(static_cast<float>(sum));
            log.add(static_cast<double>((next - first) * static_cast<int64_t>(sizeof(float))));
            first = next;
          }
        },
        &context);
    best = std::max(best, best_rate(context.logs));
  }
  return best;
}

}  // namespace threshnet_fast::cpu
