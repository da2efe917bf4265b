// Training on the CPU: convolutions and pools that normalise and activate what they read, forward
// and back, and the arithmetic of batch normalisation between them. Free of torch.
//
// A feature map is kept as its convolution left it. Whoever reads it applies act(x * scale + shift)
// while it copies the part it needs into the cache, and applies it again on the way back, so that
// neither a normalised nor a concatenated map is ever written.
#pragma once

#include <cstdint>
#include <vector>

#include "program.h"
#include "training_ukernels.h"

namespace threshnet_fast::cpu {

// Some channels of a map of pixels that are `pitch` floats apart.
struct MapSegment {
  const float* data;
  int64_t pitch, channels;
};

// The gradient of a segment, which is added to what is there or takes its place.
struct GradientSegment {
  float* data;
  int64_t pitch;
  bool accumulate;
};

struct Window {
  int64_t batch, height, width;  // of the input
  int64_t kernel_height, kernel_width, stride, padding;

  int64_t output_height() const { return (height + 2 * padding - kernel_height) / stride + 1; }
  int64_t output_width() const { return (width + 2 * padding - kernel_width) / stride + 1; }
  int64_t input_pixels() const { return height * width; }
  int64_t output_pixels() const { return output_height() * output_width(); }
  int64_t taps() const { return kernel_height * kernel_width; }
};

// How a convolution is divided between threads.
struct Workers {
  int64_t isa, threads;
  ParallelFor parallel_for;
};

// Elements between neighbours of a weight [Co, Ci, kh, kw], in any order of memory.
struct WeightStrides {
  int64_t output, input, row, column;
};

// The mean and biased variance of each channel of a map, written where not null.
struct Statistics {
  float* mean;
  float* variance;
};

// output = conv(act(cat(inputs) * scale + shift)), without bias.
struct ConvolutionForward {
  Window window;
  std::vector<MapSegment> inputs;
  Prologue prologue;
  const float* weight;
  WeightStrides strides;
  int64_t output_channels;
  float* output;
  int64_t output_pitch;
  Statistics statistics;
};

// Back from the gradient of the output. The gradient of a map that others normalise by its
// statistics is  gradient - output * slope + offset;  slope and offset are 0 for one that is not.
struct ConvolutionBackward {
  Window window;
  std::vector<MapSegment> inputs;
  Prologue prologue;
  const float* mean;  // of the inputs' channels, as the prologue's gradient needs it
  const float* weight;
  WeightStrides strides;
  int64_t output_channels;
  MapSegment output, gradient;
  const float* slope;
  const float* offset;
  std::vector<GradientSegment> input_gradients;  // none where they are not wanted
  float* sums;             // [2][Ci]: sum of d and of d * (x - mean), see PrologueGradient
  float* weight_gradient;  // null where it is not wanted
  WeightStrides gradient_strides;
};

// Floats of the workspace, 64-byte aligned, that the two calls need.
int64_t workspace_floats(const ConvolutionForward& step, const Workers& workers);
int64_t workspace_floats(const ConvolutionBackward& step, const Workers& workers);

void convolution_forward(const ConvolutionForward& step, float* workspace, const Workers& workers);

// The gradient of the input asks for stride 1 and an output as large as the input.
void convolution_backward(const ConvolutionBackward& step, float* workspace,
                          const Workers& workers);

}  // namespace threshnet_fast::cpu
