// Pools and depthwise convolutions, row by row of the map. Free of torch.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/tiles.h"
#include "operands.h"
#include "program.h"

namespace threshnet_fast::cpu {

// What an average over the window at a row and column of the input, of which `count` pixels lie on
// the map, divides by. Not 0: the last window begins on the map.
inline int64_t divisor_of(const Step& step, const Buffer& from, int64_t top, int64_t left,
                          int64_t count) {
  if (step.divisor == kPixelsOfMap) return count;
  if (step.divisor != kPixelsOfPadded) return step.divisor;
  const PlanWindow& window = step.window;
  return std::min(window.kernel_height, from.height + window.padding_top - top) *
         std::min(window.kernel_width, from.width + window.padding_left - left);
}

template <typename Element>
void pool(const Operands<Element>& operands, const Step& step, int64_t block, float* scratch) {
  const BufferSegment& segment = *operands.segments_of(step);
  const Buffer& from = operands.program.buffer(segment.buffer);
  const Buffer& to = operands.program.buffer(step.output_buffer);
  const Element* input = operands.input_of(segment);
  Element* output = operands.output_of(step);
  const PlanWindow& window = step.window;
  int64_t* const offsets = reinterpret_cast<int64_t*>(scratch);
  const int64_t rows = operands.program.header().batch * to.height;
  const BlockRange range(rows, block, step.block_count);
  for (int64_t row = range.first; row < range.last; ++row) {
    const int64_t n = row / to.height;
    const int64_t top = row % to.height * window.stride_height - window.padding_top;
    const TapRange taps = valid_taps(top, from.height, window.kernel_height);
    for (int64_t x = 0; x < to.width; ++x) {
      const int64_t left = x * window.stride_width - window.padding_left;
      int64_t count = 0;
      const TapRange columns = valid_taps(left, from.width, window.kernel_width);
      for (int64_t ky = taps.begin; ky < taps.end; ++ky) {
        const int64_t first = (n * from.height + top + ky) * from.width + left;
        for (int64_t kx = columns.begin; kx < columns.end; ++kx)
          offsets[count++] = (first + kx) * from.pitch;
      }
      Element* const pixel = output + (row * to.width + x) * to.pitch;
      const float factor = 1.0f / static_cast<float>(divisor_of(step, from, top, left, count));
      if (step.scale_index >= 0) {
        operands.table.affine_average_pool[step.prologue_activation](
            input, offsets, count, operands.packed + step.scale, operands.packed + step.shift,
            segment.channels, factor, pixel);
      } else {
        (step.average ? operands.table.average_pool : operands.table.max_pool)(
            input, offsets, count, segment.channels, factor, pixel);
      }
    }
  }
}

// The taps of a window at a row and column of the input that are not padding: their offsets from
// there, then those of their weights. Returns how many there are.
inline int64_t window_taps(const Step& step, const Panel& panel, const Buffer& from, int64_t top,
                           int64_t left, int64_t* offsets) {
  const PlanWindow& window = step.window;
  const TapRange rows = valid_taps(top, from.height, window.kernel_height, window.dilation_height);
  const TapRange columns = valid_taps(left, from.width, window.kernel_width, window.dilation_width);
  int64_t* const weight_offsets = offsets + window.taps();
  int64_t count = 0;
  for (int64_t ky = rows.begin; ky < rows.end; ++ky) {
    for (int64_t kx = columns.begin; kx < columns.end; ++kx) {
      offsets[count] =
          (ky * window.dilation_height * from.width + kx * window.dilation_width) * from.pitch;
      weight_offsets[count] = (ky * window.kernel_width + kx) * panel.pitch;
      ++count;
    }
  }
  return count;
}

template <typename Element>
void depthwise(const Operands<Element>& operands, const Step& step, int64_t block, float* scratch) {
  const BufferSegment& segment = *operands.segments_of(step);
  const Panel& panel = *operands.panels_of(step);
  const Buffer& from = operands.program.buffer(segment.buffer);
  const Buffer& to = operands.program.buffer(step.output_buffer);
  const PlanWindow& window = step.window;
  int64_t* const input_offsets = reinterpret_cast<int64_t*>(scratch);
  DepthwiseRow<Element> row{};
  row.weights = operands.packed + panel.weights;
  row.bias = operands.packed + panel.bias;
  row.input_offsets = input_offsets;
  row.weight_offsets = input_offsets + window.taps();
  row.input_step = window.stride_width * from.pitch;
  row.output_step = to.pitch;
  row.channels = segment.channels;
  row.activation = step.activation;
  // Pixels from `inner` up to `outer` have all columns of their windows within the map.
  const int64_t inner = std::min(divide_up(window.padding_left, window.stride_width), to.width);
  const int64_t last_left = from.width + window.padding_left - window.width();
  const int64_t outer =
      std::clamp(last_left < 0 ? 0 : last_left / window.stride_width + 1, inner, to.width);
  const int64_t rows = operands.program.header().batch * to.height;
  const BlockRange range(rows, block, step.block_count);
  for (int64_t y = range.first; y < range.last; ++y) {
    const int64_t top = y % to.height * window.stride_height - window.padding_top;
    const Element* image =
        operands.input_of(segment) + y / to.height * from.height * from.width * from.pitch;
    for (int64_t x = 0; x < to.width; x += row.pixels) {
      const int64_t left = x * window.stride_width - window.padding_left;
      row.pixels = x >= inner && x < outer ? outer - x : 1;
      row.taps = window_taps(step, panel, from, top, left, input_offsets);
      row.input = image + (top * from.width + left) * from.pitch;
      row.output = operands.output_of(step) + (y * to.width + x) * to.pitch;
      operands.table.depthwise(row);
    }
  }
}

}  // namespace threshnet_fast::cpu
