#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <map>
#include <sstream>

#include "cpu/costs.h"
#include "cpu/ukernels/kinds.h"
#include "program.h"
#include "seal.h"

namespace threshnet_fast::cpu {
namespace {

// Maps of at most this many pixels are computed in the order of their valid taps.
constexpr int64_t kSortPixels = 256;
constexpr int64_t kTasksPerThread = 8;
// How much longer than the average one thread may work, so that more tiles share the weights.
constexpr double kImbalance = 1.2;
// Pixels of all tables of a program, of which each takes 16 bytes.
constexpr int64_t kMostTablePixels = int64_t{1} << 27;
constexpr int64_t kFloatBytes = sizeof(float);

class Writer {
 public:
  Writer() : bytes_(sizeof(ProgramHeader)) {}

  template <typename T>
  int64_t append(const std::vector<T>& items) {
    return append<T>(items, [](const T& item) { return item; });
  }

  // Of each item what `part` returns.
  template <typename T, typename Item, typename Part>
  int64_t append(const std::vector<Item>& items, const Part& part) {
    const int64_t offset = round_up(static_cast<int64_t>(bytes_.size()), 64);
    bytes_.resize(offset + items.size() * sizeof(T));
    std::byte* to = bytes_.data() + offset;
    for (const Item& item : items) {
      const T value = part(item);
      std::memcpy(to, &value, sizeof value);
      to += sizeof value;
    }
    return offset;
  }

  std::vector<std::byte> finish(ProgramHeader header) {
    header.bytes = static_cast<int64_t>(bytes_.size());
    std::memcpy(bytes_.data(), &header, sizeof header);
    seal_program<ProgramHeader>(bytes_.data(), header.bytes);
    return std::move(bytes_);
  }

 private:
  std::vector<std::byte> bytes_;
};

struct PixelTables {
  int64_t input_pixels, output_pixels, pixel_taps, count;
  uint64_t used_taps;
};

class Compiler {
 public:
  Compiler(const int64_t* description, int64_t length, int64_t isa, int64_t threads,
           int64_t winograd)
      : plan_(read_plan(description, length)), threads_(threads), forced_winograd_(winograd) {
    kind_ = kind_of(isa);
    if (kind_ == nullptr) {
      std::ostringstream message;
      message << "threshnet_fast: instruction set " << isa << " is not available on this processor";
      throw std::invalid_argument(message.str());
    }
    if (threads < 1 || threads > kMostThreads)
      fail_plan("threads must be 1 to " + std::to_string(kMostThreads));
    require_plan(winograd == -1 || winograd == 0 || winograd == 2 || winograd == 4,
                 "winograd must be -1, 0, 2 or 4");
    header_.isa = isa;
    tiling_ = kind_->tiling;
    element_bytes_ = kind_->element_bytes();
  }

  std::vector<std::byte> compile() {
    header_.magic = kProgramMagic;
    header_.version = kVersion;
    header_.batch = plan_.batch;
    header_.input_channels = plan_.input_channels;
    header_.input_height = plan_.input_height;
    header_.input_width = plan_.input_width;
    header_.output_channels = plan_.output_channels;
    header_.output_height = plan_.output_height;
    header_.output_width = plan_.output_width;
    header_.input_count = plan_.input_count;
    header_.external_count = plan_.external_count;
    header_.weight_count = plan_.weight_count;
    header_.arena_floats = round_up(floats(plan_.arena_size), 16);
    header_.buffer_count = static_cast<int64_t>(plan_.buffers.size());
    for (const PlanStep& step : plan_.steps) add(step);
    header_.step_count = static_cast<int64_t>(steps_.size());
    header_.buffers = writer_.append(plan_.buffers);
    header_.externals = writer_.append(external_buffers());
    header_.steps = writer_.append(steps_);
    return writer_.finish(header_);
  }

 private:
  void add(const PlanStep& planned) {
    ++number_;
    Step step{};
    step.output_buffer = planned.output.buffer;
    step.output_channel = planned.output.channel;
    step.output_channels = planned.output.channels;
    step.window = planned.window;
    step.lattice = planned.lattice;
    step.activation = planned.activation;
    step.prologue_activation = planned.prologue_activation;
    step.average = planned.average;
    step.divisor = planned.divisor;
    step.slope = planned.slope;
    step.resizing = planned.resizing;
    header_.reads_network_input |= planned.reads_network_input;
    header_.writes_network_output |= plan_.buffer_of(planned.output).offset == kNetworkOutput;
    step.weight_index = planned.weight_index;
    step.bias_index = planned.bias_index;
    step.scale_index = planned.scale_index;
    step.shift_index = planned.shift_index;
    step.segment_count = static_cast<int64_t>(planned.inputs.size());
    step.segments = writer_.append(planned.inputs);
    switch (planned.kind) {
      case PlanStepKind::kConvolution:
        step.kind = kConvolution;
        finish_convolution(step, planned);
        break;
      case PlanStepKind::kPool:
        step.kind = kPool;
        finish_channelwise(step, planned);
        break;
      case PlanStepKind::kDepthwise:
        step.kind = kDepthwise;
        finish_channelwise(step, planned);
        break;
      case PlanStepKind::kPointwise:
        step.kind = kPointwise;
        finish_pointwise(step, planned);
        break;
      case PlanStepKind::kResize:
        step.kind = kResize;
        finish_resize(step, planned);
        break;
    }
    require_size(header_.packed_floats, "what is packed of the weights up to " + name_of_step());
    if (step.winograd == kWinogradInSteps) steps_.push_back(transform_step(step));
    steps_.push_back(step);
    if (step.split_count > 1) {
      step.kind = kReduction;
      step.block_count = 1;
      step.group_count = std::min(step.panel_count, threads_);
      step.group_panels = divide_up(step.panel_count, step.group_count);
      step.group_count = divide_up(step.panel_count, step.group_panels);
      steps_.push_back(step);
    }
  }

  // A pool or a depthwise convolution: tasks are rows of the map.
  void finish_channelwise(Step& step, const PlanStep& planned) {
    const Buffer& to = plan_.buffer_of(planned.output);
    const int64_t taps = step.window.taps();
    step.input_channels = planned.input_channels;
    step.block_count = std::min(header_.batch * to.height, threads_ * kTasksPerThread);
    step.group_count = 1;
    if (step.kind == kDepthwise) {
      Panel panel{};
      panel.channels = step.output_channels;
      panel.pitch = round_up(panel.channels, 16);
      panel.weights = header_.packed_floats;
      panel.bias = panel.weights + taps * panel.pitch;
      header_.packed_floats = panel.bias + panel.pitch;
      step.panels = writer_.append(std::vector<Panel>{panel});
      step.panel_count = 1;
    }
    reserve_prologue(step);
    // Offsets of the taps in the input and in the weights.
    reserve(2 * 2 * taps);
  }

  // Tasks are pixels side by side, of all images.
  void finish_pointwise(Step& step, const PlanStep& planned) {
    const Buffer& to = plan_.buffer_of(planned.output);
    step.input_channels = step.output_channels;
    step.block_count = std::min(header_.batch * to.height * to.width, threads_ * kTasksPerThread);
    step.group_count = 1;
    reserve_prologue(step);
    // Where the inputs begin, and the elements between their pixels.
    reserve(2 * 2 * step.segment_count);
  }

  // Tasks are rows of the output.
  void finish_resize(Step& step, const PlanStep& planned) {
    const Buffer& to = plan_.buffer_of(planned.output);
    step.input_channels = planned.input_channels;
    step.block_count = std::min(header_.batch * to.height, threads_ * kTasksPerThread);
    step.group_count = 1;
    // Of every column of the output, two offsets and a weight.
    reserve(to.width * (2 * 2 + 1));
  }

  // Which buffer each external map is.
  std::vector<int64_t> external_buffers() const {
    std::vector<int64_t> buffers(plan_.external_count);
    for (size_t i = 0; i < plan_.buffers.size(); ++i) {
      const int64_t offset = plan_.buffers[i].offset;
      if (offset <= kFirstExternal) buffers[kFirstExternal - offset] = static_cast<int64_t>(i);
    }
    return buffers;
  }

  void reserve_prologue(Step& step) {
    if (step.scale_index < 0) return;
    step.scale = header_.packed_floats;
    step.shift = step.scale + round_up(step.input_channels, 16);
    header_.packed_floats = step.shift + round_up(step.input_channels, 16);
  }

  void finish_convolution(Step& step, const PlanStep& planned) {
    const Buffer& from = plan_.buffer_of(planned.inputs[0]);
    const Buffer& to = plan_.buffer_of(planned.output);
    step.input_channels = planned.input_channels;
    step.padded_channels = round_up(step.input_channels, word_channels());
    if (planned.reads_network_input) {
      step.packs = kImageRows;
    } else if (step.window.taps() > kMostTaps) {
      fail_plan("a kernel has over " + std::to_string(kMostTaps) + " taps");
    } else if (step.scale_index >= 0 || splits_words(planned)) {
      step.packs = kWindows;
    }

    std::vector<Panel> panels = split_panels(step.output_channels);
    choose_winograd(step, from, to);
    if (step.winograd) {
      // FNV-1a over the numbers of the steps.
      const uint64_t hash = static_cast<uint64_t>(header_.layout) ^
                            static_cast<uint64_t>(8 * number_ + step.winograd_size);
      header_.layout = static_cast<int64_t>(hash * 0x100000001b3u);
    }
    int64_t widest = 0;
    for (Panel& panel : panels) {
      const int64_t lanes = panel.vectors * tiling_->lanes;
      widest = std::max(widest, lanes);
      panel.pitch = round_up(panel.channels, 4);
      panel.weights = header_.packed_floats;
      panel.bias = panel.weights + floats(positions_of(step) * step.padded_channels * panel.pitch);
      header_.packed_floats = round_up(panel.bias + lanes, 16);
    }
    step.panels = writer_.append(panels);
    step.panel_count = static_cast<int64_t>(panels.size());
    reserve_prologue(step);

    if (step.winograd) return split_winograd(step, to, widest);
    if (step.packs == kImageRows) return split_image(step, to);
    const PixelTables tables = pixel_tables(step, from, to);
    step.pixel_count = tables.count;
    step.input_pixels = tables.input_pixels;
    step.output_pixels = tables.output_pixels;
    step.pixel_taps = tables.pixel_taps;
    split_tasks(step, from, panels);
    split_chunks(step, tables.used_taps, widest);
    reserve_scratch(step, widest);
  }

  int64_t word_channels() const { return static_cast<int64_t>(sizeof(float)) / element_bytes_; }

  // Floats that take the place of some elements.
  int64_t floats(int64_t elements) const { return divide_up(elements, word_channels()); }

  // Whether a word would hold channels of two segments, or lie across two words of memory.
  bool splits_words(const PlanStep& planned) const {
    const auto splits = [this](int64_t count) { return count % word_channels() != 0; };
    return std::any_of(planned.inputs.begin(), planned.inputs.end(),
                       [&](const BufferSegment& segment) {
                         return splits(segment.channel) || splits(segment.channels) ||
                                splits(plan_.buffer_of(segment).pitch);
                       });
  }

  // Panels of two vectors, and one of three where that saves a mostly empty one.
  std::vector<Panel> split_panels(int64_t channels) const {
    std::vector<Panel> panels;
    int64_t vectors = divide_up(channels, tiling_->lanes);
    for (int64_t channel = 0; channel < channels;) {
      const int64_t take = vectors <= 3 ? vectors : 2;
      Panel panel{};
      panel.vectors = take;
      panel.channel = channel;
      panel.channels = std::min(take * tiling_->lanes, channels - channel);
      panels.push_back(panel);
      channel += panel.channels;
      vectors -= take;
    }
    return panels;
  }

  PixelTables pixel_tables(const Step& step, const Buffer& from, const Buffer& to) {
    const PlanWindow& window = step.window;
    const OutputLattice& lattice = step.lattice;
    const int64_t height = lattice.height(to), width = lattice.width(to);
    const std::array<int64_t, 16> key = {from.height,
                                         from.width,
                                         to.height,
                                         to.width,
                                         window.kernel_height,
                                         window.kernel_width,
                                         window.stride_height,
                                         window.stride_width,
                                         window.padding_top,
                                         window.padding_left,
                                         window.dilation_height,
                                         window.dilation_width,
                                         lattice.stride_height,
                                         lattice.stride_width,
                                         lattice.first_row,
                                         lattice.first_column};
    if (const auto found = tables_.find(key); found != tables_.end()) return found->second;

    check_pixels(step, from, to);
    struct Pixel {
      int32_t input, output;
      uint64_t taps;
    };
    std::vector<Pixel> pixels;
    pixels.reserve(header_.batch * height * width);
    for (int64_t n = 0; n < header_.batch; ++n) {
      for (int64_t y = 0; y < height; ++y) {
        for (int64_t x = 0; x < width; ++x) {
          const int64_t top = y * window.stride_height - window.padding_top;
          const int64_t left = x * window.stride_width - window.padding_left;
          Pixel pixel{};
          pixel.input = static_cast<int32_t>((n * from.height + top) * from.width + left);
          const int64_t row = n * to.height + lattice.first_row + y * lattice.stride_height;
          pixel.output = static_cast<int32_t>(row * to.width + lattice.first_column +
                                              x * lattice.stride_width);
          const TapRange rows =
              valid_taps(top, from.height, window.kernel_height, window.dilation_height);
          const TapRange columns =
              valid_taps(left, from.width, window.kernel_width, window.dilation_width);
          for (int64_t ky = rows.begin; ky < rows.end; ++ky) {
            for (int64_t kx = columns.begin; kx < columns.end; ++kx)
              pixel.taps |= uint64_t{1} << (ky * window.kernel_width + kx);
          }
          pixels.push_back(pixel);
        }
      }
    }
    // Pixels with the same valid taps side by side make tiles in which a tap is either needed by
    // every pixel or by none.
    if (height * width <= kSortPixels) {
      std::stable_sort(pixels.begin(), pixels.end(),
                       [](const Pixel& a, const Pixel& b) { return a.taps > b.taps; });
    }
    PixelTables tables{};
    for (const Pixel& pixel : pixels) tables.used_taps |= pixel.taps;
    tables.count = static_cast<int64_t>(pixels.size());
    tables.input_pixels =
        writer_.append<int32_t>(pixels, [](const Pixel& pixel) { return pixel.input; });
    tables.output_pixels =
        writer_.append<int32_t>(pixels, [](const Pixel& pixel) { return pixel.output; });
    tables.pixel_taps =
        writer_.append<uint64_t>(pixels, [](const Pixel& pixel) { return pixel.taps; });
    tables_.emplace(key, tables);
    return tables;
  }

  // The tables hold the top left pixel of every window, which may lie beyond the map, in 32 bits,
  // and micro-kernels count on from there up to the end of a tile.
  void check_pixels(const Step& step, const Buffer& from, const Buffer& to) {
    const PlanWindow& window = step.window;
    const int64_t before = window.padding_top * from.width + window.padding_left;
    const int64_t height = step.lattice.height(to), width = step.lattice.width(to);
    const int64_t row =
        std::max<int64_t>((height - 1) * window.stride_height - window.padding_top, 0);
    const int64_t column =
        std::max<int64_t>((width - 1) * window.stride_width - window.padding_left, 0);
    const int64_t behind = ((header_.batch - 1) * from.height + row) * from.width + column;
    constexpr int64_t kMostBegin = std::numeric_limits<int32_t>::max() - kMaxTilePixels;
    if (std::max(before, behind) > kMostBegin)
      fail_plan(name_of_step() +
                ": windows begin more than 2^31 pixels before or behind the map's first pixel");
    table_pixels_ += header_.batch * height * width;
    if (table_pixels_ > kMostTablePixels)
      fail_plan("step " + std::to_string(number_) + ": windows have over " +
                std::to_string(kMostTablePixels) + " pixels in their tables");
  }

  // Winograd multiplies 16 numbers where direct convolution multiplies 36, or 36 where that
  // multiplies 144, but transforms every input and reads more weights: it pays where enough tiles
  // share them and few reach over the map's edge.
  void choose_winograd(Step& step, const Buffer& from, const Buffer& to) const {
    const PlanWindow& window = step.window;
    const bool possible = !step.packs && step.lattice.is_whole() && window.height() == 3 &&
                          window.width() == 3 && window.taps() == 9 && window.stride_height == 1 &&
                          window.stride_width == 1 && window.padding_top == 1 &&
                          window.padding_left == 1 && from.height == to.height &&
                          from.width == to.width && step.input_channels >= kWinogradChannels;
    if (!possible || forced_winograd_ == 0) return;
    double best = direct_time(step, to);
    for (const int64_t size : {2, 4}) {
      const WinogradMode mode = winograd_mode(step, to, size);
      if (mode == kNoWinograd || (forced_winograd_ > 0 && forced_winograd_ != size)) continue;
      const double time = winograd_time(step, to, mode, size);
      if (time >= best && forced_winograd_ < 0) continue;
      best = time;
      step.winograd = mode;
      step.winograd_size = size;
    }
  }

  // With few channels all of it is done in one task, in L2; with many, the transformed inputs are
  // shared by all panels, so long as they fit in the last level of cache.
  WinogradMode winograd_mode(const Step& step, const Buffer& to, int64_t size) const {
    if (step.input_channels <= kTaskChannels &&
        step.output_channels <= kTaskVectors * tiling_->lanes)
      return kWinogradInTask;
    const int64_t bytes =
        element_bytes_ * winograd_positions(size) * winograd_tiles(to, size) * step.padded_channels;
    return bytes <= kTransformBytes ? kWinogradInSteps : kNoWinograd;
  }

  int64_t winograd_tiles(const Buffer& to, int64_t size) const {
    return header_.batch * divide_up(to.height, size) * divide_up(to.width, size);
  }

  // Nanoseconds, without what both algorithms take.
  double direct_time(const Step& step, const Buffer& to) const {
    const auto valid_taps = [](int64_t extent) { return std::max<int64_t>(3 * extent - 2, 1); };
    const int64_t taps = header_.batch * valid_taps(to.height) * valid_taps(to.width);
    const bool splits_panels = 9 * step.output_channels > header_.batch * to.height * to.width &&
                               step.output_channels >= 2 * tiling_->lanes * threads_;
    return multiply_time(step, taps, 9, splits_panels);
  }

  double winograd_time(const Step& step, const Buffer& to, WinogradMode mode, int64_t size) const {
    const Costs& costs = kind_->costs;
    const int64_t tiles = winograd_tiles(to, size);
    const int64_t positions = winograd_positions(size);
    const double input = size == 2 ? costs.winograd_2x2_input : costs.winograd_4x4_input;
    const double output = size == 2 ? costs.winograd_2x2_output : costs.winograd_4x4_output;
    const double vectors_in = divide_up(step.input_channels, tiling_->lanes);
    const double vectors_out = divide_up(step.output_channels, tiling_->lanes);
    const double transforms = tiles * (vectors_in * input + vectors_out * output) / threads_;
    return multiply_time(step, positions * tiles, positions, mode == kWinogradInSteps) +
           transforms + (mode == kWinogradInSteps ? costs.step : 0);
  }

  // To read so many weights for each pair of channels, and to multiply so many times: one after the
  // other where every thread reads all weights for a few tiles, both at once where each reads its
  // own panels'.
  double multiply_time(const Step& step, int64_t products, int64_t weights, bool at_once) const {
    const Costs& costs = kind_->costs;
    const double pairs = static_cast<double>(step.input_channels * step.output_channels);
    const double multiplying = pairs / threads_ * products / costs.products;
    const double reading = pairs / threads_ * weights * element_bytes_ / costs.weight_bytes;
    return at_once ? std::max(multiplying, reading) : multiplying + reading;
  }

  // The fewest blocks of tiles, each of which reads the weights, that share the work out to all
  // threads evenly enough.
  int64_t balanced_blocks(int64_t panels, int64_t tiles) const {
    int64_t blocks = 1;
    for (; blocks < tiles / kMaxTilePixels; ++blocks) {
      const int64_t tasks = panels * blocks;
      if (round_up(tasks, threads_) <= kImbalance * tasks) break;
    }
    return blocks;
  }

  void split_winograd(Step& step, const Buffer& to, int64_t widest) {
    step.pixel_count = winograd_tiles(to, step.winograd_size);
    const int64_t positions = positions_of(step);
    step.split_count = step.chunk_count = 1;
    if (step.winograd == kWinogradInSteps) {
      const int64_t elements = step.pixel_count * step.padded_channels;
      reserve_partials(positions * position_floats(floats(elements)));
      step.group_panels = 1;
      step.group_count = step.panel_count;
      step.block_count = std::max(balanced_blocks(step.panel_count, step.pixel_count),
                                  divide_up(step.pixel_count, kWinogradTiles));
      reserve(positions * position_floats(block_pixels(step) * widest));
      return;
    }
    const int64_t tile_bytes =
        positions * (element_bytes_ * step.padded_channels + kFloatBytes * widest);
    const int64_t fit = std::clamp<int64_t>(kWinogradBytes / tile_bytes, 8, kWinogradTiles);
    step.block_count = divide_up(step.pixel_count, fit);
    if (threads_ > 1) {
      // As many blocks for each thread.
      step.block_count = round_up(step.block_count, threads_);
      step.block_count = std::min(step.block_count, step.pixel_count);
    }
    step.group_count = 1;
    step.group_panels = step.panel_count;
    const int64_t tiles = block_pixels(step);
    reserve(positions * (position_floats(floats(tiles * step.padded_channels)) +
                         position_floats(tiles * widest)) +
            floats(zero_elements(step)));
  }

  // The step before a convolution that finds its inputs transformed.
  Step transform_step(const Step& convolution) {
    Step step = convolution;
    step.kind = kTransform;
    step.group_count = 1;
    step.block_count = std::min(step.pixel_count, threads_ > 1 ? threads_ * kTasksPerThread : 1);
    reserve(floats(zero_elements(step)));
    return step;
  }

  void split_image(Step& step, const Buffer& to) {
    const int64_t rows = step.pixel_count = header_.batch * to.height;
    const int64_t row_elements = image_row_elements(step, to);
    const int64_t held = kPackBytes / (element_bytes_ * row_elements) - step.window.height();
    const int64_t wanted = threads_ > 1 ? round_up(threads_ * kTasksPerThread, threads_) : 1;
    step.block_count = std::min(
        rows,
        std::max(wanted,
                 divide_up(rows, std::max<int64_t>(held, 0) / step.window.stride_height + 1)));
    step.split_count = step.chunk_count = 1;
    step.group_count = 1;
    step.group_panels = step.panel_count;
    reserve(run_floats(step) + floats(image_rows(step, block_pixels(step)) * row_elements));
  }

  // Small maps with many weights are split by output channels, so that each core streams its own
  // part of the weights; large maps by pixels, so that each core keeps its own part of the map.
  void split_tasks(Step& step, const Buffer& from, const std::vector<Panel>& panels) {
    const int64_t taps = step.window.taps();
    const int64_t panel_count = step.panel_count;
    const int64_t tile = tiling_->tile_pixels[panels[0].vectors];
    const int64_t tiles = divide_up(step.pixel_count, tile);
    const int64_t weight_floats = taps * step.input_channels * step.output_channels;
    const int64_t input_floats = header_.batch * from.height * from.width * step.input_channels;
    const int64_t wanted = threads_ * kTasksPerThread;

    int64_t groups = 1;
    int64_t blocks = 1;
    if (threads_ > 1 && step.pixel_count <= kSplitPixels) {
      groups = std::min(panel_count, step.packs ? threads_ : wanted);
    } else if (threads_ > 1 && weight_floats > input_floats && !step.packs) {
      groups = std::min(panel_count, wanted);
      blocks = std::min(tiles, divide_up(wanted, groups));
    } else if (threads_ > 1) {
      // As many blocks for each thread.
      blocks = std::min(round_up(std::min(tiles, wanted), threads_), step.pixel_count);
    }
    if (step.packs) {
      const int64_t row_bytes = element_bytes_ * gathered_pitch(step);
      const int64_t fit = std::max(kPackBytes / row_bytes / tile * tile, tile);
      blocks = std::max(blocks, divide_up(step.pixel_count, fit));
    }
    step.block_count = blocks;
    step.group_panels = divide_up(panel_count, groups);
    step.group_count = divide_up(panel_count, step.group_panels);
  }

  static int64_t block_pixels(const Step& step) {
    return divide_up(step.pixel_count, step.block_count);
  }

  void split_chunks(Step& step, uint64_t used_taps, int64_t widest) {
    const int64_t used = __builtin_popcountll(used_taps);
    const int64_t channels = step.input_channels;
    const int64_t tap_bytes = element_bytes_ * channels * widest;
    const int64_t input_bytes = element_bytes_ * channels * block_pixels(step);
    const bool several = block_pixels(step) > kMaxTilePixels;
    step.split_count = 1;
    int64_t tap_chunks = 1;
    int64_t channel_chunks = 1;
    if (threads_ > 1 && !step.packs && step.block_count == 1 && step.pixel_count <= kSplitPixels &&
        used >= 2 * threads_ && step.panel_count < threads_ * kTasksPerThread &&
        element_bytes_ * used * channels * step.output_channels >= kSplitWeightBytes) {
      step.split_count = tap_chunks = threads_;
      const int64_t floats =
          step.split_count * step.panel_count * step.pixel_count * kMaxTileVectors * tiling_->lanes;
      reserve_partials(floats);
    } else if (several && used * tap_bytes + input_bytes > kChunkBytes) {
      if (2 * input_bytes <= kChunkBytes && 2 * tap_bytes <= kChunkBytes) {
        tap_chunks = divide_up(used, kChunkBytes / 2 / tap_bytes);
      } else {
        channel_chunks = divide_up(used * tap_bytes + input_bytes, kChunkBytes);
      }
    }
    std::vector<Chunk> chunks;
    for (int64_t i = 0; i < channel_chunks; ++i) {
      const size_t first = chunks.size();
      chunks.resize(first + tap_chunks, {0, chunk_channel(step, i, channel_chunks),
                                         chunk_channel(step, i + 1, channel_chunks)});
      int64_t index = 0;
      for (uint64_t left = used_taps; left != 0; left &= left - 1)
        chunks[first + index++ * tap_chunks / used].taps |= left & -left;
    }
    step.chunks = writer_.append(chunks);
    step.chunk_count = static_cast<int64_t>(chunks.size());
  }

  // Where part `i` of the input channels begins: with a whole word.
  int64_t chunk_channel(const Step& step, int64_t i, int64_t chunks) const {
    const int64_t words = step.padded_channels / word_channels();
    return std::min(words * i / chunks * word_channels(), step.input_channels);
  }

  void reserve_scratch(const Step& step, int64_t widest) {
    const int64_t pack_floats = step.packs ? floats(block_pixels(step) * gathered_pitch(step)) : 0;
    const int64_t rows = step.chunk_count > 1 ? block_pixels(step) : kMaxTilePixels;
    reserve(run_floats(step) + pack_floats + rows * widest);
  }

  void reserve(int64_t floats) {
    require_size(floats, "the scratch memory of " + name_of_step());
    header_.scratch_floats = std::max(header_.scratch_floats, round_up(floats, 16));
  }

  void reserve_partials(int64_t floats) {
    require_size(floats, "the partial sums of " + name_of_step());
    header_.partial_floats = std::max(header_.partial_floats, round_up(floats, 16));
  }

  // Counted from 0, as in a description.
  std::string name_of_step() const { return "step " + std::to_string(number_ - 1); }

  Plan plan_;
  Writer writer_;
  int64_t threads_;
  int64_t table_pixels_ = 0;
  int64_t number_ = 0;       // of the plan's step that is being compiled, from 1
  int64_t forced_winograd_;  // -1: none
  const UkernelKind* kind_;
  const Tiling* tiling_;
  int64_t element_bytes_;
  ProgramHeader header_{};
  std::vector<Step> steps_;
  std::map<std::array<int64_t, 16>, PixelTables> tables_;
};

}  // namespace

std::vector<std::byte> compile(const int64_t* description, int64_t length, int64_t isa,
                               int64_t threads, int64_t winograd) {
  return Compiler(description, length, isa, threads, winograd).compile();
}

Algorithm algorithm_of(const Step& step) {
  if (step.winograd) return step.winograd_size == 2 ? kWinograd2 : kWinograd4;
  return step.packs ? kPacked : kDirect;
}

int64_t Program::workspace_floats(int64_t threads) const {
  if (threads < 1 || threads > kMostThreads)
    throw std::invalid_argument("threshnet_fast: threads is " + std::to_string(threads) +
                                ", expected 1 to " + std::to_string(kMostThreads));
  // Each of them is at most 2^48.
  return header().arena_floats + header().partial_floats + threads * header().scratch_floats;
}

Program::Program(const void* bytes, int64_t size) : bytes_(static_cast<const std::byte*>(bytes)) {
  if (!is_sealed<ProgramHeader>(bytes, size, kProgramMagic, kVersion))
    throw std::invalid_argument(
        "threshnet_fast: program is not one that this process compiled, or was changed");
  if (kind_of(header().isa) == nullptr)
    throw std::invalid_argument(
        "threshnet_fast: program was compiled for an instruction set that this processor lacks");
}

}  // namespace threshnet_fast::cpu
