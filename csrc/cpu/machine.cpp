#include "machine.h"

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstring>
#include <vector>

#include "cpu/ukernels/kinds.h"

namespace threshnet_fast::cpu {
namespace {

constexpr int64_t kRounds = 20;
constexpr int64_t kRoundNanoseconds = 8'000'000;
constexpr int64_t kLoopsPerWindow = 32;
constexpr int64_t kFloatsPerWindow = 1 << 18;

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
  } context{kind_of(isa)->peak_loop, {}};
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
            volatile const uint32_t used = sum;
            (void)used;
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
