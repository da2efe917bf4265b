// Interface between the engine and its micro-kernels. Free of torch and of the standard library, so
// that a micro-kernel compiled for a newer instruction set can never leak such code into functions
// that run everywhere.
#pragma once

#include <cstdint>

#include "codes.h"

namespace threshnet_fast::cpu {

// The upper half of a float.
struct Bfloat16 {
  uint16_t bits;
};

// To the nearest, ties to even; a NaN stays a NaN.
template <typename Element>
Element rounded(float value);
template <>
inline float rounded(float value) {
  return value;
}
template <>
inline Bfloat16 rounded(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  if (value != value) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

// An element is what features and weights are stored in: float or Bfloat16. A word, 32 bits, is
// what one lane multiplies at a time: one channel in float, two neighbouring ones in Bfloat16.
template <typename Element>
constexpr int64_t kWordChannels = sizeof(float) / sizeof(Element);

// The most output pixels (MR) and vectors of output channels (NR / lanes) any micro-kernel holds.
constexpr int kMaxTilePixels = 14;
constexpr int kMaxTileVectors = 3;
// Winograd's F(m x m, 3x3) takes m x m outputs from (m + 2) x (m + 2) inputs and as many products;
// m is 2 or 4.
constexpr int kMaxWinogradPositions = 36;

// Memory to bring into the cache while other work is done: with every word that is multiplied, so
// many bytes of it, at most a cache line. Null: weights, some way ahead of those in use.
struct Fetch {
  const void* address;
  int64_t step;
};

// A run of input channels that lie next to each other in memory: one segment of a concatenation
// under one tap of the convolution. Pixel i of the tile reads
// input[input_pixels[i] * pitch + 0 .. channels).
template <typename Element>
struct ChannelRun {
  const Element* input;
  const Element* weights;  // words, [words][weight_pitch], readable for NR words from each start
  int64_t pitch;
  int64_t channels;  // a multiple of kWordChannels
  Fetch fetches[2];
};

// One tile: MR output pixels by NR output channels.
//   result[i] = initial[initial_rows[i]] + sum over runs, channels of input * weight
//   output[output_rows[i]] = activation(result[i])
// An initial_pitch of 0 starts every pixel from the same row (the bias).
template <typename Element>
struct ConvTile {
  const ChannelRun<Element>* runs;
  int64_t run_count;
  int64_t weight_pitch;  // words
  const int32_t* input_pixels;
  const float* initial;
  const int32_t* initial_rows;
  int64_t initial_pitch;
  float* sums;      // where the result goes, unless it is null:
  Element* output;  // then it goes here
  const int32_t* output_rows;
  int64_t output_pitch;
  int64_t channels;  // valid output channels, at most NR; no more than these are stored
  Activation activation;
};

template <typename Element>
using ConvTileFunction = void (*)(const ConvTile<Element>&);

// output[c] = activation(input[c] * scale[c] + shift[c]).
template <typename Element>
using AffineFunction = void (*)(const Element* input, const float* scale, const float* shift,
                                int64_t channels, Element* output);

// output[c] = factor * sum over i of input[offsets[i] + c], or the maximum over i (a NaN wins).
template <typename Element>
using PoolFunction = void (*)(const Element* input, const int64_t* offsets, int64_t count,
                              int64_t channels, float factor, Element* output);

// output[c] = factor * sum over i of activation(input[offsets[i] + c] * scale[c] + shift[c]).
template <typename Element>
using AffinePoolFunction = void (*)(const Element* input, const int64_t* offsets, int64_t count,
                                    const float* scale, const float* shift, int64_t channels,
                                    float factor, Element* output);

// Pixels side by side in a row of a depthwise convolution's output:
//   output[p * output_step + c] =
//       activation(bias[c] + sum over t of input[p * input_step + input_offsets[t] + c] *
//                                          weights[weight_offsets[t] + c])
// Weights and bias are padded to whole vectors.
template <typename Element>
struct DepthwiseRow {
  const Element* input;
  const float* weights;
  const int64_t* input_offsets;
  const int64_t* weight_offsets;
  int64_t taps;
  const float* bias;
  Element* output;
  int64_t pixels, input_step, output_step;
  int64_t channels;
  Activation activation;
};

template <typename Element>
using DepthwiseFunction = void (*)(const DepthwiseRow<Element>&);

// Pixels side by side of maps that are added up:
//   output[p * output_step + c] =
//       activation(sum over i of inputs[i][p * input_steps[i] + c] * scale[c] + shift[c])
// Scale and shift are padded to whole vectors. The output may be an input itself.
template <typename Element>
struct PointwiseRow {
  const Element* const* inputs;
  const int64_t* input_steps;
  int64_t count;
  const float* scale;
  const float* shift;
  Element* output;
  int64_t output_step;
  int64_t pixels, channels;
  float slope;  // of a leaky ReLU
};

template <typename Element>
using PointwiseFunction = void (*)(const PointwiseRow<Element>&);
constexpr int kActivations = kSigmoid + 1;

// A row of a map interpolated between two rows of another and between two columns: pixel x lies
// between the columns that begin at offsets[2 * x] and offsets[2 * x + 1].
template <typename Element>
struct BilinearRow {
  const Element* first;
  const Element* second;
  const int64_t* offsets;
  const float* weights;  // of each pixel's second column
  float weight;          // of the second row
  Element* output;
  int64_t pixels, output_step;
  int64_t channels;
};

template <typename Element>
using BilinearFunction = void (*)(const BilinearRow<Element>&);

// The input transform of Winograd's F(m x m, 3x3): B^T d B for (m + 2) x (m + 2) pixels, channel by
// channel. pixels[(m + 2) * row + column] points to a pixel's channels; element i of the result
// goes to output[i * output_pitch + channel].
template <typename Element>
using WinogradInputFunction = void (*)(const Element* const* pixels, int64_t channels,
                                       Element* output, int64_t output_pitch);

// The output transform: A^T m A for as many products, plus the bias, activation, and the store of
// m x m pixels, of which null pointers are left out.
template <typename Element>
using WinogradOutputFunction = void (*)(const float* products, int64_t product_pitch,
                                        const float* bias, int64_t channels, Activation activation,
                                        Element* const* outputs);

template <typename Element>
struct WinogradFunctions {
  WinogradInputFunction<Element> input;
  WinogradOutputFunction<Element> output;
};

struct Tiling {
  const char* name;
  int64_t lanes;                             // words in a vector
  int64_t tile_pixels[kMaxTileVectors + 1];  // MR by number of vectors; entry 0 unused
};

template <typename Element>
struct UkernelTable {
  Tiling tiling;
  const ConvTileFunction<Element> (*conv_tile)[kMaxTilePixels + 1];  // [vectors][pixels]
  AffineFunction<Element> affine[kRelu6 + 1];                        // by activation
  PoolFunction<Element> max_pool;
  PoolFunction<Element> average_pool;
  AffinePoolFunction<Element> affine_average_pool[kRelu6 + 1];
  DepthwiseFunction<Element> depthwise;
  PointwiseFunction<Element> pointwise[2][kActivations];  // with a scale, by activation
  BilinearFunction<Element> bilinear;
  WinogradFunctions<Element> winograd_2x2;
  WinogradFunctions<Element> winograd_4x4;
};

extern const UkernelTable<float> kScalarTable;
#if defined(__x86_64__) || defined(_M_X64)
extern const UkernelTable<float> kAvx2Table;
extern const UkernelTable<float> kAvx512Table;
extern const UkernelTable<Bfloat16> kAvx512Bf16Table;
#elif defined(__aarch64__)
extern const UkernelTable<float> kNeonTable;
#endif

}  // namespace threshnet_fast::cpu
