#include <algorithm>
#include <cstring>

#include "steps.h"
#include "windows.h"

namespace threshnet_fast::cpu {
namespace {

// Where the taps of a window lie in a patch: rows of normalised pixels with a ring of zeros.
struct Layout {
  int64_t channels;  // between taps' weights, padded to whole vectors
  int64_t row;       // floats between a patch's rows
  int64_t ring;      // floats before the first pixel of a row
  std::vector<int64_t> offsets, weight_offsets;

  Layout(const Window& window, int64_t map_channels)
      : channels(round_up(map_channels, 16)),
        row((window.width + 2 * window.padding) * map_channels),
        ring(window.padding * map_channels) {
    for (int64_t tap = 0; tap < window.taps(); ++tap) {
      offsets.push_back(tap / window.kernel_width * row + tap % window.kernel_width * map_channels);
      weight_offsets.push_back(tap * channels);
    }
  }
};

// [tap][channel], and a row of zeros after them.
void pack(const float* weight, const WeightStrides& strides, const Window& window, int64_t channels,
          const Layout& layout, float* packed) {
  std::memset(packed, 0, (window.taps() + 1) * layout.channels * sizeof(float));
  for (int64_t tap = 0; tap < window.taps(); ++tap) {
    const float* const from = weight + tap / window.kernel_width * strides.row +
                              tap % window.kernel_width * strides.column;
    for (int64_t c = 0; c < channels; ++c)
      packed[tap * layout.channels + c] = from[c * strides.output];
  }
}

// Normalises rows [first, last) of an image, some of which may lie beyond it, into a patch.
void load(const TrainingTable& table, const Window& window, const MapSegment& input,
          const Prologue& prologue, int64_t image, int64_t first, int64_t last,
          const Layout& layout, float* patch) {
  for (int64_t y = first; y < last; ++y, patch += layout.row) {
    if (y < 0 || y >= window.height) {
      std::memset(patch, 0, layout.row * sizeof(float));
      continue;
    }
    std::memset(patch, 0, layout.ring * sizeof(float));
    std::memset(patch + layout.row - layout.ring, 0, layout.ring * sizeof(float));
    const int64_t pixel = (image * window.height + y) * window.width;
    table.normalize({input.data + pixel * input.pitch, input.pitch}, prologue, window.width,
                    input.channels, {patch + layout.ring, input.channels});
  }
}

struct ForwardPlan {
  Layout layout;
  RowBands bands;
  int64_t packed_floats, moment_floats, patch_floats;

  explicit ForwardPlan(const DepthwiseForward& step)
      : layout(step.window, step.input.channels),
        bands(step.window.batch, step.window.output_height(), step.window.stride * layout.row, 1),
        packed_floats((step.window.taps() + 1) * layout.channels),
        moment_floats(round_up(bands.count() * 3 * step.input.channels, 16)) {
    const Window& window = step.window;
    const int64_t rows = (bands.most_rows() - 1) * window.stride + window.kernel_height;
    patch_floats = round_up(rows * layout.row, 16);
  }
};

struct BackwardPlan {
  Layout layout;
  RowBands bands;
  int64_t packed_floats, sum_floats, partial_floats;
  int64_t patch_floats, gradient_floats;

  explicit BackwardPlan(const DepthwiseBackward& step)
      : layout(step.window, step.input.channels),
        bands(step.window.batch, step.window.height, 2 * layout.row, 2 * step.window.kernel_height),
        packed_floats((step.window.taps() + 1) * layout.channels),
        sum_floats(round_up(2 * step.input.channels, 16)),
        partial_floats(step.weight_gradient == nullptr ? 0 : step.window.taps() * layout.channels) {
    const Window& window = step.window;
    const int64_t rows = bands.most_rows();
    patch_floats = round_up(ReachingRows::most_inputs(window, rows) * layout.row, 16);
    gradient_floats = round_up(
        ReachingRows::most_outputs(window, rows) * window.output_width() * step.input.channels, 16);
  }

  int64_t scratch_floats() const { return 2 * patch_floats + gradient_floats; }
};

}  // namespace

int64_t workspace_floats(const DepthwiseForward& step, const Workers& workers) {
  const ForwardPlan plan(step);
  return plan.packed_floats + plan.moment_floats + workers.threads * plan.patch_floats;
}

void depthwise_forward(const DepthwiseForward& step, float* workspace, const Workers& workers) {
  const TrainingTable& training = training_table(workers.isa);
  const UkernelTable<float>& table = ukernel_table<float>(workers.isa);
  const Window& window = step.window;
  const ForwardPlan plan(step);
  const Layout& layout = plan.layout;
  const int64_t channels = step.input.channels, width = window.output_width();
  float* const packed = workspace;
  float* const moments = packed + plan.packed_floats;
  float* const patches = moments + plan.moment_floats;
  pack(step.weight, step.strides, window, channels, layout, packed);
  for_each_task(plan.bands.count(), workers, [&](int64_t task, int64_t worker) {
    const RowBand band = plan.bands[task];
    float* const patch = patches + worker * plan.patch_floats;
    const int64_t top = band.first * window.stride - window.padding;
    load(training, window, step.input, step.prologue, band.image, top,
         (band.last - 1) * window.stride - window.padding + window.kernel_height, layout, patch);
    const int64_t pixel = (band.image * window.output_height() + band.first) * width;
    float* const output = step.output + pixel * step.output_pitch;
    for (int64_t y = 0; y < band.last - band.first; ++y) {
      DepthwiseRow<float> row;
      row.input = patch + y * window.stride * layout.row;
      row.weights = packed;
      row.input_offsets = layout.offsets.data();
      row.weight_offsets = layout.weight_offsets.data();
      row.taps = window.taps();
      row.bias = packed + window.taps() * layout.channels;
      row.output = output + y * width * step.output_pitch;
      row.pixels = width;
      row.input_step = window.stride * channels;
      row.output_step = step.output_pitch;
      row.channels = channels;
      row.activation = kIdentity;
      table.depthwise(row);
    }
    if (step.statistics.mean == nullptr) return;
    float* const origin = moments + task * 3 * channels;
    std::memcpy(origin, output, channels * sizeof(float));
    std::memset(origin + channels, 0, 2 * channels * sizeof(float));
    training.moments({output, step.output_pitch}, origin, (band.last - band.first) * width,
                     channels, origin + channels, channels);
  });
  if (step.statistics.mean == nullptr) return;
  std::vector<int64_t> counts;
  for (int64_t task = 0; task < plan.bands.count(); ++task)
    counts.push_back((plan.bands[task].last - plan.bands[task].first) * width);
  combine_moments(moments, counts, channels, 0, channels, step.statistics);
}

int64_t workspace_floats(const DepthwiseBackward& step, const Workers& workers) {
  const BackwardPlan plan(step);
  return plan.packed_floats + plan.bands.count() * (plan.sum_floats + plan.partial_floats) +
         workers.threads * plan.scratch_floats();
}

void depthwise_backward(const DepthwiseBackward& step, float* workspace, const Workers& workers) {
  const TrainingTable& table = training_table(workers.isa);
  const Window& window = step.window;
  const BackwardPlan plan(step);
  const Layout& layout = plan.layout;
  const int64_t channels = step.input.channels, width = window.output_width();
  const int64_t tasks = plan.bands.count();
  float* const packed = workspace;
  float* const all_sums = packed + plan.packed_floats;
  float* const partials = all_sums + tasks * plan.sum_floats;
  float* const scratch = partials + tasks * plan.partial_floats;
  const bool wants_input = step.input_gradient.data != nullptr;
  const bool wants_weight = step.weight_gradient != nullptr;
  pack(step.weight, step.strides, window, channels, layout, packed);
  for_each_task(tasks, workers, [&](int64_t task, int64_t worker) {
    const RowBand band = plan.bands[task];
    const ReachingRows outputs(window, band);
    const int64_t rows = outputs.input_last - outputs.input_first;
    float* const patch = scratch + worker * plan.scratch_floats();
    float* const scattered = patch + plan.patch_floats;
    float* const gradient = scattered + plan.patch_floats;
    float* const partial = partials + task * plan.partial_floats;
    if (wants_weight) {
      std::memset(partial, 0, plan.partial_floats * sizeof(float));
      load(table, window, step.input, step.prologue, band.image, outputs.input_first,
           outputs.input_last, layout, patch);
    }
    if (wants_input) std::memset(scattered, 0, rows * layout.row * sizeof(float));
    for (int64_t y = outputs.first; y < outputs.last; ++y) {
      const int64_t pixel = (band.image * window.output_height() + y) * width;
      float* const row_gradient = gradient + (y - outputs.first) * width * channels;
      table.map_gradient({step.gradient.data + pixel * step.gradient.pitch, step.gradient.pitch},
                         {step.output.data + pixel * step.output.pitch, step.output.pitch},
                         step.slope, step.offset, width, channels, {row_gradient, channels});
      const int64_t start = (y * window.stride - window.padding - outputs.input_first) * layout.row;
      DepthwiseGradientRow row;
      row.gradient = row_gradient;
      row.input = patch + start;
      row.weights = packed;
      row.offsets = layout.offsets.data();
      row.weight_pitch = layout.channels;
      row.taps = window.taps();
      row.pixels = width;
      row.gradient_step = channels;
      row.input_step = window.stride * channels;
      row.channels = channels;
      row.input_gradient = wants_input ? scattered + start : nullptr;
      const bool own = y >= outputs.own_first && y < outputs.own_last;
      row.weight_gradient = wants_weight && own ? partial : nullptr;
      table.depthwise_gradient(row);
    }
    if (!wants_input) return;
    float* const sums = all_sums + task * plan.sum_floats;
    std::memset(sums, 0, 2 * channels * sizeof(float));
    for (int64_t y = band.first; y < band.last; ++y) {
      const int64_t pixel = (band.image * window.height + y) * window.width;
      PrologueGradient back;
      back.gradient = {scattered + (y - outputs.input_first) * layout.row + layout.ring, channels};
      back.map = {step.input.data + pixel * step.input.pitch, step.input.pitch};
      back.prologue = step.prologue;
      back.mean = step.mean;
      back.count = window.width;
      back.channels = channels;
      back.output = {step.input_gradient.data + pixel * step.input_gradient.pitch,
                     step.input_gradient.pitch};
      back.accumulate = step.input_gradient.accumulate;
      back.sums = sums;
      back.sums_pitch = channels;
      table.prologue_gradient(back);
    }
  });
  if (wants_input) add_up(all_sums, tasks, plan.sum_floats, 2 * channels, step.sums);
  if (!wants_weight) return;
  float* const total = packed;
  for (int64_t tap = 0; tap < window.taps(); ++tap) {
    add_up(partials + tap * layout.channels, tasks, plan.partial_floats, channels, total);
    float* const to = step.weight_gradient + tap / window.kernel_width * step.gradient_strides.row +
                      tap % window.kernel_width * step.gradient_strides.column;
    for (int64_t c = 0; c < channels; ++c) to[c * step.gradient_strides.output] = total[c];
  }
}

}  // namespace threshnet_fast::cpu
