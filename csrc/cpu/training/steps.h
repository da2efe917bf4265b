// Training on the CPU: convolutions and pools that normalise and activate what they read, forward
// and back, and the arithmetic of batch normalisation between them. Free of torch.
//
// A feature map is kept as its convolution left it. Whoever reads it applies act(x * scale + shift)
// while it copies the part it needs into the cache, and applies it again on the way back, so that
// neither a normalised nor a concatenated map is ever written.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/parallel_for.h"
#include "cpu/ukernels/kinds.h"
#include "kernel_limits.h"

namespace threshnet_fast::cpu {

using threshnet_fast::kMostTaps;

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
  int64_t winograd;  // size of Winograd's tiles where they suit: 0 (none), 2, 4, or -1: the faster
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
  int64_t winograd;
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

// output = every channel's own convolution of act(input * scale + shift), without bias; of the
// strides of the weight, [C, 1, kh, kw], that between inputs has no meaning.
struct DepthwiseForward {
  Window window;
  MapSegment input;
  Prologue prologue;
  const float* weight;
  WeightStrides strides;
  float* output;
  int64_t output_pitch;
  Statistics statistics;
};

// As for a convolution.
struct DepthwiseBackward {
  Window window;
  MapSegment input;
  Prologue prologue;
  const float* mean;
  const float* weight;
  WeightStrides strides;
  MapSegment output, gradient;
  const float* slope;
  const float* offset;
  GradientSegment input_gradient;  // null where it is not wanted
  float* sums;
  float* weight_gradient;  // null where it is not wanted
  WeightStrides gradient_strides;
};

int64_t workspace_floats(const DepthwiseForward& step, const Workers& workers);
int64_t workspace_floats(const DepthwiseBackward& step, const Workers& workers);
void depthwise_forward(const DepthwiseForward& step, float* workspace, const Workers& workers);
void depthwise_backward(const DepthwiseBackward& step, float* workspace, const Workers& workers);

// output = maximum over windows of act(input * scale + shift).
struct PoolForward {
  Window window;
  MapSegment input;
  Prologue prologue;
  float* output;
  int64_t output_pitch;
  Statistics statistics;
};

// As for a convolution.
struct PoolBackward {
  Window window;
  MapSegment input;
  Prologue prologue;
  const float* mean;
  MapSegment output, gradient;
  const float* slope;
  const float* offset;
  GradientSegment input_gradient;
  float* sums;
};

int64_t workspace_floats(const PoolForward& step);
int64_t workspace_floats(const PoolBackward& step, const Workers& workers);
void pool_forward(const PoolForward& step, float* workspace, const Workers& workers);
void pool_backward(const PoolBackward& step, float* workspace, const Workers& workers);

// The mean and variance of channels [first, last) of a map, from what was found in parts of it of
// `counts` pixels: [part][3][channels], an origin and the sums of the differences from it and of
// their squares. By Chan, Golub and LeVeque's formula, in float64.
void combine_moments(const float* moments, const std::vector<int64_t>& counts, int64_t channels,
                     int64_t first, int64_t last, const Statistics& statistics);

// Batch normalisation of a map, of which these are the mean and the biased variance:
// scale = gamma / sqrt(variance + eps), shift = beta - mean * scale. Null: gamma 1, beta 0.
struct Normalization {
  const float* mean;
  const float* variance;
  const float* gamma;
  const float* beta;
  double eps;
};
void normalization_prologue(const Normalization& norm, int64_t channels, float* scale,
                            float* shift);

// From the sums of a prologue's gradient, over `count` pixels, the gradients of gamma and beta
// (where not null), and what the norm adds to the map's gradient through the map's own mean and
// variance, where those are not fixed: slope[c] and offset[c], to which it is added.
struct NormalizationBackward {
  Normalization norm;
  const float* sums;
  int64_t sums_pitch;
  int64_t count;
  float* gamma_gradient;
  float* beta_gradient;
  float* slope;
  float* offset;
};
void normalization_backward(const NormalizationBackward& step, int64_t channels);

}  // namespace threshnet_fast::cpu
