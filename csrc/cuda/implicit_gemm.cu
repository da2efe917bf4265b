#include <algorithm>

#include "checks.h"
#include "elementwise.cuh"
#include "implicit_gemm.cuh"
#include "launch.cuh"

namespace threshnet_fast::cuda {
namespace {

// Parts that a reduction may be split into.
constexpr int kParts[] = {1, 2, 4, 8, 16};

// Blocks along y that a grid can have.
constexpr int kMaxParts = 65535;

// Cycles, and bytes a clock and multiprocessor, as in the Triton kernels' choice: rounded figures
// of published micro-benchmarks. Only how they compare with each other and with the arithmetic
// matters.
constexpr double kLatency = 600;
constexpr double kBlock = 2000;
constexpr double kLaunch = 3000;
constexpr double kCacheBytes = 32;
// Registers of a thread beside its sums, as the kernels need in the middle.
constexpr int kRegisters = 80;
constexpr int kRegisterFile = 65536;

GemmKernels kernels_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return float16_kernels();
    case DType::kBFloat16:
      return bfloat16_kernels();
    case DType::kFloat32:
      return float32_kernels();
  }
  throw std::invalid_argument("threshnet_fast: dtype is unknown");
}

// Operations a clock and multiprocessor, with mma.sync rather than what newer architectures add.
double operations_per_clock(DType dtype, int architecture) {
  const bool data_center = architecture == 80 || architecture == 90 || architecture == 100;
  if (dtype == DType::kFloat32) return architecture < 86 ? 128 : 256;
  return data_center ? 2048 : architecture < 80 ? 1024 : 512;
}

int64_t channels_of(const Convolution& convolution) {
  int64_t channels = 0;
  for (int i = 0; i < convolution.segment_count; ++i) channels += convolution.segments[i].channels;
  return channels;
}

int64_t groups_of(const Convolution& convolution) {
  const Window& w = convolution.window;
  const TapRange rows = live_taps(w.in_height, w.out_height, w.kernel_height, w.stride, w.padding);
  const TapRange columns = live_taps(w.in_width, w.out_width, w.kernel_width, w.stride, w.padding);
  return channels_of(convolution) / kGroup * (rows.end - rows.begin) *
         (columns.end - columns.begin);
}

// Estimates the cycles of a convolution: waves of blocks that share a multiprocessor, each of whose
// steps takes as long as its arithmetic, its copies, or the latency that the pipeline does not
// hide.
double estimate(const Convolution& convolution, const Tile& tile, int parts, const Device& device) {
  const double pixels = static_cast<double>(convolution.window.out_pixels());
  const int64_t tiles = divide_up(convolution.window.out_pixels(), int64_t{tile.pixels}) *
                        divide_up(convolution.out_channels, tile.columns);
  const int64_t blocks = tiles * parts;
  const int by_registers = kRegisterFile / (tile.pixels * tile.columns + tile.threads * kRegisters);
  const int by_shared = device.shared_bytes / tile.shared_bytes;
  const int64_t resident = std::max(1, std::min(by_registers, by_shared));
  const int64_t at_once = std::min(resident, divide_up(blocks, int64_t{device.multiprocessors}));
  const int64_t waves = divide_up(blocks, device.multiprocessors * at_once);
  const int64_t groups_of_step = tile.depth / kGroup;
  const int64_t steps =
      divide_up(divide_up(groups_of(convolution), int64_t{parts}), groups_of_step);
  const double size = static_cast<double>(bytes_of(convolution.dtype));
  const double arithmetic = 2.0 * tile.pixels * tile.columns * tile.depth /
                            operations_per_clock(convolution.dtype, device.architecture);
  const double traffic = (tile.pixels + tile.columns) * tile.depth * size / kCacheBytes;
  const double step = std::max(static_cast<double>(at_once) * std::max(arithmetic, traffic),
                               kLatency / (tile.stages - 1));
  const double stored = tile.pixels * tile.columns * (parts > 1 ? 4 : size) / kCacheBytes;
  double cycles = static_cast<double>(waves) * (kBlock + static_cast<double>(steps) * step +
                                                static_cast<double>(at_once) * stored);
  if (parts > 1) {
    const double sums = 4.0 * parts * pixels * convolution.weight_columns;
    cycles += kLaunch + kBlock + sums / (kCacheBytes * device.multiprocessors);
  }
  return cycles;
}

void check_convolution(const Convolution& c) {
  const Checker check("convolution");
  check.window(c.window);
  check.positive(c.segment_count, "segment_count");
  check.at_most(c.segment_count, kMaxSegments, "segment_count");
  for (int i = 0; i < c.segment_count; ++i) check.segment(c.segments[i]);
  check.at_most(channels_of(c), INT32_MAX, "channels of all segments");
  check.pointer(c.weight, 16, "weight");
  check.positive(c.weight_columns, "weight_columns");
  check.multiple(c.weight_columns, kGroup, "weight_columns");
  check.positive(c.out_channels, "out_channels");
  check.at_most(c.out_channels, c.weight_columns, "out_channels");
  check.that((c.scale == nullptr) == (c.shift == nullptr),
             "scale or shift is null, expected both or none");
  check.optional(c.scale, 16, "scale");
  check.optional(c.shift, 16, "shift");
  check.optional(c.output_scale, 16, "output_scale");
  check.optional(c.bias, 16, "bias");
  check.pointer(c.output, bytes_of(c.dtype), "output");
  check.at_least(c.output_pitch, c.out_channels, "output_pitch");
}

void check_configuration(const Convolution& c, const Configuration& configuration, int tiles) {
  const Checker check("convolution");
  check.at_least(configuration.tile, 0, "tile");
  check.at_most(configuration.tile, tiles - 1, "tile");
  check.positive(configuration.parts, "parts");
  check.at_most(configuration.parts, kMaxParts, "parts");
  if (configuration.parts > 1) check.pointer(c.partials, 16, "partials");
}

}  // namespace

int tile_count(DType dtype) { return kernels_of(dtype).count; }

Tile tile_of(DType dtype, int tile) {
  const GemmKernels kernels = kernels_of(dtype);
  require(tile >= 0 && tile < kernels.count, "there is no such tile");
  return kernels.tiles[tile];
}

const char* objection(DType dtype, int architecture) {
  if (architecture < 75) return "the kernels need compute capability 7.5 or newer";
  if (dtype == DType::kBFloat16 && architecture < 80)
    return "bfloat16 needs tensor cores of compute capability 8.0 or newer";
  return nullptr;
}

Configuration choose(const Convolution& convolution, const Device& device) {
  require(device.multiprocessors > 0 && device.shared_bytes > 0,
          "a device has no multiprocessors or no shared memory");
  const GemmKernels kernels = kernels_of(convolution.dtype);
  const int64_t groups = groups_of(convolution);
  Configuration best{-1, 1};
  double least = 0;
  for (int tile = 0; tile < kernels.count; ++tile) {
    const Tile& candidate = kernels.tiles[tile];
    if (candidate.shared_bytes > device.shared_bytes) continue;
    for (const int parts : kParts) {
      // A part with fewer than two steps has nothing to pipeline.
      if (parts > 1 && groups * kGroup < int64_t{2} * parts * candidate.depth) continue;
      const double cycles = estimate(convolution, candidate, parts, device);
      if (best.tile >= 0 && cycles >= least) continue;
      best = {tile, parts};
      least = cycles;
    }
  }
  require(best.tile >= 0, "the device has too little shared memory for any tile");
  return best;
}

int64_t partial_floats(const Convolution& convolution, const Configuration& configuration) {
  if (configuration.parts == 1) return 0;
  return configuration.parts * convolution.window.out_pixels() * convolution.weight_columns;
}

void convolve(const Convolution& c, const Configuration& configuration, Stream stream) {
  const GemmKernels kernels = kernels_of(c.dtype);
  check_convolution(c);
  check_configuration(c, configuration, kernels.count);
  const bool split = configuration.parts > 1;
  const Tile& tile = kernels.tiles[configuration.tile];
  const Window& w = c.window;
  const TapRange rows = live_taps(w.in_height, w.out_height, w.kernel_height, w.stride, w.padding);
  const TapRange columns = live_taps(w.in_width, w.out_width, w.kernel_width, w.stride, w.padding);
  const int64_t channels = channels_of(c);
  const int64_t size = bytes_of(c.dtype);
  const int64_t first_tap = rows.begin * w.kernel_width + columns.begin;

  ImplicitGemmParameters p{};
  std::copy_n(c.segments, c.segment_count, p.segments);
  p.segment_count = c.segment_count;
  p.channels = static_cast<int32_t>(channels);
  p.weight = static_cast<const char*>(c.weight) + first_tap * channels * c.weight_columns * size;
  p.scale = c.scale;
  p.shift = c.shift;
  p.output_scale = c.output_scale;
  p.bias = c.bias;
  p.output = c.output;
  p.partials = split ? c.partials : nullptr;
  p.output_pitch = c.output_pitch;
  p.pixels = static_cast<int32_t>(w.out_pixels());
  p.in_height = w.in_height;
  p.in_width = w.in_width;
  p.out_height = w.out_height;
  p.out_width = w.out_width;
  p.stride = w.stride;
  p.pad_rows = w.padding - static_cast<int>(rows.begin);
  p.pad_columns = w.padding - static_cast<int>(columns.begin);
  // Where all windows lie on padding there is nothing to add.
  const int tap_rows = static_cast<int>(rows.end - rows.begin);
  const int tap_columns = static_cast<int>(columns.end - columns.begin);
  const bool any = tap_rows > 0 && tap_columns > 0;
  p.tap_rows = any ? tap_rows : 0;
  p.tap_columns = any ? tap_columns : 1;
  p.kernel_columns = w.kernel_width;
  p.weight_columns = c.weight_columns;
  p.out_channels = c.out_channels;
  p.column_tiles = divide_up(split ? c.weight_columns : c.out_channels, tile.columns);
  p.relu = c.relu;
  p.vector_store = has_aligned_pixels(c.output, c.output_pitch, c.dtype);
  const int64_t tiles = divide_up(int64_t{p.pixels}, int64_t{tile.pixels}) * p.column_tiles;
  launch(kernels.kernels[configuration.tile][c.scale != nullptr], tiles, configuration.parts,
         tile.threads, tile.shared_bytes, stream, p);
  if (!split) return;

  SplitReductionParameters r{};
  r.partials = c.partials;
  r.output_scale = c.output_scale;
  r.bias = c.bias;
  r.output = c.output;
  r.output_pitch = c.output_pitch;
  r.parts = configuration.parts;
  r.pixels = p.pixels;
  r.columns = c.weight_columns;
  r.out_channels = c.out_channels;
  r.relu = c.relu;
  r.vector_store = p.vector_store;
  const int64_t items = int64_t{p.pixels} * (c.weight_columns / 4);
  launch(kernels.reduction, divide_up(items, int64_t{kSplitReductionThreads}), 1,
         kSplitReductionThreads, 0, stream, r);
}

}  // namespace threshnet_fast::cuda
