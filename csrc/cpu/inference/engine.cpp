#include <algorithm>
#include <vector>

#include "channelwise.h"
#include "cpu/fetch.h"
#include "cpu/team.h"
#include "cpu/ukernels/kinds.h"
#include "direct.h"
#include "gathered.h"
#include "image.h"
#include "operands.h"
#include "pointwise.h"
#include "program.h"
#include "resize.h"
#include "winograd.h"

namespace threshnet_fast::cpu {
namespace {

template <typename Element>
class Engine {
 public:
  Engine(const Program& program, const float* packed, float* workspace, const Binding& binding)
      : operands_(program, packed, workspace, binding),
        scratch_(operands_.partials + program.header().partial_floats) {}

  void run(int64_t step_index, int64_t task, int64_t thread) const {
    const Program& program = operands_.program;
    const Step& step = program.step(step_index);
    float* scratch = scratch_ + thread * program.header().scratch_floats;
    switch (step.kind) {
      case kPool:
        return pool(operands_, step, task, scratch);
      case kReduction:
        return direct_.reduce(step, task);
      case kTransform: {
        const BlockRange tiles(step.pixel_count, task, step.block_count);
        return winograd_.transform(step, tiles.first, tiles.count(), scratch);
      }
      case kDepthwise:
        return depthwise(operands_, step, task, scratch);
      case kPointwise:
        return pointwise(operands_, step, task, scratch);
      case kResize:
        return resize(operands_, step, task, scratch);
      default:
        return convolve(step, task, scratch);
    }
  }

 private:
  void convolve(const Step& step, int64_t task, float* scratch) const {
    const int64_t split = task % step.split_count;
    const int64_t block = task / step.split_count % step.block_count;
    const int64_t group = task / step.split_count / step.block_count;
    const Panel* panels = operands_.panels_of(step);
    const BlockRange range(step.pixel_count, block, step.block_count);
    const int64_t first_pixel = range.first, pixels = range.count();
    const int64_t first_panel = group * step.group_panels;
    const int64_t last_panel = std::min(first_panel + step.group_panels, step.panel_count);
    if (step.winograd == kWinogradInTask) {
      winograd_.convolve(step, first_pixel, pixels, scratch);
    } else if (step.winograd == kWinogradInSteps) {
      for (int64_t p = first_panel; p < last_panel; ++p)
        winograd_.multiply(step, panels[p], first_pixel, pixels, scratch);
    } else if (step.packs == kImageRows) {
      image_.convolve(step, first_pixel, pixels, scratch);
    } else if (step.packs == kWindows) {
      Element* const rows = elements_at<Element>(scratch);
      gathered_.gather(step, first_pixel, pixels, rows);
      Fetching next = gathered_.next_block(step, first_pixel + pixels, pixels);
      for (int64_t p = first_panel; p < last_panel; ++p)
        gathered_.convolve(step, panels[p], first_pixel, pixels, rows, next);
    } else {
      for (int64_t p = first_panel; p < last_panel; ++p)
        direct_.convolve(step, p, p == first_panel, split, first_pixel, pixels, scratch);
    }
  }

  const Operands<Element> operands_;
  float* const scratch_;
  const WinogradConvolution<Element> winograd_{operands_};
  const ImageConvolution<Element> image_{operands_};
  const GatheredConvolution<Element> gathered_{operands_};
  const DirectConvolution<Element> direct_{operands_};
};

}  // namespace

static int64_t task_count(const Step& step) {
  const int64_t tasks = step.block_count * step.group_count;
  return step.kind == kConvolution ? tasks * step.split_count : tasks;
}

template <typename Element>
static void run_elements(const Program& program, const float* packed, float* workspace,
                         const Binding& binding, int64_t threads, ParallelFor parallel_for,
                         const TaskObserver* observer) {
  const ProgramHeader& header = program.header();
  std::vector<int64_t> tasks;
  for (int64_t i = 0; i < header.step_count; ++i) tasks.push_back(task_count(program.step(i)));
  const Engine<Element> engine(program, packed, workspace, binding);
  run_team(threads, parallel_for, tasks, [&](int64_t step, int64_t task, int64_t thread) {
    engine.run(step, task, thread);
    if (observer != nullptr) observer->finished(observer->context, step, thread);
  });
}

void run(const Program& program, const float* packed, float* workspace, const Binding& binding,
         int64_t threads, ParallelFor parallel_for, const TaskObserver* observer) {
  with_element(kind_of(program.header().isa)->dtype, [&](auto element) {
    run_elements<decltype(element)>(program, packed, workspace, binding, threads, parallel_for,
                                    observer);
  });
}

}  // namespace threshnet_fast::cpu
