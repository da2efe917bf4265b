#include "profile.h"

#include <algorithm>

#include "cpu/machine.h"

namespace threshnet_fast::cpu {
namespace {

int64_t step_count(const Program& program) {
  int64_t count = 0;
  for (int64_t i = 0; i < program.header().step_count; ++i) count += is_planned(program.step(i));
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
                                context.ends[thread * context.steps + step] = now_nanoseconds();
                              },
                              &context};
  int64_t before = now_nanoseconds();
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

}  // namespace threshnet_fast::cpu
