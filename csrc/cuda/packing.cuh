// Packs weights and vectors as the kernels read them. What is padded is zero.
#pragma once

#include "elementwise.cuh"

namespace threshnet_fast::cuda {

constexpr int kPackingThreads = 256;
// A block transposes a square of a weight.
constexpr int kPackingTile = 32;

// Where packed channels come from: those of each segment padded to a multiple of `padded_in`.
struct SegmentMap {
  int32_t count;
  int32_t channels[kMaxSegments];
  int32_t padded_in;
};

// The channel that is packed at a place, -1 for padding.
__device__ __forceinline__ int source_channel(const SegmentMap& segments, int packed) {
  int first = 0;
  int packed_first = 0;
  for (int segment = 0; segment < segments.count; ++segment) {
    const int channels = segments.channels[segment];
    if (packed < packed_first + channels) return first + packed - packed_first;
    first += channels;
    packed_first += (channels + segments.padded_in - 1) / segments.padded_in * segments.padded_in;
    if (packed < packed_first) return -1;
  }
  return -1;
}

struct PackWeightParameters {
  const void* source;
  void* output;
  SegmentMap segments;
  int32_t taps, in_channels, out_channels;
  int32_t rows, columns;  // packed: of channels and of output channels
};

// [out_channels][in_channels][taps] to [taps][rows][columns]. A warp reads along the second and the
// third axis, which are one in memory but for padding, and writes along columns.
template <typename Source, typename T>
__global__ void __launch_bounds__(kPackingThreads)
    pack_weight_kernel(const __grid_constant__ PackWeightParameters p) {
  constexpr int kWarps = kPackingThreads / 32;
  static_assert(kPackingTile == 32, "a lane is a row of the tile, then a column");
  DYNAMIC_SHARED(memory);
  float* tile = reinterpret_cast<float*>(memory);  // [kPackingTile][kPackingTile + 1]
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int first_row = static_cast<int>(blockIdx.x) * kPackingTile;  // of rows and taps
  const int first_column = static_cast<int>(blockIdx.y) * kPackingTile;

  const int read_row = first_row + lane;
  const int channel = source_channel(p.segments, read_row / p.taps);
  const int64_t offset = int64_t{channel} * p.taps + read_row % p.taps;
#pragma unroll
  for (int step = 0; step < kPackingTile / kWarps; ++step) {
    const int column = step * kWarps + warp;
    float value = 0.0f;
    if (channel >= 0 && first_column + column < p.out_channels)
      value = to_float(__ldg(static_cast<const Source*>(p.source) + offset +
                             int64_t{first_column + column} * p.in_channels * p.taps));
    tile[column * (kPackingTile + 1) + lane] = value;
  }
  __syncthreads();
  if (first_column + lane >= p.columns) return;
#pragma unroll
  for (int step = 0; step < kPackingTile / kWarps; ++step) {
    const int row = step * kWarps + warp;
    if (first_row + row >= p.rows * p.taps) continue;
    const int packed = (first_row + row) / p.taps;
    const int tap = first_row + row - packed * p.taps;
    static_cast<T*>(p.output)[(int64_t{tap} * p.rows + packed) * p.columns + first_column + lane] =
        from_float<T>(tile[lane * (kPackingTile + 1) + row]);
  }
}

// [out_channels][in_channels] to [columns][rows]: nothing to transpose.
template <typename Source, typename T>
__global__ void __launch_bounds__(kPackingThreads)
    pack_rows_kernel(const __grid_constant__ PackWeightParameters p) {
  const int64_t place = int64_t{blockIdx.x} * kPackingThreads + threadIdx.x;
  const int output_channel = static_cast<int>(place / p.rows);
  if (output_channel >= p.columns) return;
  const int channel =
      source_channel(p.segments, static_cast<int>(place - int64_t{output_channel} * p.rows));
  float value = 0.0f;
  if (channel >= 0 && output_channel < p.out_channels)
    value = to_float(__ldg(static_cast<const Source*>(p.source) +
                           int64_t{output_channel} * p.in_channels + channel));
  static_cast<T*>(p.output)[place] = from_float<T>(value);
}

struct PackVectorParameters {
  const void* source;
  float* output;
  SegmentMap segments;
  int32_t length;
};

template <typename Source>
__global__ void __launch_bounds__(kPackingThreads)
    pack_vector_kernel(const __grid_constant__ PackVectorParameters p) {
  const int64_t place = int64_t{blockIdx.x} * kPackingThreads + threadIdx.x;
  if (place >= p.length) return;
  const int channel = source_channel(p.segments, static_cast<int>(place));
  p.output[place] =
      channel >= 0 ? to_float(__ldg(static_cast<const Source*>(p.source) + channel)) : 0.0f;
}

}  // namespace threshnet_fast::cuda
