// What convolution takes on the processors that the micro-kernels are for, and what fits in their
// caches: by these the layers' algorithms and the parts that they are computed in are chosen.
// Measured once for each kind of micro-kernels (docs/performance.md), of which ukernels/kinds.cpp
// has the figures.
#pragma once

#include <cstdint>

namespace threshnet_fast::cpu {

// Of one thread, in nanoseconds.
struct Costs {
  double products;             // products that the micro-kernels add up in one
  double weight_bytes;         // bytes of weights that arrive from memory in one
  double winograd_2x2_input;   // to transform a vector of channels of a tile's inputs
  double winograd_2x2_output;  // and of its products
  double winograd_4x4_input;
  double winograd_4x4_output;
  double step;  // until all threads have begun another step
};

// Inference. From as many input channels on, Winograd's algorithm is compared with the others.
constexpr int64_t kWinogradChannels = 16;
// Up to so many input channels and vectors of output channels, one task does all of it.
constexpr int64_t kTaskChannels = 256;
constexpr int64_t kTaskVectors = 4;
// What a block's transformed inputs and products may hold of L2, beside the weights, and the most
// tiles of one.
constexpr int64_t kWinogradBytes = 320 * 1024;
constexpr int64_t kWinogradTiles = 56;
// How much of the last level of cache transformed inputs may take.
constexpr int64_t kTransformBytes = 16 * 1024 * 1024;
// Half of a 1 MiB L2: what a task may hold of weights and inputs while its tiles stream past them.
constexpr int64_t kChunkBytes = 512 * 1024;
// What a task may gather of its input into packed panels.
constexpr int64_t kPackBytes = 192 * 1024;
// Up to this many pixels reading the weights takes longer than multiplying by them, so that it pays
// to split them between the cores even by taps; a small convolution is not worth the second
// barrier.
constexpr int64_t kSplitPixels = 14;
constexpr int64_t kSplitWeightBytes = 64 * 1024;

// Training, where an image is read, normalised and transformed anew by every band. From as many
// channels on the products of Winograd's tiles cost more than their transforms, and from as many
// pixels of a map on there are enough tiles.
constexpr int64_t kTrainingWinogradChannels = 12;
constexpr int64_t kTrainingWinogradPixels = 100;
// Tiles of a band, by their size: as many as a position's weights are worth being read for.
constexpr int64_t band_tiles(int64_t tile) { return tile == 2 ? 56 : 28; }
// Floats that the parts of a band should fit in together, well inside a core's L2.
constexpr int64_t kBandFloats = 48 * 1024;
// Floats of the normalised inputs from which Winograd's tiles are taken.
constexpr int64_t kPatchFloats = 96 * 1024;
// Floats of one panel's weights that pass by while a band stays.
constexpr int64_t kPanelFloats = 32 * 1024;
// Input channels whose tiles are there at once.
constexpr int64_t kTileChannels = 64;
// Floats of a weight's gradient that stay in L2 while pixels pass by.
constexpr int64_t kGradientFloats = 80 * 1024;
// Floats of the rows of a band of a pool or a depthwise convolution.
constexpr int64_t kWindowFloats = 32 * 1024;

}  // namespace threshnet_fast::cpu
