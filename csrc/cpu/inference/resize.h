// Maps of another size, row by row of the output. Free of torch.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "operands.h"
#include "program.h"

namespace threshnet_fast::cpu {

// Of a map that keeps its size or is doubled, torch leaves the scale out of account.
inline float effective_scale(ResizeMode mode, float scale, int64_t size, int64_t out_size) {
  if (mode != kNearestExact && out_size == size) return 1.0f;
  return mode == kNearest && out_size == 2 * size ? 0.5f : scale;
}

// In one direction, the two pixels of the input between which one of the output lies, and how far
// towards the second. In float32 and in this order, as torch does it, so that both round alike.
struct ResizedPixel {
  int64_t first, second;
  float weight;

  ResizedPixel(const Resizing& resizing, float scale, int64_t index, int64_t size) {
    const float at = static_cast<float>(index);
    float position = 0.0f;
    if (resizing.mode == kNearest || (resizing.mode == kBilinear && resizing.align_corners)) {
      position = at * scale;
    } else {
      position = (at + 0.5f) * scale;
      if (resizing.mode == kBilinear) position = std::max(position - 0.5f, 0.0f);
    }
    // Compared before the conversion, as what is too large for an integer is none.
    first = position < static_cast<float>(size) ? static_cast<int64_t>(position) : size - 1;
    first = std::min(first, size - 1);
    second = std::min(first + 1, size - 1);
    weight = std::clamp(position - static_cast<float>(first), 0.0f, 1.0f);
  }
};

template <typename Element>
class Resize {
 public:
  Resize(const Operands<Element>& operands, const Step& step, float* scratch)
      : operands_(operands),
        step_(step),
        from_(operands.program.buffer(operands.segments_of(step)->buffer)),
        to_(operands.program.buffer(step.output_buffer)),
        offsets_(reinterpret_cast<int64_t*>(scratch)),
        weights_(scratch + 2 * 2 * to_.width) {
    const float scale =
        effective_scale(step.resizing.mode, step.resizing.scale_width, from_.width, to_.width);
    for (int64_t x = 0; x < to_.width; ++x) {
      const ResizedPixel pixel(step.resizing, scale, x, from_.width);
      offsets_[2 * x] = pixel.first * from_.pitch;
      offsets_[2 * x + 1] = pixel.second * from_.pitch;
      weights_[x] = pixel.weight;
    }
  }

  void rows(const BlockRange& range) const {
    const Element* const input = operands_.input_of(*operands_.segments_of(step_));
    Element* output = operands_.output_of(step_) + range.first * to_.width * to_.pitch;
    const int64_t row_elements = from_.width * from_.pitch;
    const float scale =
        effective_scale(step_.resizing.mode, step_.resizing.scale_height, from_.height, to_.height);
    for (int64_t row = range.first; row < range.last; ++row, output += to_.width * to_.pitch) {
      const ResizedPixel pixel(step_.resizing, scale, row % to_.height, from_.height);
      const Element* const image = input + row / to_.height * from_.height * row_elements;
      const Element* const first = image + pixel.first * row_elements;
      if (step_.resizing.mode == kBilinear) {
        operands_.table.bilinear({first, image + pixel.second * row_elements, offsets_, weights_,
                                  pixel.weight, output, to_.width, to_.pitch,
                                  step_.output_channels});
      } else {
        copy_row(first, output);
      }
    }
  }

 private:
  void copy_row(const Element* input, Element* output) const {
    const size_t bytes = step_.output_channels * sizeof(Element);
    for (int64_t x = 0; x < to_.width; ++x)
      std::memcpy(output + x * to_.pitch, input + offsets_[2 * x], bytes);
  }

  const Operands<Element>& operands_;
  const Step& step_;
  const Buffer& from_;
  const Buffer& to_;
  int64_t* const offsets_;  // of the two columns of the input for each of the output
  float* const weights_;    // of the second of them
};

template <typename Element>
void resize(const Operands<Element>& operands, const Step& step, int64_t block, float* scratch) {
  const int64_t rows =
      operands.program.header().batch * operands.program.buffer(step.output_buffer).height;
  Resize<Element>(operands, step, scratch).rows(BlockRange(rows, block, step.block_count));
}

}  // namespace threshnet_fast::cpu
