// A convolution's weights in the order in which training's micro-kernels read them, and the
// gradient of a weight from the order in which they add it up. Free of torch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "cpu/tiles.h"
#include "cpu/winograd.h"
#include "steps.h"

namespace threshnet_fast::cpu {

// Vectors of output channels that are packed side by side.
constexpr int kPanelVectors = 2;

// Winograd's F(m x m, 3x3) takes m x m outputs, a tile, from (m + 2) x (m + 2) inputs and as many
// products. The gradients of weights are added up of tiles of 2 x 2.
constexpr int64_t kMostTile = 4;
constexpr int64_t kGradientTile = 2;

// Panels of up to two vectors of output channels, packed as [tap][input channel][vectors].
struct Panels {
  int64_t inputs, outputs, taps, lanes;

  int64_t count() const { return divide_up(outputs, kPanelVectors * lanes); }
  int64_t first(int64_t panel) const { return panel * kPanelVectors * lanes; }
  int64_t channels(int64_t panel) const {
    return std::min(outputs - first(panel), kPanelVectors * lanes);
  }
  int64_t vectors(int64_t panel) const { return divide_up(channels(panel), lanes); }
  int64_t pitch(int64_t panel) const { return vectors(panel) * lanes; }
  int64_t offset(int64_t panel) const { return first(panel) * taps * inputs; }
  // Of outputs in memory that is written in whole vectors.
  int64_t padded_outputs() const { return round_up(outputs, lanes); }
  int64_t floats() const { return padded_outputs() * taps * inputs; }
};

// Where the weights of a window lie: the one from an input channel to an output channel at a tap is
// weight[output * output_step + input * input_step + taps[tap]].
template <typename Float>
struct WeightTaps {
  Float* weight;
  int64_t output_step, input_step;
  int64_t count;
  int64_t taps[kMostTaps];

  WeightTaps(Float* weight, const WeightStrides& strides, const Window& window)
      : weight(weight),
        output_step(strides.output),
        input_step(strides.input),
        count(window.taps()) {
    for (int64_t tap = 0; tap < count; ++tap)
      taps[tap] =
          tap / window.kernel_width * strides.row + tap % window.kernel_width * strides.column;
  }

  // Those of the way back, from outputs to inputs: turned by half.
  WeightTaps flipped() const {
    WeightTaps result = *this;
    std::swap(result.output_step, result.input_step);
    std::reverse(result.taps, result.taps + count);
    return result;
  }

  Float* at(int64_t output, int64_t input) const {
    return weight + output * output_step + input * input_step;
  }
};

// Packs the weights of a panel, for tiles transformed to one weight for each position; `tile` is 0
// where there are none.
void pack_panel(const Panels& panels, int64_t panel, const WeightTaps<const float>& weights,
                int64_t tile, float* packed);

// A part of a weight's gradient, laid out as [tap][input channel][pitch], or as
// [position][input channel][pitch] where it is added up of Winograd's tiles.
struct GradientBlock {
  int64_t first_input, inputs, first_output, outputs;
  int64_t pitch;
};

// Writes the gradient of the weight of input channels [begin, end) of a block.
void unpack_gradient(const float* sums, const GradientBlock& block, int64_t begin, int64_t end,
                     bool winograd, const WeightTaps<float>& gradient);

}  // namespace threshnet_fast::cpu
