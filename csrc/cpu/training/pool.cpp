#include <algorithm>
#include <cstring>

#include "steps.h"
#include "windows.h"

namespace threshnet_fast::cpu {
namespace {

// The pixels of the input under one window.
struct Taps {
  std::vector<int64_t> pixels;
  std::vector<int64_t> offsets;
  int64_t count = 0;

  explicit Taps(const Window& window) : pixels(window.taps()), offsets(window.taps()) {}

  // Pixels of the image, and their offsets in floats from its first one.
  void find(const Window& window, int64_t row, int64_t column, int64_t pitch) {
    const int64_t top = row * window.stride - window.padding;
    const int64_t left = column * window.stride - window.padding;
    count = 0;
    const TapRange rows = valid_taps(top, window.height, window.kernel_height);
    const TapRange columns = valid_taps(left, window.width, window.kernel_width);
    for (int64_t ky = rows.begin; ky < rows.end; ++ky) {
      for (int64_t kx = columns.begin; kx < columns.end; ++kx) {
        pixels[count] = (top + ky) * window.width + left + kx;
        offsets[count] = pixels[count] * pitch;
        ++count;
      }
    }
  }
};

RowBands forward_bands(const PoolForward& step) {
  const Window& window = step.window;
  return RowBands(window.batch, window.output_height(), window.output_width() * step.input.channels,
                  1);
}

struct BackwardPlan {
  RowBands bands;
  int64_t sum_floats, scattered_floats, row_floats;

  explicit BackwardPlan(const PoolBackward& step)
      : bands(step.window.batch, step.window.height, step.window.width * step.input.channels,
              2 * step.window.kernel_height),
        sum_floats(round_up(2 * step.input.channels, 16)),
        scattered_floats(round_up(ReachingRows::most_inputs(step.window, bands.most_rows()) *
                                      step.window.width * step.input.channels,
                                  16)),
        row_floats(round_up(step.window.output_width() * step.input.channels, 16)) {}
};

}  // namespace

int64_t workspace_floats(const PoolForward& step) {
  return forward_bands(step).count() * 3 * step.input.channels;
}

void pool_forward(const PoolForward& step, float* workspace, const Workers& workers) {
  const TrainingTable& table = training_table(workers.isa);
  const Window& window = step.window;
  const RowBands bands = forward_bands(step);
  const int64_t channels = step.input.channels, width = window.output_width();
  for_each_task(bands.count(), workers, [&](int64_t task, int64_t) {
    const RowBand band = bands[task];
    Taps taps(window);
    const float* const input =
        step.input.data + band.image * window.input_pixels() * step.input.pitch;
    float* const output = step.output + (band.image * window.output_height() + band.first) * width *
                                            step.output_pitch;
    float* to = output;
    for (int64_t y = band.first; y < band.last; ++y) {
      for (int64_t x = 0; x < width; ++x, to += step.output_pitch) {
        taps.find(window, y, x, step.input.pitch);
        table.max_pool(input, taps.offsets.data(), taps.count, step.prologue, channels, to);
      }
    }
    if (step.statistics.mean == nullptr) return;
    float* const origin = workspace + task * 3 * channels;
    std::memcpy(origin, output, channels * sizeof(float));
    std::memset(origin + channels, 0, 2 * channels * sizeof(float));
    table.moments({output, step.output_pitch}, origin, (band.last - band.first) * width, channels,
                  origin + channels, channels);
  });
  if (step.statistics.mean == nullptr) return;
  std::vector<int64_t> counts;
  for (int64_t task = 0; task < bands.count(); ++task)
    counts.push_back((bands[task].last - bands[task].first) * width);
  combine_moments(workspace, counts, channels, 0, channels, step.statistics);
}

int64_t workspace_floats(const PoolBackward& step, const Workers& workers) {
  const BackwardPlan plan(step);
  return plan.bands.count() * plan.sum_floats +
         workers.threads * (plan.scattered_floats + plan.row_floats);
}

void pool_backward(const PoolBackward& step, float* workspace, const Workers& workers) {
  const TrainingTable& table = training_table(workers.isa);
  const Window& window = step.window;
  const BackwardPlan plan(step);
  const int64_t channels = step.input.channels, width = window.output_width();
  float* const scratch = workspace + plan.bands.count() * plan.sum_floats;
  for_each_task(plan.bands.count(), workers, [&](int64_t task, int64_t worker) {
    const RowBand band = plan.bands[task];
    const ReachingRows outputs(window, band);
    // Rows beyond the band are added to as well, and left there.
    const int64_t top = std::max<int64_t>(outputs.input_first, 0);
    const int64_t rows = std::min(outputs.input_last, window.height) - top;
    Taps taps(window);
    float* const sums = workspace + task * plan.sum_floats;
    float* const scattered = scratch + worker * (plan.scattered_floats + plan.row_floats);
    float* const row = scattered + plan.scattered_floats;
    std::memset(sums, 0, 2 * channels * sizeof(float));
    std::memset(scattered, 0, rows * window.width * channels * sizeof(float));
    const int64_t first_pixel = band.image * window.input_pixels();
    const float* const input = step.input.data + first_pixel * step.input.pitch;
    for (int64_t y = outputs.first; y < outputs.last; ++y) {
      const int64_t pixel = (band.image * window.output_height() + y) * width;
      table.map_gradient({step.gradient.data + pixel * step.gradient.pitch, step.gradient.pitch},
                         {step.output.data + pixel * step.output.pitch, step.output.pitch},
                         step.slope, step.offset, width, channels, {row, channels});
      for (int64_t x = 0; x < width; ++x) {
        taps.find(window, y, x, step.input.pitch);
        for (int64_t i = 0; i < taps.count; ++i)
          taps.pixels[i] = (taps.pixels[i] - top * window.width) * channels;
        table.max_pool_gradient(input, taps.offsets.data(), taps.pixels.data(), taps.count,
                                step.prologue, channels, row + x * channels, scattered);
      }
    }
    const int64_t pixel = band.first * window.width;
    PrologueGradient back;
    back.gradient = {scattered + (band.first - top) * window.width * channels, channels};
    back.map = {input + pixel * step.input.pitch, step.input.pitch};
    back.prologue = step.prologue;
    back.mean = step.mean;
    back.count = (band.last - band.first) * window.width;
    back.channels = channels;
    back.output = {step.input_gradient.data + (first_pixel + pixel) * step.input_gradient.pitch,
                   step.input_gradient.pitch};
    back.accumulate = step.input_gradient.accumulate;
    back.sums = sums;
    back.sums_pitch = channels;
    table.prologue_gradient(back);
  });
  add_up(workspace, plan.bands.count(), plan.sum_floats, 2 * channels, step.sums);
}

}  // namespace threshnet_fast::cpu
