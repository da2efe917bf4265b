#include <algorithm>
#include <cstring>

#include "concatenation.h"
#include "cpu/team.h"
#include "products.h"
#include "steps.h"

namespace threshnet_fast::cpu {
namespace {

struct ForwardPlan {
  const UkernelTable<float>& table;
  int64_t input_channels;
  Bands bands;
  Panels panels;
  Convolution convolution;
  int64_t groups;
  int64_t output_pitch;
  int64_t patch, places, scratch;

  ForwardPlan(const ConvolutionForward& step, const Workers& workers)
      : table(ukernel_table<float>(workers.isa)),
        input_channels(channels_of(step.inputs)),
        bands(step.window, scratch_pitch(input_channels),
              round_up(step.output_channels, table.tiling.lanes), scratch_pitch(input_channels),
              workers.threads, table.tiling.tile_pixels[kPanelVectors],
              choose_tile(step.window, input_channels, step.output_channels, step.winograd)),
        panels{input_channels, step.output_channels, packed_taps(bands), table.tiling.lanes},
        convolution(panels, table, bands.tile),
        groups(panel_groups(bands, panels, workers.threads)),
        output_pitch(scratch_pitch(panels.padded_outputs())),
        patch(round_up(patch_floats(bands, input_channels), 16)) {
    const int64_t outputs = divide_up(panels.count(), groups) * panels.first(1);
    places = bands.tile != 0 ? convolution.tile_floats(bands.most_tiles(), outputs)
                             : round_up(most_pixels(bands) * output_pitch, 16);
    scratch = patch + places;
  }

  int64_t packed_floats() const { return panels.floats(); }
  // Of each band: where its sums start from, and those.
  int64_t moment_floats() const { return round_up(bands.count * 3 * panels.outputs, 16); }
};

}  // namespace

int64_t workspace_floats(const ConvolutionForward& step, const Workers& workers) {
  const ForwardPlan plan(step, workers);
  return plan.packed_floats() + plan.moment_floats() + workers.threads * plan.scratch;
}

void convolution_forward(const ConvolutionForward& step, float* workspace, const Workers& workers) {
  const ForwardPlan plan(step, workers);
  const TrainingTable& training = training_table(workers.isa);
  const Panels& panels = plan.panels;
  float* const packed = workspace;
  float* const moments = packed + plan.packed_floats();
  float* const scratch = moments + plan.moment_floats();
  const WeightTaps<const float> weights(step.weight, step.strides, step.window);
  constexpr int64_t kChannelsTogether = 32;

  const auto convolve = [&](int64_t task, int64_t thread) {
    const Band band(plan.bands, task / plan.groups);
    const int64_t first_panel = part_begin(panels.count(), plan.groups, task % plan.groups);
    const int64_t last_panel = part_begin(panels.count(), plan.groups, task % plan.groups + 1);
    float* const memory = scratch + thread * plan.scratch;
    const Patch patch = input_patch(band, plan.input_channels, memory);
    load_inputs(training, step.inputs, step.prologue, 0, plan.input_channels, band, patch);
    const int64_t first = panels.first(first_panel);
    const int64_t channels = std::min(panels.first(last_panel), panels.outputs) - first;
    float* const places = memory + plan.patch;
    FetchList ahead(plan.convolution.words());
    if (plan.bands.fetches_ahead() && task % plan.groups == plan.groups - 1 &&
        task / plan.groups + 1 < plan.bands.count)
      fetch_inputs(step.inputs, 0, plan.input_channels, Band(plan.bands, task / plan.groups + 1),
                   band, ahead);
    ahead.divide(plan.convolution.tile_calls(band, last_panel - first_panel));
    plan.convolution.multiply(
        band, patch, packed, first_panel, last_panel,
        {places, plan.output_pitch, step.output + first, step.output_pitch, places, &ahead});
    if (step.statistics.mean == nullptr) return;
    const Rows rows = {step.output + band.first_pixel() * step.output_pitch + first,
                       step.output_pitch};
    float* const origin = moments + task / plan.groups * 3 * panels.outputs + first;
    std::memcpy(origin, rows.data, channels * sizeof(float));
    float* const sums = origin + panels.outputs;
    std::memset(sums, 0, channels * sizeof(float));
    std::memset(sums + panels.outputs, 0, channels * sizeof(float));
    training.moments(rows, origin, band.pixels(), channels, sums, panels.outputs);
  };

  std::vector<int64_t> counts;
  for (int64_t b = 0; b < plan.bands.count; ++b) counts.push_back(Band(plan.bands, b).pixels());
  const int64_t reductions =
      step.statistics.mean == nullptr ? 0 : divide_up(panels.outputs, kChannelsTogether);
  run_team(workers.threads, workers.parallel_for,
           {panels.count(), plan.bands.count * plan.groups, reductions},
           [&](int64_t stage, int64_t task, int64_t thread) {
             if (stage == 0) {
               pack_panel(panels, task, weights, plan.bands.tile, packed);
             } else if (stage == 1) {
               convolve(task, thread);
             } else {
               combine_moments(moments, counts, panels.outputs, task * kChannelsTogether,
                               std::min((task + 1) * kChannelsTogether, panels.outputs),
                               step.statistics);
             }
           });
}

}  // namespace threshnet_fast::cpu
