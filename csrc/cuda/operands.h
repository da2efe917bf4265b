// What the launchers of csrc/cuda are given: plain structs of raw pointers, with no word of torch
// or of CUDA's headers. All pointers are to the device's memory.
//
// A feature map is NHWC with a pitch: pixel p of the whole batch begins at data + p * pitch. Its
// channels come in whole groups of 16, those behind the map's own being zeros, and each pixel is
// aligned to 16 bytes: no kernel has to mask channels that it reads.
#pragma once

#include <cstdint>

#include "export.h"
#include "kernel_limits.h"

namespace threshnet_fast::cuda {

// Channels of a group.
constexpr int kGroup = static_cast<int>(kGroupChannels);
// Segments that one launch reads where they lie; of more, all are gathered into one first.
constexpr int kMaxSegments = 16;
// Channels that a head can average: their means lie in shared memory.
constexpr int kMaxHeadChannels = 8192;

enum class DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

constexpr int64_t bytes_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

template <typename T>
constexpr T divide_up(T a, T b) {
  return (a + b - 1) / b;
}

template <typename T>
constexpr T round_up(T a, T b) {
  return divide_up(a, b) * b;
}

// A cudaStream_t, without its header.
using Stream = void*;

// Channels of a feature map: `data` is the first one's address at pixel 0.
struct Segment {
  const void* data;
  int32_t pitch;     // elements between neighbouring pixels, a multiple of 8
  int32_t channels;  // whole groups
};

// How a window moves over a map.
struct Window {
  int32_t batch, in_height, in_width, out_height, out_width;
  int32_t kernel_height, kernel_width, stride, padding;

  int64_t in_pixels() const { return int64_t{batch} * in_height * in_width; }
  int64_t out_pixels() const { return int64_t{batch} * out_height * out_width; }
};

// y = act(conv(prologue(cat(segments))) * output_scale + bias), prologue(x) = relu(x * scale +
// shift) or none.
struct Convolution {
  DType dtype;
  int32_t segment_count;
  Segment segments[kMaxSegments];
  Window window;
  // [kernel_height][kernel_width][channels of all segments][weight_columns], see Packing.
  const void* weight;
  int32_t weight_columns;     // whole groups
  int32_t out_channels;       // stored; more than weight_columns is not possible
  const float* scale;         // prologue, over the channels of all segments; null: none
  const float* shift;         // as scale
  const float* output_scale;  // weight_columns; null: 1
  const float* bias;          // weight_columns; null: 0
  void* output;               // any pitch and alignment of its elements
  int64_t output_pitch;
  float* partials;  // partial_floats() of them where the reduction is split
  int32_t relu;
};

// A network's first convolution, which reads an input of any strides. Neither prologue nor
// segments.
struct StemConvolution {
  DType dtype;
  Window window;
  const void* input;
  int64_t batch_stride, channel_stride, height_stride, width_stride;  // in elements
  int32_t in_channels;
  const void* weight;  // [kernel_height][kernel_width][in_channels][weight_columns]
  int32_t weight_columns;
  int32_t out_channels;
  const float* bias;  // weight_columns; null: 0
  void* output;
  int64_t output_pitch;
  int32_t relu;
};

// Maximum or average over windows; padding is never chosen and never averaged.
struct Pool {
  DType dtype;
  Window window;
  Segment input;
  void* output;
  int64_t output_pitch;
  int32_t out_channels;  // stored, at most those of the input
  int32_t average;
};

// The average of a whole map and a linear classifier: y[n, :] = weight @ mean(x[n]) + bias.
struct Head {
  DType dtype;
  int32_t batch, pixels;  // pixels of one image
  Segment input;
  const void* weight;  // [classes][input.channels], zeros behind the map's own channels
  int32_t classes;
  const float* bias;  // classes; null: 0
  void* output;       // [batch][classes]
};

// Copies a map of any strides into whole groups: y[pixel][c] = x[n, c, h, w], zeros behind it.
struct Gather {
  DType dtype;
  int32_t batch, channels, height, width;
  const void* input;
  int64_t batch_stride, channel_stride, height_stride, width_stride;  // in elements
  void* output;
  int32_t output_pitch;     // a multiple of 8
  int32_t output_channels;  // stored: channels and zeros, whole groups
};

// Packs a weight [out_channels][in_channels][taps] for Convolution: each segment's channels padded
// to whole groups, input channels before output channels; what is padded is zero.
struct Packing {
  DType source_dtype;  // float32 or dtype
  DType dtype;
  int32_t segment_count;
  int32_t channels[kMaxSegments];  // of the segments, not padded
  int32_t padded_in;               // kGroup: to whole groups; 1: not at all
  int32_t taps;
  int32_t out_channels;
  int32_t columns;           // out_channels and what is padded
  int32_t rows_are_outputs;  // 1: [columns][padded channels] instead, for Head; taps is 1
  const void* source;
  void* output;
};

// Packs vectors over the channels of segments, or over output channels as those of one segment.
struct VectorPacking {
  DType source_dtype;
  int32_t segment_count;
  int32_t channels[kMaxSegments];
  int32_t length;  // of the output, zeros behind the last channel
  const void* source;
  float* output;
};

// How a convolution is cut into thread blocks: a row of tile_table(), and the parts of its
// reduction.
struct Configuration {
  int32_t tile, parts;
};

struct Tile {
  int32_t pixels, columns, depth;  // depth: products added per stage of the pipeline
  int32_t threads, stages, shared_bytes;
};

// What the choice of a configuration has to know of a device.
struct Device {
  int32_t architecture;  // 80, 90, ...
  int32_t multiprocessors;
  int32_t shared_bytes;  // that one block may have
};

// The launchers. They check what they rely on and throw std::invalid_argument, and
// std::runtime_error with CUDA's text where a launch fails.

THRESHNET_FAST_EXPORT int tile_count(DType dtype);
THRESHNET_FAST_EXPORT Tile tile_of(DType dtype, int tile);
THRESHNET_FAST_EXPORT Configuration choose(const Convolution& convolution, const Device& device);
// Why no tile computes in a dtype on an architecture; null where one does.
THRESHNET_FAST_EXPORT const char* objection(DType dtype, int architecture);
THRESHNET_FAST_EXPORT int64_t partial_floats(const Convolution& convolution,
                                             const Configuration& configuration);
THRESHNET_FAST_EXPORT void convolve(const Convolution& convolution,
                                    const Configuration& configuration, Stream stream);

THRESHNET_FAST_EXPORT void convolve_stem(const StemConvolution& convolution, Stream stream);
THRESHNET_FAST_EXPORT void pool(const Pool& pool, Stream stream);
THRESHNET_FAST_EXPORT void head(const Head& head, Stream stream);
THRESHNET_FAST_EXPORT void gather(const Gather& gather, Stream stream);
THRESHNET_FAST_EXPORT void pack_weight(const Packing& packing, Stream stream);
THRESHNET_FAST_EXPORT void pack_vector(const VectorPacking& packing, Stream stream);

}  // namespace threshnet_fast::cuda
