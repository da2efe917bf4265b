// Convolution of a concatenation as one matrix product, with prologue and epilogue. A row of the
// product is an output pixel, a column an output channel. The reduction runs over groups of 16
// channels: over the taps of the window and, within a tap, over the channels of all segments. The
// concatenation, the normalised input and the patches of the window are never stored.
#pragma once

#include "elementwise.cuh"
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

// Rows after which every swizzle repeats itself: a place so many rows on is at a distance that the
// compiler knows.
constexpr int kSwizzleRows = 8;

// Neighbouring columns of the product.
template <int kCount>
struct alignas(4 * kCount) Sums {
  float values[kCount];
};

// Products of 16-bit elements by tensor cores: each warp computes a part of the tile.
template <typename T, int kPixels, int kColumns, int kPixelWarps, int kColumnWarps>
class TensorCores {
 public:
  static constexpr int kThreads = 32 * kPixelWarps * kColumnWarps;
  // Blocks that a multiprocessor can hold at least. Said so, the compiler takes the registers that
  // this leaves; unsaid, it spills some to make room for one more block. Of the larger tiles it
  // holds no more for want of shared memory.
  static constexpr int kBlocks = kPixels * kColumns < 4096 ? 4 : kPixels * kColumns < 8192 ? 3 : 2;
  using Chunk = Vector<T>;
  static constexpr int kLeftChunks = kGroup / Chunk::kElements;
  static constexpr int kRightChunks = kColumns / Chunk::kElements;
  static constexpr int kRun = 2;  // neighbouring columns that a thread has the sums of

  __device__ __forceinline__ explicit TensorCores(int thread) {
    const int lane = thread % 32;
    const int row = thread / 32 / kColumnWarps * kWarpPixels;
    const int column = thread / 32 % kColumnWarps * kWarpColumns;
    row_ = row + lane / 4;
    column_ = column + 2 * (lane % 4);
    left_ = swizzled<kLeftChunks>(row + lane % 16, lane / 16);
#pragma unroll
    for (int j = 0; j < kColumnTiles / 2; ++j)
      right_[j] = right_place(lane % 16, column / 8 + 2 * j + lane / 16);
  }

  // Where a chunk of the right matrix, or of the results, lies.
  __device__ __forceinline__ static int right_place(int row, int chunk) {
    return swizzled<kRightChunks>(row, chunk);
  }

  // Adds the products of one group of channels: left [kPixels][16], right [16][kColumns].
  __device__ __forceinline__ void multiply(const Chunk* left, const Chunk* right) {
    static_assert(16 % kSwizzleRows == 0);
    uint32_t a[kPixelTiles][4];
#pragma unroll
    for (int i = 0; i < kPixelTiles; ++i) load_matrices(a[i], left + left_ + 16 * i * kLeftChunks);
#pragma unroll
    for (int j = 0; j < kColumnTiles; j += 2) {
      uint32_t b[4];
      load_matrices_transposed(b, right + right_[j / 2]);
#pragma unroll
      for (int i = 0; i < kPixelTiles; ++i) {
        multiply_add<T>(sums_[i][j], a[i], b[0], b[1]);
        multiply_add<T>(sums_[i][j + 1], a[i], b[2], b[3]);
      }
    }
  }

  // Calls visit(row, sums, prepared) for each run of sums, and prepare(column), which returns what
  // is prepared, once for all rows.
  template <typename Prepare, typename Visit>
  __device__ __forceinline__ void for_each(Prepare prepare, Visit visit) const {
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
      const auto prepared = prepare(column_ + 8 * j);
#pragma unroll
      for (int i = 0; i < kPixelTiles; ++i) {
        visit(row_ + 16 * i, Sums<2>{sums_[i][j][0], sums_[i][j][1]}, prepared);
        visit(row_ + 16 * i + 8, Sums<2>{sums_[i][j][2], sums_[i][j][3]}, prepared);
      }
    }
  }

 private:
  static constexpr int kWarpPixels = kPixels / kPixelWarps;
  static constexpr int kWarpColumns = kColumns / kColumnWarps;
  static constexpr int kPixelTiles = kWarpPixels / 16;
  static constexpr int kColumnTiles = kWarpColumns / 8;
  static_assert(kPixelTiles > 0 && kColumnTiles % 2 == 0, "a warp takes at least 16 x 16");

  int row_, column_;                    // of the first sums
  int left_, right_[kColumnTiles / 2];  // places of the matrices that the lane reads rows of
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
  static constexpr int kRun = 4;

  __device__ __forceinline__ explicit FloatUnits(int thread)
      : row_(thread / kRightChunks),
        chunk_(thread % kRightChunks),
        left_(swizzled<kLeftChunks>(row_, 0)) {}

  // Neighbouring threads access neighbouring chunks: there are no bank conflicts to swizzle away.
  __device__ __forceinline__ static int right_place(int row, int chunk) {
    return row * kRightChunks + chunk;
  }

  __device__ __forceinline__ void multiply(const Chunk* left, const Chunk* right) {
#pragma unroll
    for (int k = 0; k < kLeftChunks; ++k) {
      Chunk b[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) b[i] = right[right_place(4 * k + i, chunk_)];
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        const Chunk a = left[(left_ ^ k) + row * kRowStep * kLeftChunks];
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

  template <typename Prepare, typename Visit>
  __device__ __forceinline__ void for_each(Prepare prepare, Visit visit) const {
    const auto prepared = prepare(4 * chunk_);
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      Sums<4> sums;
#pragma unroll
      for (int j = 0; j < 4; ++j) sums.values[j] = sums_[row][j] + chain_[row][j];
      visit(row_ + row * kRowStep, sums, prepared);
    }
  }

 private:
  static constexpr int kChainGroups = 8;
  static constexpr int kRowStep = kThreads / kRightChunks;
  static constexpr int kRows = kPixels / kRowStep;
  static_assert(kRows > 0, "a thread has at least one row");
  static_assert(kRowStep % kSwizzleRows == 0, "all rows of a thread are swizzled alike");

  int row_, chunk_;
  int left_;        // place of the first chunk of the first row; that of others is an exclusive or
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

// Copies the groups of a part of the reduction into shared memory, one after the other. A thread
// copies chunks of the same rows of both matrices in every group, so that from one group to the
// next its addresses only move on. They are found anew where a run ends: the groups of one segment
// at one tap.
template <typename Tile>
class GroupCopies {
 public:
  using T = typename Tile::T;
  using Chunk = typename Tile::Chunk;
  static constexpr int kPasses = divide_up(Tile::kLeft, Tile::kThreads);

  __device__ __forceinline__ GroupCopies(const ImplicitGemmParameters& p, int first_pixel,
                                         int first_column, int first_group, int groups, int thread)
      : thread_(thread),
        left_place_(swizzled<kLeftChunks>(thread / kLeftChunks, thread % kLeftChunks)),
        right_place_(Tile::Units::right_place(thread / kRightChunks, thread % kRightChunks)),
        remaining_(groups) {
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int tile_pixel = first_pixel + pass * kLeftRows + thread / kLeftChunks;
      const bool exists = !is_idle(pass, Tile::kLeft) && tile_pixel < p.pixels;
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
    if (first_group > 0) {
      const int groups_of_tap = p.channels / kGroup;
      const int tap = first_group / groups_of_tap;
      tap_row_ = tap / p.tap_columns;
      tap_column_ = tap - tap_row_ * p.tap_columns;
      channel_ = (first_group - tap * groups_of_tap) * kGroup;
    }
    const int first_row = thread / kRightChunks;
    const int column = first_column + thread % kRightChunks * kElements;
    inside_columns_ = column < p.weight_columns;
    const int64_t tap = int64_t{tap_row_} * p.kernel_columns + tap_column_;
    weight_ = static_cast<const T*>(p.weight) +
              (tap * p.channels + channel_ + first_row) * p.weight_columns + column;
    int channel = channel_;
    while (channel >= p.segments[segment_].channels) channel -= p.segments[segment_++].channels;
    begin_run(p, channel);
  }

  // Starts the copies of the next groups into a stage. Behind the last group are zeros.
  __device__ __forceinline__ void copy_stage(const ImplicitGemmParameters& p, Chunk* stage) {
    if constexpr (Tile::kGroups > 1) {
      if (run_ < Tile::kGroups) {
#pragma unroll 1
        for (int group = 0; group < Tile::kGroups; ++group) {
          copy_group(p, 0, stage, group);
          move_on(p, 1);
        }
        return;
      }
    }
#pragma unroll
    for (int group = 0; group < Tile::kGroups; ++group) copy_group(p, group, stage, group);
    move_on(p, Tile::kGroups);
  }

  // Copies nothing, for a stage behind the last one.
  __device__ __forceinline__ void skip_stage() { history_ <<= Tile::kGroups * kPasses; }

  // Scale and shift of a chunk of channels.
  struct Affine {
    Vector<float> scale[Chunk::kElements / 4], shift[Chunk::kElements / 4];
  };

  // Loads what the chunks of the next group are normalised by. Behind the last group that is
  // something, for chunks that are not normalised.
  __device__ __forceinline__ Affine load_affine(const ImplicitGemmParameters& p) {
    Affine affine;
    const int channel = channel_ + thread_ % kLeftChunks * kElements;
#pragma unroll
    for (int i = 0; i < kElements / 4; ++i) {
      affine.scale[i] = load_vector(p.scale + channel + 4 * i);
      affine.shift[i] = load_vector(p.shift + channel + 4 * i);
    }
    channel_ += kGroup;
    if (channel_ == p.channels) channel_ = 0;
    return affine;
  }

  // Normalises and rectifies what this thread copied into the oldest stage but for those that were
  // normalised before: that of kStages - 1 stages ago. Padding stays zero. `affine` is that of the
  // stage's first group; of each other it is loaded while the one before is normalised.
  __device__ __forceinline__ void apply_prologue(const ImplicitGemmParameters& p, Affine affine,
                                                 Chunk* stage) {
#pragma unroll
    for (int group = 0; group < Tile::kGroups; ++group) {
      const Affine next = group + 1 < Tile::kGroups ? load_affine(p) : affine;
      const int groups_ago = (Tile::kStages - 1) * Tile::kGroups - 1 - group;
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        if (is_idle(pass, Tile::kLeft)) continue;
        const bool inside = history_ >> (groups_ago * kPasses + pass) & 1;
        Chunk& place = stage[group * Tile::kLeft + left_place_ + pass * Tile::kThreads];
        Chunk values = place;
#pragma unroll
        for (int i = 0; i < kElements; i += 2) {
          float pair[2];
#pragma unroll
          for (int j = 0; j < 2; ++j)
            pair[j] =
                fmaf(to_float(values.elements[i + j]), affine.scale[i / 4].elements[i % 4 + j],
                     affine.shift[i / 4].elements[i % 4 + j]);
          const Pair<T> rectified = rectified_pair<T>(pair[0], pair[1]);
          values.elements[i] = rectified.elements[0];
          values.elements[i + 1] = rectified.elements[1];
        }
        if (inside) place = values;
      }
      affine = next;
    }
  }

 private:
  static constexpr int kElements = Chunk::kElements;
  static constexpr int kLeftChunks = Tile::Units::kLeftChunks;
  static constexpr int kRightChunks = Tile::Units::kRightChunks;
  static constexpr int kLeftRows = Tile::kThreads / kLeftChunks;
  static constexpr int kRightRows = Tile::kThreads / kRightChunks;
  static constexpr int kRightPasses = divide_up(Tile::kRight, Tile::kThreads);
  static_assert(Tile::kThreads % kLeftChunks == 0 && Tile::kThreads % kRightChunks == 0,
                "a thread copies the same chunk of a row in every pass");
  static_assert(kLeftRows % kSwizzleRows == 0 && kRightRows % kSwizzleRows == 0,
                "all rows of a thread are swizzled alike");
  static_assert(kPasses * Tile::kGroups * (Tile::kStages - 1) <= 32, "the history has 32 bits");

  // Whether the thread has nothing to copy in a pass of all threads over so many chunks.
  __device__ __forceinline__ bool is_idle(int pass, int chunks) const {
    return chunks % Tile::kThreads != 0 && pass * Tile::kThreads + thread_ >= chunks;
  }

  // Finds the addresses of the run that begins at a channel of the segment and tap.
  __device__ __forceinline__ void begin_run(const ImplicitGemmParameters& p, int channel) {
    const Segment& segment = p.segments[segment_];
    run_ = min((segment.channels - channel) / kGroup, remaining_);
    remaining_ -= run_;
    inside_ = 0;
    const T* const data =
        static_cast<const T*>(segment.data) + channel + thread_ % kLeftChunks * kElements;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int y = top_[pass] + tap_row_;
      const int x = left_[pass] + tap_column_;
      const bool inside = y >= 0 && y < p.in_height && x >= 0 && x < p.in_width;
      inside_ |= static_cast<uint32_t>(inside) << pass;
      const int64_t pixel = int64_t{origin_[pass]} + tap_row_ * p.in_width + tap_column_;
      from_[pass] = data + pixel * segment.pitch;
    }
  }

  __device__ __forceinline__ void move_on(const ImplicitGemmParameters& p, int groups) {
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) from_[pass] += groups * kGroup;
    weight_ += int64_t{p.weight_columns} * (groups * kGroup);
    run_ -= groups;
    if (run_ > 0) return;
    if (remaining_ == 0) {
      inside_ = 0;
      inside_columns_ = 0;
      run_ = INT32_MAX;
      return;
    }
    if (++segment_ == p.segment_count) {
      segment_ = 0;
      if (++tap_column_ == p.tap_columns) {
        tap_column_ = 0;
        ++tap_row_;
        weight_ += int64_t{p.kernel_columns - p.tap_columns} * p.channels * p.weight_columns;
      }
    }
    begin_run(p, 0);
  }

  // Copies the group `ahead` of the next one to the place of the stage's group `group`.
  __device__ __forceinline__ void copy_group(const ImplicitGemmParameters& p, int ahead,
                                             Chunk* stage, int group) {
    Chunk* const left = stage + group * Tile::kLeft + left_place_;
    Chunk* const right = stage + Tile::kGroups * Tile::kLeft + group * Tile::kRight + right_place_;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass)
      if (!is_idle(pass, Tile::kLeft))
        copy_async_16(left + pass * Tile::kThreads, from_[pass] + ahead * kGroup,
                      (inside_ & 1u << pass) != 0);
#pragma unroll
    for (int pass = 0; pass < kRightPasses; ++pass)
      if (!is_idle(pass, Tile::kRight))
        copy_async_16(right + pass * Tile::kThreads,
                      weight_ + int64_t{p.weight_columns} * (ahead * kGroup + pass * kRightRows),
                      inside_columns_ != 0);
    history_ = history_ << kPasses | inside_;
  }

  int thread_, left_place_, right_place_;
  int top_[kPasses], left_[kPasses], origin_[kPasses];
  const T* from_[kPasses];
  const T* weight_;
  int tap_row_ = 0, tap_column_ = 0, segment_ = 0;
  int run_, remaining_;  // groups of the run that are not copied yet, groups of later ones
  int channel_ = 0;      // in the concatenation, of the next group that is to be normalised
  uint32_t inside_;      // a bit for each pass: whether its pixel lies inside of the map at the tap
  uint32_t inside_columns_;
  uint32_t history_ = 0;  // inside_ of the latest groups
};

// Scales, adds the bias and rectifies the sums of some neighbouring columns.
template <int kCount>
struct Epilogue {
  Sums<kCount> scale, bias;
  bool relu;

  // For the columns from `column` on, of which there are `columns` in all, a multiple of kCount.
  __device__ __forceinline__ Epilogue(const float* scales, const float* biases, bool rectifies,
                                      int column, int columns)
      : relu(rectifies) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      scale.values[i] = 1.0f;
      bias.values[i] = 0.0f;
    }
    if (column >= columns) return;
    if (scales != nullptr) scale = *reinterpret_cast<const Sums<kCount>*>(scales + column);
    if (biases != nullptr) bias = *reinterpret_cast<const Sums<kCount>*>(biases + column);
  }

  __device__ __forceinline__ float operator()(float sum, int i) const {
    const float value = fmaf(sum, scale.values[i], bias.values[i]);
    return relu ? rectify(value) : value;
  }
};

// Rounds the sums into shared memory and writes them out, 16 bytes at a time where possible.
template <typename Tile>
__device__ __forceinline__ void store_tile(const ImplicitGemmParameters& p,
                                           const typename Tile::Units& units, int first_pixel,
                                           int first_column, int thread,
                                           typename Tile::Chunk* shared) {
  using T = typename Tile::T;
  using Units = typename Tile::Units;
  constexpr int kElements = Tile::Chunk::kElements;
  constexpr int kChunks = Units::kRightChunks;
  constexpr int kRows = Tile::kThreads / kChunks;
  constexpr int kRun = Units::kRun;
  struct alignas(kRun * sizeof(T)) Run {
    T elements[kRun];
  };
  struct Columns {
    Epilogue<kRun> epilogue;
    int chunk, offset;
  };
  units.for_each(
      [&](int column) {
        return Columns{
            {p.output_scale, p.bias, p.relu != 0, first_column + column, p.weight_columns},
            column / kElements,
            column % kElements};
      },
      [&](int row, const Sums<kRun>& sums, const Columns& columns) {
        Run run;
#pragma unroll
        for (int i = 0; i < kRun; ++i)
          run.elements[i] = from_float<T>(columns.epilogue(sums.values[i], i));
        T* to = shared[Units::right_place(row, columns.chunk)].elements + columns.offset;
        *reinterpret_cast<Run*>(to) = run;
      });
  __syncthreads();
  static_assert(Tile::kThreads % kChunks == 0 && kRows % kSwizzleRows == 0,
                "a thread writes the same chunk of rows that are swizzled alike");
  const int chunk = thread % kChunks;
  const int column = first_column + chunk * kElements;
  const int count = min(kElements, p.out_channels - column);
  if (count <= 0) return;
  const bool vector = p.vector_store && count == kElements;
  int row = thread / kChunks;
  const auto* from = shared + Units::right_place(row, chunk);
  T* to = static_cast<T*>(p.output) + (first_pixel + row) * p.output_pitch + column;
  for (; row < Tile::kPixels && first_pixel + row < p.pixels; row += kRows) {
    if (vector) {
      *reinterpret_cast<typename Tile::Chunk*>(to) = *from;
    } else {
#pragma unroll
      for (int i = 0; i < kElements; ++i)
        if (i < count) to[i] = from->elements[i];
    }
    from += kRows * kChunks;
    to += kRows * p.output_pitch;
  }
}

// Whether copies to shared memory pass registers, as before sm_80.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kCopiesPassRegisters = true;
#else
constexpr bool kCopiesPassRegisters = false;
#endif

// Of the largest tile only one block fits where a thread has more to keep than sums.
template <typename Tile, bool kPrologue>
constexpr int kBlocks =
    Tile::kThreads > 128 && (kPrologue || kCopiesPassRegisters) ? 1 : Tile::Units::kBlocks;

// Computes one tile of the output, or one part of its sums. Blocks along x run over the tiles,
// those of the same pixels next to each other; blocks along y over the parts of the reduction.
template <typename Tile, bool kPrologue>
__global__ void __launch_bounds__(Tile::kThreads, kBlocks<Tile, kPrologue>)
    implicit_gemm_kernel(const __grid_constant__ ImplicitGemmParameters p) {
  using Chunk = typename Tile::Chunk;
  DYNAMIC_SHARED(shared_bytes);
  Chunk* const shared = reinterpret_cast<Chunk*>(shared_bytes);
  const int thread = static_cast<int>(threadIdx.x);
  const int tile = static_cast<int>(blockIdx.x);
  const int first_pixel = tile / p.column_tiles * Tile::kPixels;
  const int first_column = tile % p.column_tiles * Tile::kColumns;
  int first_group = 0;
  int groups = p.tap_rows * p.tap_columns * (p.channels / kGroup);
  if (gridDim.y > 1) {
    const int parts = static_cast<int>(gridDim.y);
    const int part = static_cast<int>(blockIdx.y);
    const int each = groups / parts;
    const int rest = groups - each * parts;
    first_group = each * part + min(part, rest);
    groups = each + (part < rest);
  }
  const int steps = (groups + Tile::kGroups - 1) / Tile::kGroups;

  typename Tile::Units units(thread);
  GroupCopies<Tile> copies(p, first_pixel, first_column, first_group, groups, thread);

#pragma unroll 1
  for (int step = 0; step < Tile::kStages - 1; ++step) {
    if (step < steps)
      copies.copy_stage(p, shared + step * Tile::kStage);
    else if (kPrologue)
      copies.skip_stage();
    copy_async_commit();
  }
  Chunk* stage = shared;
  Chunk* const last_stage = shared + (Tile::kStages - 1) * Tile::kStage;
  Chunk* free_stage = last_stage;
  for (int step = 0; step < steps; ++step) {
    // Loaded while the copies are waited for.
    typename GroupCopies<Tile>::Affine affine;
    if (kPrologue) affine = copies.load_affine(p);
    copy_async_wait<Tile::kStages - 2>();
    if (kPrologue) copies.apply_prologue(p, affine, stage);
    // All copies of this step are there, and all products of the last one are done: its stage is
    // free for the copies that start now.
    __syncthreads();
    if (step + Tile::kStages - 1 < steps)
      copies.copy_stage(p, free_stage);
    else if (kPrologue)
      copies.skip_stage();
    copy_async_commit();
#pragma unroll
    for (int group = 0; group < Tile::kGroups; ++group)
      units.multiply(stage + group * Tile::kLeft,
                     stage + Tile::kGroups * Tile::kLeft + group * Tile::kRight);
    free_stage = stage;
    stage = stage == last_stage ? shared : stage + Tile::kStage;
  }

  if (p.partials != nullptr) {
    constexpr int kRun = Tile::Units::kRun;
    float* const partials = p.partials + int64_t{blockIdx.y} * p.pixels * p.weight_columns;
    units.for_each(
        [&](int column) { return first_column + column; },
        [&](int row, const Sums<kRun>& sums, int column) {
          const int64_t pixel = first_pixel + row;
          if (pixel < p.pixels && column < p.weight_columns)
            *reinterpret_cast<Sums<kRun>*>(partials + pixel * p.weight_columns + column) = sums;
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
  const Epilogue<4> epilogue{p.output_scale, p.bias, p.relu != 0, column, p.columns};
  struct alignas(4 * sizeof(T)) Quad {
    T elements[4];
  } results;
#pragma unroll
  for (int i = 0; i < 4; ++i) results.elements[i] = from_float<T>(epilogue(sums[i], i));
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
