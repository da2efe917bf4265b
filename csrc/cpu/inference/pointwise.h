// Sums of maps with a factor, a term and an activation, every element on its own. Free of torch.
#pragma once

#include <cstdint>

#include "operands.h"
#include "program.h"

namespace threshnet_fast::cpu {

template <typename Element>
void pointwise(const Operands<Element>& operands, const Step& step, int64_t block, float* scratch) {
  const BufferSegment* const segments = operands.segments_of(step);
  const Buffer& to = operands.program.buffer(step.output_buffer);
  const BlockRange range(operands.program.header().batch * to.height * to.width, block,
                         step.block_count);
  const Element** const inputs = reinterpret_cast<const Element**>(scratch);
  int64_t* const steps = reinterpret_cast<int64_t*>(inputs + step.segment_count);
  PointwiseRow<Element> row{};
  row.output = operands.output_of(step) + range.first * to.pitch;
  row.output_step = to.pitch;
  row.inputs = inputs;
  row.input_steps = steps;
  row.count = step.segment_count;
  row.pixels = range.count();
  row.channels = step.output_channels;
  row.slope = step.slope;
  bool dense = to.pitch == row.channels;
  for (int64_t i = 0; i < step.segment_count; ++i) {
    const int64_t pitch = operands.program.buffer(segments[i].buffer).pitch;
    inputs[i] = operands.input_of(segments[i]) + range.first * pitch;
    steps[i] = pitch;
    dense = dense && pitch == row.channels;
  }
  const bool scaled = step.scale_index >= 0;
  if (scaled) {
    row.scale = operands.packed + step.scale;
    row.shift = operands.packed + step.shift;
  } else if (dense) {
    // Without gaps, and without what differs from channel to channel, all is one long row.
    row.channels *= row.pixels;
    row.pixels = 1;
  }
  operands.table.pointwise[scaled][step.activation](row);
}

}  // namespace threshnet_fast::cpu
