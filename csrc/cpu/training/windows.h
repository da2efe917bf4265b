// How windows that slide over every channel by itself, of pools and of depthwise convolutions, are
// divided into tasks: bands of rows, which depend on the map alone, so that the number of threads
// changes no sum. Free of torch.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/costs.h"
#include "cpu/team.h"
#include "cpu/tiles.h"
#include "steps.h"

namespace threshnet_fast::cpu {

// Rows [first, last) of an image, of all images one after the other.
struct RowBand {
  int64_t image, first, last;
};

struct RowBands {
  int64_t batch, height, parts;

  RowBands(int64_t batch, int64_t height, int64_t row_floats, int64_t least)
      : batch(batch), height(height) {
    const int64_t rows = std::clamp(kWindowFloats / row_floats, std::min(least, height), height);
    parts = divide_up(height, rows);
  }

  int64_t count() const { return batch * parts; }
  int64_t most_rows() const { return divide_up(height, parts); }
  RowBand operator[](int64_t index) const {
    const int64_t part = index % parts;
    return {index / parts, height * part / parts, height * (part + 1) / parts};
  }
};

// The output rows whose windows reach into some rows of the input.
struct ReachingRows {
  int64_t first, last;              // of them
  int64_t own_first, own_last;      // those of them that belong to these rows and to no others
  int64_t input_first, input_last;  // rows of the input and padding that they reach, and these

  ReachingRows(const Window& window, const RowBand& band) {
    const int64_t stride = window.stride, padding = window.padding, kernel = window.kernel_height;
    const int64_t rows = window.output_height();
    first = band.first + padding < kernel ? 0 : (band.first + padding - kernel) / stride + 1;
    last = std::min(divide_up(band.last + padding, stride), rows);
    own_first = divide_up(band.first, stride);
    own_last = band.last == window.height ? rows : std::min(divide_up(band.last, stride), rows);
    input_first = band.first;
    input_last = band.last;
    if (first >= last) return;
    input_first = std::min(input_first, first * stride - padding);
    input_last = std::max(input_last, (last - 1) * stride - padding + kernel);
  }

  // No band of so many rows has more.
  static int64_t most_outputs(const Window& window, int64_t rows) {
    return std::min((rows + window.kernel_height - 2) / window.stride + 1, window.output_height());
  }
  static int64_t most_inputs(const Window& window, int64_t rows) {
    return rows + 2 * (window.kernel_height - 1);
  }
};

// Calls body(task, worker) for all tasks, which are divided between the threads.
template <typename Body>
void for_each_task(int64_t tasks, const Workers& workers, const Body& body) {
  run_team(workers.threads, workers.parallel_for, {tasks},
           [&](int64_t, int64_t task, int64_t worker) { body(task, worker); });
}

// Adds up what tasks found: `count` sums of each, `pitch` floats apart.
inline void add_up(const float* sums, int64_t tasks, int64_t pitch, int64_t count, float* total) {
  for (int64_t i = 0; i < count; ++i) {
    double sum = 0;
    for (int64_t task = 0; task < tasks; ++task) sum += sums[task * pitch + i];
    total[i] = static_cast<float>(sum);
  }
}

}  // namespace threshnet_fast::cpu
