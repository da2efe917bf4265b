// Pools and depthwise convolutions, row by row of the map. Free of torch.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/tiles.h"
#include "operands.h"
#include "program.h"

namespace threshnet_fast::cpu {

template <typename Element>
void pool(const Operands<Element>& operands, const Step& step, int64_t block, float* scratch) {
  const BufferSegment& segment = *operands.segments_of(step);
  const Buffer& from = operands.program.buffer(segment.buffer);
  const Buffer& to = operands.program.buffer(step.output_buffer);
  const Element* input = operands.input_of(segment);
  Element* output = operands.output_of(step);
  int64_t* const offsets = reinterpret_cast<int64_t*>(scratch);
  const int64_t rows = operands.program.header().batch * to.height;
  const BlockRange range(rows, block, step.block_count);
  for (int64_t row = range.first; row < range.last; ++row) {
    const int64_t n = row / to.height;
    const int64_t top = row % to.height * step.stride - step.padding;
    const TapRange taps = valid_taps(top, from.height, step.kernel_height);
    for (int64_t x = 0; x < to.width; ++x) {
      const int64_t left = x * step.stride - step.padding;
      int64_t count = 0;
      const TapRange columns = valid_taps(left, from.width, step.kernel_width);
      for (int64_t ky = taps.begin; ky < taps.end; ++ky) {
        const int64_t first = (n * from.height + top + ky) * from.width + left;
        for (int64_t kx = columns.begin; kx < columns.end; ++kx)
          offsets[count++] = (first + kx) * from.pitch;
      }
      Element* const pixel = output + (row * to.width + x) * to.pitch;
      const float factor = 1.0f / static_cast<float>(count);
      if (step.scale_index >= 0) {
        operands.table.bn_relu_average_pool(input, offsets, count, operands.packed + step.scale,
                                            operands.packed + step.shift, segment.channels, factor,
                                            pixel);
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
  const TapRange rows = valid_taps(top, from.height, step.kernel_height);
  const TapRange columns = valid_taps(left, from.width, step.kernel_width);
  int64_t* const weight_offsets = offsets + step.kernel_height * step.kernel_width;
  int64_t count = 0;
  for (int64_t ky = rows.begin; ky < rows.end; ++ky) {
    for (int64_t kx = columns.begin; kx < columns.end; ++kx) {
      offsets[count] = (ky * from.width + kx) * from.pitch;
      weight_offsets[count] = (ky * step.kernel_width + kx) * panel.pitch;
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
  int64_t* const input_offsets = reinterpret_cast<int64_t*>(scratch);
  DepthwiseRow<Element> row{};
  row.weights = operands.packed + panel.weights;
  row.bias = operands.packed + panel.bias;
  row.input_offsets = input_offsets;
  row.weight_offsets = input_offsets + step.kernel_height * step.kernel_width;
  row.input_step = step.stride * from.pitch;
  row.output_step = to.pitch;
  row.channels = segment.channels;
  row.activation = step.activation;
  // Pixels from `inner` up to `outer` have all columns of their windows within the map.
  const int64_t inner = std::min(divide_up(step.padding, step.stride), to.width);
  const int64_t last_left = from.width + step.padding - step.kernel_width;
  const int64_t outer =
      std::clamp(last_left < 0 ? 0 : last_left / step.stride + 1, inner, to.width);
  const int64_t rows = operands.program.header().batch * to.height;
  const BlockRange range(rows, block, step.block_count);
  for (int64_t y = range.first; y < range.last; ++y) {
    const int64_t top = y % to.height * step.stride - step.padding;
    const Element* image =
        operands.input_of(segment) + y / to.height * from.height * from.width * from.pitch;
    for (int64_t x = 0; x < to.width; x += row.pixels) {
      const int64_t left = x * step.stride - step.padding;
      row.pixels = x >= inner && x < outer ? outer - x : 1;
      row.taps = window_taps(step, panel, from, top, left, input_offsets);
      row.input = image + (top * from.width + left) * from.pitch;
      row.output = operands.output_of(step) + (y * to.width + x) * to.pitch;
      operands.table.depthwise(row);
    }
  }
}

}  // namespace threshnet_fast::cpu
