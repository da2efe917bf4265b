// Convolution of a concatenation as one matrix product, with prologue and epilogue. A row of the
// product is an output pixel, a column an output channel. The reduction runs over groups of 16
// channels: over the taps of the window and, within a tap, over the channels of all segments. The
// concatenation, the normalised input and the patches of the window are never stored.
#pragma once

#include "operands.h"
#include "primitives.cuh"

namespace threshnet_fast::cuda {

struct ImplicitGemmParameters {
  Segment segments[kMaxSegments];
  const void* weight;  // of the first tap that can meet a pixel
  const float* scale;
  const float* shift;
  const float* output_scale;
  const float* bias;
  void* output;
  float* partials;  // [parts][pixels][weight_columns]; null: the reduction is not split
  int64_t output_pitch;
  int32_t segment_count, channels;  // channels: of all segments
  int32_t pixels, in_height, in_width, out_height, out_width;
  int32_t stride, pad_rows, pad_columns;  // padding less the taps that never meet a pixel
  int32_t tap_rows, tap_columns, kernel_columns;
  int32_t weight_columns, out_channels, column_tiles;
  int32_t relu, vector_store;  // vector_store: 16 bytes of an output pixel can be written at once
};

// Where 16 bytes lie in a tile of rows of `kChunks` times 16 bytes: an exclusive or with the row
// spreads a column of chunks over all banks.
template <int kChunks>
__device__ __forceinline__ int swizzled(int row, int chunk) {
  static_assert(kChunks >= 2 && (kChunks & (kChunks - 1)) == 0, "the swizzle permutes powers of 2");
  constexpr int kRowsPerLine = kChunks < 8 ? 8 / kChunks : 1;
  constexpr int kMask = kChunks < 8 ? kChunks - 1 : 7;
  return row * kChunks + (chunk ^ (row / kRowsPerLine & kMask));
}

// Products of 16-bit elements by tensor cores: each warp computes a part of the tile.
template <typename T, int kPixels, int kColumns, int kPixelWarps, int kColumnWarps>
class TensorCores {
 public:
  static constexpr int kThreads = 32 * kPixelWarps * kColumnWarps;
  // Blocks that a multiprocessor can hold at least. Said so, the compiler takes the registers that
  // this leaves; unsaid, it spills some to make room for one more block.
  static constexpr int kBlocks = kPixels * kColumns < 8192 ? 4 : kThreads == 256 ? 1 : 2;
  using Chunk = Vector<T>;
  static constexpr int kLeftChunks = kGroup / Chunk::kElements;
  static constexpr int kRightChunks = kColumns / Chunk::kElements;

  __device__ __forceinline__ explicit TensorCores(int thread)
      : lane_(thread % 32),
        row_(thread / 32 / kColumnWarps * kWarpPixels),
        column_(thread / 32 % kColumnWarps * kWarpColumns) {}

  // Adds the products of one group of channels: left [kPixels][16], right [16][kColumns].
  __device__ __forceinline__ void multiply(const Chunk* left, const Chunk* right) {
    uint32_t a[kPixelTiles][4];
#pragma unroll
    for (int i = 0; i < kPixelTiles; ++i)
      load_matrices(a[i], left + swizzled<kLeftChunks>(row_ + 16 * i + lane_ % 16, lane_ / 16));
#pragma unroll
    for (int j = 0; j < kColumnTiles; j += 2) {
      uint32_t b[4];
      const int chunk = column_ / 8 + j + lane_ / 16;
      load_matrices_transposed(b, right + swizzled<kRightChunks>(lane_ % 16, chunk));
#pragma unroll
      for (int i = 0; i < kPixelTiles; ++i) {
        multiply_add<T>(sums_[i][j], a[i], b[0], b[1]);
        multiply_add<T>(sums_[i][j + 1], a[i], b[2], b[3]);
      }
    }
  }

  // Calls visit(row, column, sums) for the thread's pairs of neighbouring columns.
  template <typename Visit>
  __device__ __forceinline__ void for_each(Visit visit) const {
#pragma unroll
    for (int i = 0; i < kPixelTiles; ++i) {
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
        const int row = row_ + 16 * i + lane_ / 4;
        const int column = column_ + 8 * j + 2 * (lane_ % 4);
        visit(row, column, make_float2(sums_[i][j][0], sums_[i][j][1]));
        visit(row + 8, column, make_float2(sums_[i][j][2], sums_[i][j][3]));
      }
    }
  }

 private:
  static constexpr int kWarpPixels = kPixels / kPixelWarps;
  static constexpr int kWarpColumns = kColumns / kColumnWarps;
  static constexpr int kPixelTiles = kWarpPixels / 16;
  static constexpr int kColumnTiles = kWarpColumns / 8;
  static_assert(kPixelTiles > 0 && kColumnTiles % 2 == 0, "a warp takes at least 16 x 16");

  int lane_, row_, column_;
  float sums_[kPixelTiles][kColumnTiles][4] = {};
};

// Products in float32, exact: each thread computes 4 neighbouring columns of every so many rows.
// Sums are taken in chains of 128 products, which are then added up: the rounding errors of one
// long chain would be several times as large.
template <int kPixels, int kColumns>
class FloatUnits {
 public:
  static constexpr int kThreads = 128;
  static constexpr int kBlocks = kPixels * kColumns < 4096 ? 4 : 2;
  using Chunk = Vector<float>;
  static constexpr int kLeftChunks = kGroup / Chunk::kElements;
  static constexpr int kRightChunks = kColumns / Chunk::kElements;

  __device__ __forceinline__ explicit FloatUnits(int thread)
      : row_(thread / kRightChunks), chunk_(thread % kRightChunks) {}

  __device__ __forceinline__ void multiply(const Chunk* left, const Chunk* right) {
#pragma unroll
    for (int k = 0; k < kLeftChunks; ++k) {
      Chunk b[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) b[i] = right[swizzled<kRightChunks>(4 * k + i, chunk_)];
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        const Chunk a = left[swizzled<kLeftChunks>(row_ + row * kRowStep, k)];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j)
            chain_[row][j] = fmaf(a.elements[i], b[i].elements[j], chain_[row][j]);
        }
      }
    }
    if (++length_ < kChainGroups) return;
    length_ = 0;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        sums_[row][j] += chain_[row][j];
        chain_[row][j] = 0.0f;
      }
    }
  }

  template <typename Visit>
  __device__ __forceinline__ void for_each(Visit visit) const {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
#pragma unroll
      for (int j = 0; j < 4; j += 2)
        visit(row_ + row * kRowStep, 4 * chunk_ + j,
              make_float2(sums_[row][j] + chain_[row][j], sums_[row][j + 1] + chain_[row][j + 1]));
    }
  }

 private:
  static constexpr int kChainGroups = 8;
  static constexpr int kRowStep = kThreads / kRightChunks;
  static constexpr int kRows = kPixels / kRowStep;
  static_assert(kRows > 0, "a thread has at least one row");

  int row_, chunk_;
  int length_ = 0;  // groups in the chain
  float chain_[kRows][4] = {};
  float sums_[kRows][4] = {};
};

// A tile of the product and the pipeline that feeds it.
template <typename T_, int kPixels_, int kColumns_, int kGroups_, int kStages_, typename Units_>
struct GemmTile {
  using T = T_;
  using Units = Units_;
  using Chunk = Vector<T>;
  static constexpr int kPixels = kPixels_;
  static constexpr int kColumns = kColumns_;
  static constexpr int kGroups = kGroups_;  // groups of channels that a stage holds
  static constexpr int kStages = kStages_;
  static constexpr int kThreads = Units::kThreads;
  static constexpr int kLeft = kPixels * Units::kLeftChunks;     // chunks of a group
  static constexpr int kRight = kGroup * Units::kRightChunks;    // chunks of a group
  static constexpr int kStage = kGroups * (kLeft + kRight);      // chunks of a stage
  static constexpr int kOutput = kPixels * Units::kRightChunks;  // chunks of the rounded results
  static constexpr int kSharedBytes = kStages * kStage * 16;
  static_assert(kOutput <= kStages * kStage, "the results take the place of the pipeline");
};

// A group of channels, as the reduction reaches it.
struct ReductionCursor {
  int tap_row, tap_column, segment, channel;  // channel: within the segment
  int concatenated;                           // the channel in the concatenation

  __device__ __forceinline__ ReductionCursor(const ImplicitGemmParameters& p, int group) {
    const int groups_of_tap = p.channels / kGroup;
    const int tap = group / groups_of_tap;
    tap_row = tap / p.tap_columns;
    tap_column = tap - tap_row * p.tap_columns;
    concatenated = (group - tap * groups_of_tap) * kGroup;
    segment = 0;
    channel = concatenated;
    while (channel >= p.segments[segment].channels) channel -= p.segments[segment++].channels;
  }

  __device__ __forceinline__ void advance(const ImplicitGemmParameters& p) {
    concatenated += kGroup;
    channel += kGroup;
    if (channel < p.segments[segment].channels) return;
    channel = 0;
    if (++segment < p.segment_count) return;
    segment = 0;
    concatenated = 0;
    if (++tap_column < p.tap_columns) return;
    tap_column = 0;
    ++tap_row;
  }
};

// The pixels that a thread copies: the same rows of the tile in every step.
template <typename Tile>
class PixelRows {
 public:
  static constexpr int kPasses = (Tile::kLeft + Tile::kThreads - 1) / Tile::kThreads;

  __device__ __forceinline__ PixelRows(const ImplicitGemmParameters& p, int first_pixel,
                                       int thread) {
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int item = pass * Tile::kThreads + thread;
      const int tile_pixel = first_pixel + item / Tile::Units::kLeftChunks;
      const bool exists = item < Tile::kLeft && tile_pixel < p.pixels;
      const int pixel = exists ? tile_pixel : 0;
      const int row = pixel / p.out_width;
      const int column = pixel - row * p.out_width;
      const int image = row / p.out_height;
      top_[pass] = (row - image * p.out_height) * p.stride - p.pad_rows;
      left_[pass] = column * p.stride - p.pad_columns;
      origin_[pass] = (image * p.in_height + top_[pass]) * p.in_width + left_[pass];
      // No tap of such a row lies inside of the map.
      if (!exists) top_[pass] = p.in_height;
    }
  }

  // Whether a tap of the pixel lies inside of the map: padding does not.
  __device__ __forceinline__ bool inside(const ImplicitGemmParameters& p, const ReductionCursor& at,
                                         int pass) const {
    const int y = top_[pass] + at.tap_row;
    const int x = left_[pass] + at.tap_column;
    return y >= 0 && y < p.in_height && x >= 0 && x < p.in_width;
  }

  __device__ __forceinline__ int64_t pixel(const ImplicitGemmParameters& p,
                                           const ReductionCursor& at, int pass) const {
    return origin_[pass] + at.tap_row * p.in_width + at.tap_column;
  }

 private:
  int top_[kPasses], left_[kPasses], origin_[kPasses];
};

// Starts the copies of one group of channels.
template <typename Tile>
__device__ __forceinline__ void copy_group(const ImplicitGemmParameters& p,
                                           const PixelRows<Tile>& rows, const ReductionCursor& at,
                                           bool exists, int first_column, int thread,
                                           typename Tile::Chunk* left,
                                           typename Tile::Chunk* right) {
  using T = typename Tile::T;
  constexpr int kElements = Tile::Chunk::kElements;
  constexpr int kLeftChunks = Tile::Units::kLeftChunks;
  constexpr int kRightChunks = Tile::Units::kRightChunks;
  const Segment& segment = p.segments[exists ? at.segment : 0];
  const T* const data = static_cast<const T*>(segment.data);
#pragma unroll
  for (int pass = 0; pass < PixelRows<Tile>::kPasses; ++pass) {
    const int item = pass * Tile::kThreads + thread;
    if (Tile::kLeft % Tile::kThreads != 0 && item >= Tile::kLeft) break;
    const int chunk = item % kLeftChunks;
    const bool inside = exists && rows.inside(p, at, pass);
    const T* from = data + rows.pixel(p, at, pass) * segment.pitch + at.channel + chunk * kElements;
    copy_async_16(left + swizzled<kLeftChunks>(item / kLeftChunks, chunk), inside ? from : data,
                  inside);
  }
  const T* const weight = static_cast<const T*>(p.weight);
  const int tap = at.tap_row * p.kernel_columns + at.tap_column;
  const int64_t first_row = int64_t{tap} * p.channels + at.concatenated;
#pragma unroll
  for (int item = thread; item < Tile::kRight; item += Tile::kThreads) {
    const int row = item / kRightChunks;
    const int chunk = item % kRightChunks;
    const int column = first_column + chunk * kElements;
    const bool inside = exists && column < p.weight_columns;
    const T* from = weight + (first_row + row) * p.weight_columns + column;
    copy_async_16(right + swizzled<kRightChunks>(row, chunk), inside ? from : weight, inside);
  }
}

// Normalises and rectifies what this thread copied of a group. Padding stays zero.
template <typename Tile>
__device__ __forceinline__ void apply_prologue(const ImplicitGemmParameters& p,
                                               const PixelRows<Tile>& rows,
                                               const ReductionCursor& at, int thread,
                                               typename Tile::Chunk* left) {
  using T = typename Tile::T;
  constexpr int kElements = Tile::Chunk::kElements;
  constexpr int kLeftChunks = Tile::Units::kLeftChunks;
#pragma unroll
  for (int pass = 0; pass < PixelRows<Tile>::kPasses; ++pass) {
    const int item = pass * Tile::kThreads + thread;
    if (Tile::kLeft % Tile::kThreads != 0 && item >= Tile::kLeft) break;
    if (!rows.inside(p, at, pass)) continue;
    const int chunk = item % kLeftChunks;
    const int channel = at.concatenated + chunk * kElements;
    auto& place = left[swizzled<kLeftChunks>(item / kLeftChunks, chunk)];
    auto values = place;
#pragma unroll
    for (int i = 0; i < kElements; i += 4) {
      const auto scale = *reinterpret_cast<const Vector<float>*>(p.scale + channel + i);
      const auto shift = *reinterpret_cast<const Vector<float>*>(p.shift + channel + i);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float value = to_float(values.elements[i + j]);
        values.elements[i + j] =
            from_float<T>(rectify(fmaf(value, scale.elements[j], shift.elements[j])));
      }
    }
    place = values;
  }
}

// Scales, adds the bias and rectifies two neighbouring sums.
struct Epilogue {
  const float* output_scale;
  const float* bias;
  bool relu;

  __device__ __forceinline__ float operator()(float sum, int column) const {
    if (output_scale != nullptr) sum *= output_scale[column];
    if (bias != nullptr) sum += bias[column];
    return relu ? rectify(sum) : sum;
  }
};

// Rounds the sums into shared memory and writes them out, 16 bytes at a time where possible.
template <typename Tile>
__device__ __forceinline__ void store_tile(const ImplicitGemmParameters& p,
                                           const typename Tile::Units& units, int first_pixel,
                                           int first_column, int thread,
                                           typename Tile::Chunk* shared) {
  using T = typename Tile::T;
  constexpr int kElements = Tile::Chunk::kElements;
  constexpr int kChunks = Tile::Units::kRightChunks;
  const Epilogue epilogue{p.output_scale, p.bias, p.relu != 0};
  units.for_each([&](int row, int column, float2 sums) {
    // Scale and bias are as long as the weight is wide, an even number.
    if (first_column + column >= p.weight_columns) return;
    T* to = shared[swizzled<kChunks>(row, column / kElements)].elements + column % kElements;
    to[0] = from_float<T>(epilogue(sums.x, first_column + column));
    to[1] = from_float<T>(epilogue(sums.y, first_column + column + 1));
  });
  __syncthreads();
  for (int item = thread; item < Tile::kOutput; item += Tile::kThreads) {
    const int row = item / kChunks;
    const int chunk = item % kChunks;
    const int column = first_column + chunk * kElements;
    if (first_pixel + row >= p.pixels || column >= p.out_channels) continue;
    const auto& from = shared[swizzled<kChunks>(row, chunk)];
    T* to = static_cast<T*>(p.output) + (first_pixel + row) * p.output_pitch + column;
    if (p.vector_store && column + kElements <= p.out_channels) {
      *reinterpret_cast<typename Tile::Chunk*>(to) = from;
    } else {
      const int count = min(kElements, p.out_channels - column);
      for (int i = 0; i < count; ++i) to[i] = from.elements[i];
    }
  }
}

// Computes one tile of the output, or one part of its sums. Blocks along x run over the tiles,
// those of the same pixels next to each other; blocks along y over the parts of the reduction.
template <typename Tile, bool kPrologue>
__global__ void __launch_bounds__(Tile::kThreads, Tile::Units::kBlocks)
    implicit_gemm_kernel(const __grid_constant__ ImplicitGemmParameters p) {
  using Chunk = typename Tile::Chunk;
  DYNAMIC_SHARED(shared_bytes);
  Chunk* const shared = reinterpret_cast<Chunk*>(shared_bytes);
  const int thread = static_cast<int>(threadIdx.x);
  const int tile = static_cast<int>(blockIdx.x);
  const int first_pixel = tile / p.column_tiles * Tile::kPixels;
  const int first_column = tile % p.column_tiles * Tile::kColumns;
  const int64_t groups = int64_t{p.tap_rows} * p.tap_columns * (p.channels / kGroup);
  const int first_group = static_cast<int>(groups * blockIdx.y / gridDim.y);
  const int last_group = static_cast<int>(groups * (blockIdx.y + 1) / gridDim.y);
  const int steps = (last_group - first_group + Tile::kGroups - 1) / Tile::kGroups;

  const PixelRows<Tile> rows(p, first_pixel, thread);
  typename Tile::Units units(thread);
  ReductionCursor copied(p, first_group);
  ReductionCursor ready = copied;
  int copied_group = first_group;
  int ready_group = first_group;

  const auto copy_stage = [&](int step) {
    Chunk* const stage = shared + step % Tile::kStages * Tile::kStage;
#pragma unroll
    for (int group = 0; group < Tile::kGroups; ++group) {
      copy_group<Tile>(p, rows, copied, copied_group < last_group, first_column, thread,
                       stage + group * Tile::kLeft,
                       stage + Tile::kGroups * Tile::kLeft + group * Tile::kRight);
      if (++copied_group < last_group) copied.advance(p);
    }
  };

#pragma unroll
  for (int step = 0; step < Tile::kStages - 1; ++step) {
    if (step < steps) copy_stage(step);
    copy_async_commit();
  }
  for (int step = 0; step < steps; ++step) {
    Chunk* const stage = shared + step % Tile::kStages * Tile::kStage;
    copy_async_wait<Tile::kStages - 2>();
    if (kPrologue) {
#pragma unroll
      for (int group = 0; group < Tile::kGroups; ++group) {
        if (ready_group < last_group)
          apply_prologue<Tile>(p, rows, ready, thread, stage + group * Tile::kLeft);
        if (++ready_group < last_group) ready.advance(p);
      }
    }
    // All copies of this step are there, and all products of the last one are done: its stage is
    // free for the copies that start now.
    __syncthreads();
    if (step + Tile::kStages - 1 < steps) copy_stage(step + Tile::kStages - 1);
    copy_async_commit();
#pragma unroll
    for (int group = 0; group < Tile::kGroups; ++group)
      units.multiply(stage + group * Tile::kLeft,
                     stage + Tile::kGroups * Tile::kLeft + group * Tile::kRight);
  }

  if (p.partials != nullptr) {
    float* const partials = p.partials + int64_t{blockIdx.y} * p.pixels * p.weight_columns;
    units.for_each([&](int row, int column, float2 sums) {
      const int64_t pixel = first_pixel + row;
      column += first_column;
      if (pixel < p.pixels && column < p.weight_columns)
        *reinterpret_cast<float2*>(partials + pixel * p.weight_columns + column) = sums;
    });
    return;
  }
  // Products of the last steps may still be read, and copies of none are under way.
  __syncthreads();
  store_tile<Tile>(p, units, first_pixel, first_column, thread, shared);
}

struct SplitReductionParameters {
  const float* partials;  // [parts][pixels][columns]
  const float* output_scale;
  const float* bias;
  void* output;
  int64_t output_pitch;
  int32_t parts, pixels, columns, out_channels;
  int32_t relu, vector_store;
};

constexpr int kSplitReductionThreads = 128;

// Adds the parts of the reduction, always in the same order, and ends with the epilogue. A thread
// computes 4 columns of a pixel.
template <typename T>
__global__ void __launch_bounds__(kSplitReductionThreads)
    split_reduction_kernel(const __grid_constant__ SplitReductionParameters p) {
  const int quads = p.columns / 4;
  const int64_t item = int64_t{blockIdx.x} * kSplitReductionThreads + threadIdx.x;
  const int64_t pixel = item / quads;
  const int column = static_cast<int>(item - pixel * quads) * 4;
  if (pixel >= p.pixels || column >= p.out_channels) return;
  const int64_t part_size = int64_t{p.pixels} * p.columns;
  const float* from = p.partials + pixel * p.columns + column;
  float sums[4] = {};
  for (int part = 0; part < p.parts; ++part, from += part_size) {
    const auto values = *reinterpret_cast<const Vector<float>*>(from);
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[i] += values.elements[i];
  }
  const Epilogue epilogue{p.output_scale, p.bias, p.relu != 0};
  struct alignas(4 * sizeof(T)) Quad {
    T elements[4];
  } results;
#pragma unroll
  for (int i = 0; i < 4; ++i) results.elements[i] = from_float<T>(epilogue(sums[i], column + i));
  T* to = static_cast<T*>(p.output) + pixel * p.output_pitch + column;
  if (p.vector_store && column + 4 <= p.out_channels) {
    *reinterpret_cast<Quad*>(to) = results;
  } else {
    const int count = min(4, p.out_channels - column);
    for (int i = 0; i < count; ++i) to[i] = results.elements[i];
  }
}

// What a dtype's translation unit offers: its tiles and kernels.
struct GemmKernels {
  int count;
  const Tile* tiles;
  // [count][2], without and with a prologue.
  void (*const (*kernels)[2])(ImplicitGemmParameters);
  void (*reduction)(SplitReductionParameters);
};

// Lists the kernels of some tiles; the first template argument is the dtype.
template <typename T, typename... Tiles>
GemmKernels gemm_kernels() {
  static const Tile tiles[] = {{Tiles::kPixels, Tiles::kColumns, Tiles::kGroups * kGroup,
                                Tiles::kThreads, Tiles::kStages, Tiles::kSharedBytes}...};
  static void (*const kernels[][2])(ImplicitGemmParameters) = {
      {implicit_gemm_kernel<Tiles, false>, implicit_gemm_kernel<Tiles, true>}...};
  return {sizeof...(Tiles), tiles, kernels, split_reduction_kernel<T>};
}

template <typename T>
GemmKernels tensor_core_kernels() {
  return gemm_kernels<T, GemmTile<T, 128, 128, 2, 3, TensorCores<T, 128, 128, 2, 4>>,
                      GemmTile<T, 128, 64, 2, 4, TensorCores<T, 128, 64, 2, 2>>,
                      GemmTile<T, 64, 64, 4, 3, TensorCores<T, 64, 64, 2, 2>>,
                      GemmTile<T, 64, 32, 4, 3, TensorCores<T, 64, 32, 2, 2>>,
                      GemmTile<T, 32, 32, 4, 4, TensorCores<T, 32, 32, 2, 2>>,
                      GemmTile<T, 16, 64, 4, 4, TensorCores<T, 16, 64, 1, 4>>>();
}

GemmKernels float16_kernels();
GemmKernels bfloat16_kernels();
GemmKernels float32_kernels();

}  // namespace threshnet_fast::cuda
