// Interface between the engine and its micro-kernels. Free of torch and of the standard library, so
// that a micro-kernel compiled for a newer instruction set can never leak such code into functions
// that run everywhere.
#pragma once

#include <cstdint>

namespace threshnet_fast::cpu {

enum Isa : int64_t { kScalar = 0, kAvx2 = 1, kAvx512 = 2, kNeon = 3, kIsaCount = 4 };

// The most output pixels (MR) and vectors of output channels (NR / lanes) any micro-kernel holds.
constexpr int kMaxTilePixels = 14;
constexpr int kMaxTileVectors = 3;
// Winograd's F(m x m, 3x3) takes m x m outputs from (m + 2) x (m + 2) inputs and as many products;
// m is 2 or 4.
constexpr int kMaxWinogradPositions = 36;

// A run of input channels that lie next to each other in memory: one segment of a concatenation
// under one tap of the convolution. Pixel i of the tile reads
// input[input_pixels[i] * pitch + 0 .. channels).
struct ChannelRun {
  const float* input;
  const float* weights;  // [channels][weight_pitch], readable for NR floats from each start
  int64_t pitch;
  int64_t channels;
};

// One tile: MR output pixels by NR output channels.
//   result[i] = initial[initial_rows[i]] + sum over runs, channels of input * weight
//   output[output_rows[i]] = relu ? max(result[i], 0) : result[i]
// An initial_pitch of 0 starts every pixel from the same row (the bias). A NaN stays a NaN.
struct ConvTile {
  const ChannelRun* runs;
  int64_t run_count;
  int64_t weight_pitch;
  const int32_t* input_pixels;
  const float* initial;
  const int32_t* initial_rows;
  int64_t initial_pitch;
  float* output;
  const int32_t* output_rows;
  int64_t output_pitch;
  int64_t channels;  // valid output channels, at most NR; no more than these are stored
  bool relu;
};

using ConvTileFunction = void (*)(const ConvTile&);

// output[c] = max(input[c] * scale[c] + shift[c], 0); a NaN stays a NaN.
using BnReluFunction = void (*)(const float* input, const float* scale, const float* shift,
                                int64_t channels, float* output);

// output[c] = factor * sum over i of input[offsets[i] + c], or the maximum over i (a NaN wins).
using PoolFunction = void (*)(const float* input, const int64_t* offsets, int64_t count,
                              int64_t channels, float factor, float* output);

// The input transform of Winograd's F(m x m, 3x3): B^T d B for (m + 2) x (m + 2) pixels, channel by
// channel. pixels[(m + 2) * row + column] points to a pixel's channels; element i of the result
// goes to output[i * output_pitch + channel].
using WinogradInputFunction = void (*)(const float* const* pixels, int64_t channels, float* output,
                                       int64_t output_pitch);

// The output transform: A^T m A for as many products, plus the bias, ReLU, and the store of m x m
// pixels, of which null pointers are left out.
using WinogradOutputFunction = void (*)(const float* products, int64_t product_pitch,
                                        const float* bias, int64_t channels, bool relu,
                                        float* const* outputs);

struct WinogradFunctions {
  WinogradInputFunction input;
  WinogradOutputFunction output;
};

struct UkernelTable {
  const char* name;
  int64_t lanes;                             // floats in a vector
  int64_t tile_pixels[kMaxTileVectors + 1];  // MR by number of vectors; entry 0 unused
  const ConvTileFunction (*conv_tile)[kMaxTilePixels + 1];  // [vectors][pixels]
  BnReluFunction bn_relu;
  PoolFunction max_pool;
  PoolFunction average_pool;
  WinogradFunctions winograd_2x2;
  WinogradFunctions winograd_4x4;
};

extern const UkernelTable kScalarTable;
#if defined(__x86_64__) || defined(_M_X64)
extern const UkernelTable kAvx2Table;
extern const UkernelTable kAvx512Table;
#elif defined(__aarch64__)
extern const UkernelTable kNeonTable;
#endif

// The best instruction set that both this build and this processor have.
Isa best_isa();

// The table of an instruction set, or nullptr where the build or the processor lacks it.
const UkernelTable* ukernel_table(int64_t isa);

}  // namespace threshnet_fast::cpu
