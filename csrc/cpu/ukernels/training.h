// Interface between training and its micro-kernels, which compute in float32. Free of torch and of
// the standard library, as ukernels.h is.
#pragma once

#include <cstdint>

#include "ukernels.h"

namespace threshnet_fast::cpu {

// Pixels at equal distances, of which a tile of a weight's gradient adds up the products.
struct PixelRun {
  const float* input;
  const float* gradient;
  int64_t count;
};

// One tile of a weight's gradient, a number of input channels by a number of vectors of output
// channels:
//   output[i * output_pitch + j] += sum over runs, pixels p of
//                                   input[p * input_pitch + i] * gradient[p * gradient_pitch + j]
// Gradient and output are readable, and the output writable, for whole vectors.
struct WeightGradientTile {
  const PixelRun* runs;
  int64_t run_count;
  int64_t input_pitch, gradient_pitch;
  float* output;
  int64_t output_pitch;
  Fetch fetch;  // with every pixel; null: nothing
};

using WeightGradientFunction = void (*)(const WeightGradientTile&);

// What is applied to a feature map where it is read: act(x * scale[c] + shift[c]).
struct Prologue {
  const float* scale;
  const float* shift;
  Activation activation;
};

// Rows of pixels of a map: `count` of them, `pitch` floats apart.
struct Rows {
  const float* data;
  int64_t pitch;
};
struct MutableRows {
  float* data;
  int64_t pitch;
};

// output = act(input * scale + shift).
using NormalizeFunction = void (*)(Rows input, const Prologue& prologue, int64_t count,
                                   int64_t channels, MutableRows output);

// The gradient of a map that is normalised by its own mean and variance:
//   output = gradient - map * slope[c] + offset[c].
using MapGradientFunction = void (*)(Rows gradient, Rows map, const float* slope,
                                     const float* offset, int64_t count, int64_t channels,
                                     MutableRows output);

// Back through the prologue. With d = gradient where act passes one on, else 0:
//   output = scale[c] * d, added to what is there where `accumulate`;
//   sums[c] += d and sums[sums_pitch + c] += d * (map - mean[c]).
struct PrologueGradient {
  Rows gradient, map;
  Prologue prologue;
  const float* mean;
  int64_t count, channels;
  MutableRows output;
  bool accumulate;
  float* sums;
  int64_t sums_pitch;
};
using PrologueGradientFunction = void (*)(const PrologueGradient&);

// sums[c] += sum of (map - origin[c]), and sums[sums_pitch + c] += that of its square.
using MomentsFunction = void (*)(Rows map, const float* origin, int64_t count, int64_t channels,
                                 float* sums, int64_t sums_pitch);

// output[c] = maximum over i of act(input[offsets[i] + c] * scale + shift), a NaN wins.
using NormalizedMaxPoolFunction = void (*)(const float* input, const int64_t* offsets,
                                           int64_t count, const Prologue& prologue,
                                           int64_t channels, float* output);

// Adds gradient[c] to output[offsets[i] + c] for the first i at which the normalised input has the
// maximum, or is NaN.
using MaxPoolGradientFunction = void (*)(const float* input, const int64_t* offsets,
                                         const int64_t* output_offsets, int64_t count,
                                         const Prologue& prologue, int64_t channels,
                                         const float* gradient, float* output);

// A d A^T of Winograd's F(2x2, 3x3) for 2 x 2 pixels of an output's gradient, channel by channel:
// element i of the 4 x 4 goes to output[i * output_pitch + channel]. Multiplied by the transformed
// inputs and added up, they give the gradient of the transformed weight.
using WinogradGradientFunction = void (*)(const float* const* pixels, int64_t channels,
                                          float* output, int64_t output_pitch);

// A row of output pixels of a depthwise convolution, back: for every pixel p, tap t and channel c
//   input_gradient[p * input_step + offsets[t] + c] +=
//       gradient[p * gradient_step + c] * weights[t * weight_pitch + c]
//   weight_gradient[t * weight_pitch + c] +=
//       gradient[p * gradient_step + c] * input[p * input_step + offsets[t] + c]
// Either may be null: it is not wanted.
struct DepthwiseGradientRow {
  const float* gradient;
  const float* input;
  const float* weights;
  const int64_t* offsets;
  int64_t weight_pitch, taps;
  int64_t pixels, gradient_step, input_step;
  int64_t channels;
  float* input_gradient;
  float* weight_gradient;
};
using DepthwiseGradientFunction = void (*)(const DepthwiseGradientRow&);

struct TrainingTable {
  const WeightGradientFunction (*weight_gradient)[kMaxTilePixels + 1];  // [vectors][channels]
  NormalizeFunction normalize;
  MapGradientFunction map_gradient;
  PrologueGradientFunction prologue_gradient;
  MomentsFunction moments;
  NormalizedMaxPoolFunction max_pool;
  MaxPoolGradientFunction max_pool_gradient;
  WinogradGradientFunction winograd_gradient;
  DepthwiseGradientFunction depthwise_gradient;
};

extern const TrainingTable kScalarTraining;
#if defined(__x86_64__) || defined(_M_X64)
extern const TrainingTable kAvx2Training;
extern const TrainingTable kAvx512Training;
#elif defined(__aarch64__)
extern const TrainingTable kNeonTraining;
#endif

}  // namespace threshnet_fast::cpu
