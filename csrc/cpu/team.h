// A team of threads that works through a list of steps, each a number of independent tasks.
//
// Nothing here waits for a thread to arrive: a task is claimed by whoever is there, and a step is
// over when its tasks are done. So the team cannot deadlock where the pool gives it fewer threads
// than it asked for, runs them one after the other, or was called from inside a parallel region.
//
// All threads compute in the floating-point mode of the one that made the team, so that a result
// does not depend on which of them did what.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif
#include <sched.h>

#include "float_mode.h"
#include "parallel_for.h"

namespace threshnet_fast::cpu {

// Tells the processor that the thread waits for another one's store.
inline void spin_pause() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield" : : : "memory");
#endif
}

class Team {
 public:
  Team(int64_t threads, const std::vector<int64_t>& tasks)
      : threads_(threads),
        tasks_(tasks),
        float_mode_(float_mode()),
        queues_(new Line[tasks.size() * threads]),
        done_(new Line[tasks.size()]) {
    for (size_t step = 0; step < tasks.size(); ++step) {
      for (int64_t t = 0; t < threads; ++t)
        queue(step, t).store(begin(step, t), std::memory_order_relaxed);
    }
  }

  // Takes part as one thread: calls run(step, task) until the last step is over. Tasks of a
  // thread's own range come first, in the same place of the map in every step, so that what it
  // wrote in one step is in its cache in the next. A task that threw would be waited for without
  // end, so that ends the process.
  template <typename Run>
  void work(int64_t thread, const Run& run) noexcept {
    const FloatModeScope scope(float_mode_);
    for (size_t step = 0; step < tasks_.size(); ++step) {
      int64_t finished = 0;
      for (int64_t i = 0; i < threads_; ++i) {
        const int64_t owner = (thread + i) % threads_;
        const int64_t end = begin(step, owner + 1);
        while (queue(step, owner).load(std::memory_order_relaxed) < end) {
          const int64_t task = queue(step, owner).fetch_add(1, std::memory_order_relaxed);
          if (task >= end) break;
          run(static_cast<int64_t>(step), task);
          ++finished;
        }
      }
      std::atomic<int64_t>& done = done_[step].value;
      if (finished > 0) done.fetch_add(finished, std::memory_order_acq_rel);
      for (int64_t spins = 0; done.load(std::memory_order_acquire) < tasks_[step]; ++spins) {
        if (spins < 4096) {
          spin_pause();
        } else {
          sched_yield();
        }
      }
    }
  }

 private:
  struct alignas(64) Line {
    std::atomic<int64_t> value{0};
  };

  int64_t begin(size_t step, int64_t thread) const { return tasks_[step] * thread / threads_; }
  std::atomic<int64_t>& queue(size_t step, int64_t thread) {
    return queues_[step * threads_ + thread].value;
  }

  int64_t threads_;
  const std::vector<int64_t>& tasks_;
  FloatMode float_mode_;
  std::unique_ptr<Line[]> queues_;
  std::unique_ptr<Line[]> done_;
};

// Works through steps of so many tasks each by body(step, task, thread). The only way in which the
// engine computes on several threads.
template <typename Body>
void run_team(int64_t threads, ParallelFor parallel_for, const std::vector<int64_t>& tasks,
              const Body& body) {
  Team team(threads, tasks);
  struct Context {
    Team& team;
    const Body& body;
  } context{team, body};
  parallel_for(
      threads,
      [](void* opaque, int64_t thread, int64_t) {
        const Context& context = *static_cast<Context*>(opaque);
        context.team.work(thread,
                          [&](int64_t step, int64_t task) { context.body(step, task, thread); });
      },
      &context);
}

}  // namespace threshnet_fast::cpu
