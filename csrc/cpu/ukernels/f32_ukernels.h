// The fp32 micro-kernels, written once over `Vector`, a type that each instruction set's source file
// defines before it includes this header. Everything lives in an unnamed namespace: each source file
// gets its own copies, compiled for its own instruction set.
#pragma once

#include "../ukernels.h"

namespace threshnet_fast::cpu {
namespace {

constexpr int32_t kOrder[kMaxTilePixels] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13};

// How many products a chain of additions takes before it is added to the sum of the chains before it:
// the rounding error then grows with the square root of 256 plus the number of chains, not of all
// products.
constexpr int64_t kChainChannels = 256;

// Broadcast a pixel's channel, multiply it by vectors of output channels: with kPixels * kVectors
// accumulators in registers, every weight vector loaded serves kPixels multiply-adds.
template <int kPixels, int kVectors>
void conv_tile(const ConvTile& tile) {
  constexpr int64_t kLanes = Vector::kLanes;
  Vector accumulator[kPixels][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kPixels; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) accumulator[i][j] = Vector::zero();
  }
  float sums[kPixels][kVectors * kLanes];
  const float* initial = tile.initial;
  const int32_t* initial_rows = tile.initial_rows;
  int64_t initial_pitch = tile.initial_pitch;
  int64_t chain = 0;

  for (int64_t r = 0; r < tile.run_count; ++r) {
    const ChannelRun& run = tile.runs[r];
    const float* weights = run.weights;
    for (int64_t first = 0; first < run.channels; first += kChainChannels) {
      const int64_t left = run.channels - first;
      const int64_t channels = left < kChainChannels ? left : kChainChannels;
      if (chain + channels > kChainChannels) {
#pragma GCC unroll 16
        for (int i = 0; i < kPixels; ++i) {
          const float* row = initial + initial_rows[i] * initial_pitch;
#pragma GCC unroll 4
          for (int j = 0; j < kVectors; ++j) {
            accumulator[i][j].add(Vector::load(row + j * kLanes));
            accumulator[i][j].store(sums[i] + j * kLanes);
            accumulator[i][j] = Vector::zero();
          }
        }
        initial = sums[0];
        initial_rows = kOrder;
        initial_pitch = kVectors * kLanes;
        chain = 0;
      }
      chain += channels;
      const float* pixel[kPixels];
#pragma GCC unroll 16
      for (int i = 0; i < kPixels; ++i)
        pixel[i] = run.input + tile.input_pixels[i] * run.pitch + first;
      for (int64_t c = 0; c < channels; ++c) {
        Vector weight[kVectors];
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) weight[j] = Vector::load(weights + j * kLanes);
        weights += kVectors * kLanes;
#pragma GCC unroll 16
        for (int i = 0; i < kPixels; ++i) {
          const Vector value = Vector::broadcast(pixel[i] + c);
#pragma GCC unroll 4
          for (int j = 0; j < kVectors; ++j) accumulator[i][j].multiply_add(value, weight[j]);
        }
      }
    }
  }

#pragma GCC unroll 16
  for (int i = 0; i < kPixels; ++i) {
    const float* row = initial + initial_rows[i] * initial_pitch;
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) accumulator[i][j].add(Vector::load(row + j * kLanes));
  }
  if (tile.relu) {
#pragma GCC unroll 16
    for (int i = 0; i < kPixels; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) accumulator[i][j].relu();
    }
  }
  const bool whole = tile.channels == kVectors * kLanes;
#pragma GCC unroll 16
  for (int i = 0; i < kPixels; ++i) {
    float* row = tile.output + tile.output_rows[i] * tile.output_pitch;
    if (whole) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) accumulator[i][j].store(row + j * kLanes);
    } else {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        const int64_t left = tile.channels - j * kLanes;
        if (left > 0) accumulator[i][j].store(row + j * kLanes, left < kLanes ? left : kLanes);
      }
    }
  }
}

void bn_relu(const float* input, const float* scale, const float* shift, int64_t channels,
             float* output) {
  constexpr int64_t kLanes = Vector::kLanes;
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) {
    Vector value = Vector::load(shift + c);
    value.multiply_add(Vector::load(input + c), Vector::load(scale + c));
    value.relu();
    value.store(output + c);
  }
  if (const int64_t left = channels - c; left > 0) {
    Vector value = Vector::load(shift + c, left);
    value.multiply_add(Vector::load(input + c, left), Vector::load(scale + c, left));
    value.relu();
    value.store(output + c, left);
  }
}

void max_pool(const float* input, const int64_t* offsets, int64_t count, int64_t channels, float,
              float* output) {
  constexpr int64_t kLanes = Vector::kLanes;
  for (int64_t c = 0; c < channels; c += kLanes) {
    const int64_t left = channels - c < kLanes ? channels - c : kLanes;
    Vector result = Vector::load(input + offsets[0] + c, left);
    for (int64_t i = 1; i < count; ++i) result.maximum(Vector::load(input + offsets[i] + c, left));
    result.store(output + c, left);
  }
}

void average_pool(const float* input, const int64_t* offsets, int64_t count, int64_t channels,
                  float factor, float* output) {
  constexpr int64_t kLanes = Vector::kLanes;
  for (int64_t c = 0; c < channels; c += kLanes) {
    const int64_t left = channels - c < kLanes ? channels - c : kLanes;
    Vector sum = Vector::load(input + offsets[0] + c, left);
    for (int64_t i = 1; i < count; ++i) sum.add(Vector::load(input + offsets[i] + c, left));
    sum.scale(factor);
    sum.store(output + c, left);
  }
}

// [vectors][pixels]; a tile wider than the registers allow is left out.
#define THRESHNET_FAST_ROW_4(V) nullptr, conv_tile<1, V>, conv_tile<2, V>, conv_tile<3, V>, conv_tile<4, V>
#define THRESHNET_FAST_ROW_6(V) THRESHNET_FAST_ROW_4(V), conv_tile<5, V>, conv_tile<6, V>
#define THRESHNET_FAST_ROW_9(V) \
  THRESHNET_FAST_ROW_6(V), conv_tile<7, V>, conv_tile<8, V>, conv_tile<9, V>
#define THRESHNET_FAST_ROW_14(V)                                                           \
  THRESHNET_FAST_ROW_9(V), conv_tile<10, V>, conv_tile<11, V>, conv_tile<12, V>, conv_tile<13, V>, \
      conv_tile<14, V>

}  // namespace
}  // namespace threshnet_fast::cpu
