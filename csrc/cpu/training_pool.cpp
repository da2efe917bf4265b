#include <algorithm>
#include <cstring>

#include "training.h"

namespace threshnet_fast::cpu {
namespace {

// The pixels of the input under one window.
struct Taps {
  std::vector<int64_t> offsets;
  int64_t count = 0;

  explicit Taps(const Window& window) : offsets(window.taps()) {}

  // Offsets in floats from the image's first pixel.
  void find(const Window& window, int64_t pixel, int64_t pitch) {
    const int64_t top = pixel / window.output_width() * window.stride - window.padding;
    const int64_t left = pixel % window.output_width() * window.stride - window.padding;
    count = 0;
    for (int64_t y = std::max<int64_t>(top, 0);
         y < std::min(top + window.kernel_height, window.height); ++y) {
      for (int64_t x = std::max<int64_t>(left, 0);
           x < std::min(left + window.kernel_width, window.width); ++x)
        offsets[count++] = (y * window.width + x) * pitch;
    }
  }
};

// Calls body(image, worker) for all images, which are divided between the threads.
template <typename Body>
void for_each_image(const Window& window, const Workers& workers, const Body& body) {
  struct Context {
    int64_t images, workers;
    const Body& body;
  } context{window.batch, workers.threads, body};
  workers.parallel_for(
      workers.threads,
      [](void* opaque, int64_t begin, int64_t end) {
        const Context& context = *static_cast<Context*>(opaque);
        for (int64_t worker = begin; worker < end; ++worker) {
          const int64_t last = context.images * (worker + 1) / context.workers;
          for (int64_t image = context.images * worker / context.workers; image < last; ++image)
            context.body(image, worker);
        }
      },
      &context);
}

}  // namespace

int64_t workspace_floats(const PoolForward& step) {
  return step.window.batch * 3 * step.input.channels;
}

void pool_forward(const PoolForward& step, float* workspace, const Workers& workers) {
  const TrainingTable& table = training_table(workers.isa);
  const Window& window = step.window;
  const int64_t channels = step.input.channels;
  for_each_image(window, workers, [&](int64_t image, int64_t) {
    Taps taps(window);
    const float* const input = step.input.data + image * window.input_pixels() * step.input.pitch;
    float* const output = step.output + image * window.output_pixels() * step.output_pitch;
    for (int64_t pixel = 0; pixel < window.output_pixels(); ++pixel) {
      taps.find(window, pixel, step.input.pitch);
      table.max_pool(input, taps.offsets.data(), taps.count, step.prologue, channels,
                     output + pixel * step.output_pitch);
    }
    if (step.statistics.mean == nullptr) return;
    float* const origin = workspace + image * 3 * channels;
    std::memcpy(origin, output, channels * sizeof(float));
    std::memset(origin + channels, 0, 2 * channels * sizeof(float));
    table.moments({output, step.output_pitch}, origin, window.output_pixels(), channels,
                  origin + channels, channels);
  });
  if (step.statistics.mean == nullptr) return;
  const std::vector<int64_t> counts(window.batch, window.output_pixels());
  combine_moments(workspace, counts, channels, 0, channels, step.statistics);
}

int64_t workspace_floats(const PoolBackward& step, const Workers& workers) {
  const int64_t channels = step.input.channels;
  return step.window.batch * round_up(2 * channels, 16) +
         workers.threads * (round_up(step.window.input_pixels() * channels, 16) + channels);
}

void pool_backward(const PoolBackward& step, float* workspace, const Workers& workers) {
  const TrainingTable& table = training_table(workers.isa);
  const Window& window = step.window;
  const int64_t channels = step.input.channels;
  const int64_t sum_floats = round_up(2 * channels, 16);
  const int64_t scattered_floats = round_up(window.input_pixels() * channels, 16);
  float* const scratch = workspace + window.batch * sum_floats;
  for_each_image(window, workers, [&](int64_t image, int64_t worker) {
    Taps taps(window);
    std::vector<int64_t> scattered_offsets(window.taps());
    float* const sums = workspace + image * sum_floats;
    float* const scattered = scratch + worker * (scattered_floats + channels);
    float* const row = scattered + scattered_floats;
    std::memset(sums, 0, 2 * channels * sizeof(float));
    std::memset(scattered, 0, scattered_floats * sizeof(float));
    const int64_t first = image * window.output_pixels();
    const float* const input = step.input.data + image * window.input_pixels() * step.input.pitch;
    for (int64_t pixel = 0; pixel < window.output_pixels(); ++pixel) {
      table.map_gradient(
          {step.gradient.data + (first + pixel) * step.gradient.pitch, step.gradient.pitch},
          {step.output.data + (first + pixel) * step.output.pitch, step.output.pitch}, step.slope,
          step.offset, 1, channels, {row, channels});
      taps.find(window, pixel, step.input.pitch);
      for (int64_t i = 0; i < taps.count; ++i)
        scattered_offsets[i] = taps.offsets[i] / step.input.pitch * channels;
      table.max_pool_gradient(input, taps.offsets.data(), scattered_offsets.data(), taps.count,
                              step.prologue, channels, row, scattered);
    }
    PrologueGradient back;
    back.gradient = {scattered, channels};
    back.map = {input, step.input.pitch};
    back.prologue = step.prologue;
    back.mean = step.mean;
    back.count = window.input_pixels();
    back.channels = channels;
    back.output = {
        step.input_gradient.data + image * window.input_pixels() * step.input_gradient.pitch,
        step.input_gradient.pitch};
    back.accumulate = step.input_gradient.accumulate;
    back.sums = sums;
    back.sums_pitch = channels;
    table.prologue_gradient(back);
  });
  for (int64_t c = 0; c < 2 * channels; ++c) {
    double sum = 0;
    for (int64_t image = 0; image < window.batch; ++image) sum += workspace[image * sum_floats + c];
    step.sums[c] = static_cast<float>(sum);
  }
}

}  // namespace threshnet_fast::cpu
