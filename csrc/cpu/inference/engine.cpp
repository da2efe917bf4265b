#include <algorithm>
#include <cstring>
#include <limits>

#include "cpu/team.h"
#include "program.h"

namespace threshnet_fast::cpu {
namespace {

constexpr int32_t kZeros[kMaxTilePixels] = {};
constexpr int64_t kLineBytes = 64;

// Splits [0, count) into the fewest tiles of at most `most` pixels, as equal as possible.
struct Tiles {
  int64_t count, tiles;
  Tiles(int64_t count, int64_t most) : count(count), tiles(divide_up(count, most)) {}
  int64_t begin(int64_t tile) const { return count * tile / tiles; }
};

// Where a tile of `size` x `size` outputs lies: its image and its first row and column.
struct WinogradTile {
  int64_t image, y, x;
  WinogradTile(int64_t index, int64_t size, const Buffer& to) {
    const int64_t rows = divide_up(to.height, size);
    const int64_t columns = divide_up(to.width, size);
    x = index % columns * size;
    y = index / columns % rows * size;
    image = index / columns / rows;
  }
};

// How many pixels of the input a tap lies behind the first one.
int64_t tap_shift(const Step& step, int64_t tap, const Buffer& from) {
  return tap / step.kernel_width * from.width + tap % step.kernel_width;
}

float activated(float value, Activation activation) {
  if (activation != kIdentity && value < 0.0f) return 0.0f;
  return activation == kRelu6 && value > 6.0f ? 6.0f : value;
}

template <typename Element>
class Engine {
 public:
  Engine(const Program& program, const float* packed, float* workspace, const Binding& binding)
      : program_(program),
        table_(ukernel_table<Element>(program.header().isa)),
        packed_(packed),
        arena_(elements_at(workspace)),
        partials_(workspace + program.header().arena_floats),
        scratch_(partials_ + program.header().partial_floats),
        binding_(binding) {}

  void run(int64_t step_index, int64_t task, int64_t thread) const {
    const Step& step = program_.step(step_index);
    float* scratch = scratch_ + thread * program_.header().scratch_floats;
    switch (step.kind) {
      case kPool:
        return pool(step, task, scratch);
      case kReduction:
        return reduce(step, task);
      case kTransform:
        return transform(step, task, scratch);
      case kDepthwise:
        return depthwise(step, task, scratch);
      default:
        return convolve(step, task, scratch);
    }
  }

 private:
  using Run = ChannelRun<Element>;
  using Tile = ConvTile<Element>;

  static Element* elements_at(float* memory) { return reinterpret_cast<Element*>(memory); }
  static const Element* elements_at(const float* memory) {
    return reinterpret_cast<const Element*>(memory);
  }

  const Element* input_of(const BufferSegment& segment) const {
    const Buffer& buffer = program_.buffer(segment.buffer);
    const Element* base = buffer.offset >= 0
                              ? arena_ + buffer.offset
                              : elements_at(binding_.externals[kFirstExternal - buffer.offset]);
    return base + segment.channel;
  }

  Element* output_of(const Step& step) const {
    const Buffer& buffer = program_.buffer(step.output_buffer);
    Element* base =
        buffer.offset >= 0 ? arena_ + buffer.offset : static_cast<Element*>(binding_.output);
    return base + step.output_channel;
  }

  const Element* weights_of(const Panel& panel) const {
    return elements_at(packed_ + panel.weights);
  }

  // Memory to be fetched in parts, by one tile after the other.
  struct Fetching {
    Fetch next;
    int64_t bytes = std::numeric_limits<int64_t>::max();

    Fetch take(int64_t words) {
      if (bytes <= 0) return {};
      const Fetch part = next;
      next.address = static_cast<const char*>(next.address) + words * next.step;
      bytes -= words * next.step;
      return part;
    }
  };

  void convolve(const Step& step, int64_t task, float* scratch) const {
    const int64_t split = task % step.split_count;
    const int64_t block = task / step.split_count % step.block_count;
    const int64_t group = task / step.split_count / step.block_count;
    const Panel* panels = program_.at<Panel>(step.panels);
    const int64_t first_pixel = step.pixel_count * block / step.block_count;
    const int64_t pixels = step.pixel_count * (block + 1) / step.block_count - first_pixel;
    const int64_t first_panel = group * step.group_panels;
    const int64_t last_panel = std::min(first_panel + step.group_panels, step.panel_count);
    if (step.winograd == kWinogradInTask) {
      convolve_winograd(step, first_pixel, pixels, scratch);
    } else if (step.winograd == kWinogradInSteps) {
      const Transformed inputs = transformed(step, partials_, step.pixel_count);
      for (int64_t p = first_panel; p < last_panel; ++p)
        multiply_transformed(step, panels[p], first_pixel, pixels, inputs.from_tile(first_pixel),
                             scratch, nullptr);
    } else if (step.packs == kImageRows) {
      convolve_image(step, first_pixel, pixels, scratch);
    } else if (step.packs == kWindows) {
      gather(step, first_pixel, pixels, elements_at(scratch));
      Fetching next = next_block(step, first_pixel + pixels, pixels);
      for (int64_t p = first_panel; p < last_panel; ++p)
        convolve_packed(step, panels[p], first_pixel, pixels, elements_at(scratch), next);
    } else {
      for (int64_t p = first_panel; p < last_panel; ++p)
        convolve_direct(step, p, p == first_panel, split, first_pixel, pixels, scratch);
    }
  }

  // F(m x m, 3x3) for some tiles in one task: all inputs are transformed, multiplied position by
  // position, and the products transformed back, while everything stays in L2.
  void convolve_winograd(const Step& step, int64_t first_tile, int64_t count,
                         float* scratch) const {
    float* const memory = scratch + floats_of<Element>(zero_elements(step));
    const Transformed inputs = transformed(step, memory, count);
    transform_inputs(step, first_tile, count, elements_at(scratch), inputs);
    const int64_t floats = positions_of(step) * floats_of<Element>(inputs.position);
    Fetching next = next_tiles(step, first_tile + count, count);
    for (int64_t p = 0; p < step.panel_count; ++p)
      multiply_transformed(step, program_.at<Panel>(step.panels)[p], first_tile, count, inputs,
                           memory + floats, &next);
  }

  // The rows of the map that the tiles of the block behind this one, which probably comes next,
  // will read, where all channels lie side by side.
  Fetching next_tiles(const Step& step, int64_t first_tile, int64_t count) const {
    if (step.segment_count > 1 || first_tile + count > step.pixel_count) return {{}, 0};
    const Buffer& to = program_.buffer(step.output_buffer);
    const BufferSegment& segment = *program_.at<BufferSegment>(step.segments);
    const Buffer& from = program_.buffer(segment.buffer);
    const WinogradTile first(first_tile, step.winograd_size, to);
    const WinogradTile last(first_tile + count - 1, step.winograd_size, to);
    const int64_t begin = first.image * from.height + first.y;
    const int64_t end = last.image * from.height + last.y + step.winograd_size + 1;
    const int64_t row = from.width * from.pitch;
    return {{input_of(segment) + begin * row, kLineBytes},
            (end - begin) * row * static_cast<int64_t>(sizeof(Element))};
  }

  // Transformed inputs: tile t's channels at a position begin at data[position * i + tile * t].
  struct Transformed {
    Element* data;
    int64_t position, tile;

    Transformed from_tile(int64_t first) const { return {data + first * tile, position, tile}; }
  };

  static Transformed transformed(const Step& step, float* memory, int64_t tiles) {
    const int64_t floats = position_floats(floats_of<Element>(tiles * step.padded_channels));
    return {elements_at(memory), floats * kWordChannels<Element>, step.padded_channels};
  }

  // `zeros` is room for a pixel of padding.
  void transform_inputs(const Step& step, int64_t first_tile, int64_t count, Element* zeros,
                        const Transformed& inputs) const {
    const Buffer& to = program_.buffer(step.output_buffer);
    const int64_t extent = step.winograd_size + 2;
    const WinogradFunctions<Element>& functions = winograd_functions(step);
    std::memset(zeros, 0, step.padded_channels * sizeof(Element));
    const BufferSegment* segments = program_.at<BufferSegment>(step.segments);
    for (int64_t i = 0; i < count; ++i) {
      const WinogradTile tile(first_tile + i, step.winograd_size, to);
      const int64_t left = tile.x - 1;
      const int64_t top = tile.y - 1;
      Element* output = inputs.data + i * inputs.tile;
      for (int64_t s = 0; s < step.segment_count; ++s) {
        const Buffer& from = program_.buffer(segments[s].buffer);
        const Element* base = input_of(segments[s]);
        const Element* pixels[kMaxWinogradPositions];
        for (int64_t y = 0; y < extent; ++y) {
          const bool row_valid = top + y >= 0 && top + y < from.height;
          const int64_t row = (tile.image * from.height + top + y) * from.width + left;
          for (int64_t x = 0; x < extent; ++x) {
            const bool valid = row_valid && left + x >= 0 && left + x < from.width;
            pixels[extent * y + x] = valid ? base + (row + x) * from.pitch : zeros;
          }
        }
        functions.input(pixels, segments[s].channels, output, inputs.position);
        output += segments[s].channels;
      }
      for (; output < inputs.data + i * inputs.tile + step.padded_channels; ++output) {
        for (int64_t position = 0; position < extent * extent; ++position)
          output[position * inputs.position] = Element{};
      }
    }
  }

  // The products of some tiles with one panel, [position][tile][NR], and from them the outputs.
  void multiply_transformed(const Step& step, const Panel& panel, int64_t first_tile, int64_t count,
                            const Transformed& inputs, float* products,
                            Fetching* next_block) const {
    for (int64_t position = 0; position < positions_of(step); ++position)
      multiply_position(step, panel, position, count, inputs,
                        products + position * product_position(panel, count), next_block);
    transform_products(step, panel, first_tile, count, products);
  }

  // Floats between a panel's products at neighbouring positions, [tile][NR] each.
  int64_t product_position(const Panel& panel, int64_t count) const {
    return position_floats(count * panel.vectors * table_.tiling.lanes);
  }

  void multiply_position(const Step& step, const Panel& panel, int64_t position, int64_t count,
                         const Transformed& transformed, float* products,
                         Fetching* next_block) const {
    const Element* inputs = transformed.data + position * transformed.position;
    const int64_t channels = step.padded_channels;
    const int64_t lanes = panel.vectors * table_.tiling.lanes;
    const Element* weights = weights_of(panel) + position * channels * panel.pitch;
    Tile tile{};
    tile.run_count = 1;
    tile.weight_pitch = panel.pitch;
    tile.input_pixels = kIota;
    tile.initial = kNoBias;
    tile.initial_rows = kZeros;
    tile.output_rows = kIota;
    tile.output_pitch = lanes;
    tile.channels = lanes;
    const Tiles tiles(count, table_.tiling.tile_pixels[panel.vectors]);
    // The next position's weights in as many parts as there are tiles, and the next tile's inputs.
    Fetching next{{weights + channels * panel.pitch, weight_part(panel, tiles.tiles)}};
    for (int64_t t = 0; t < tiles.tiles; ++t) {
      const Element* following =
          inputs + (t + 1 < tiles.tiles ? tiles.begin(t + 1) * channels : transformed.position);
      const int64_t words = channels / kWordChannels<Element>;
      const Fetch next_inputs =
          next_block != nullptr ? next_block->take(words) : Fetch{following, kLineBytes};
      const Run run{inputs + tiles.begin(t) * channels,
                    weights,
                    channels,
                    channels,
                    {next.take(words), next_inputs}};
      tile.runs = &run;
      tile.sums = products + tiles.begin(t) * lanes;
      table_.conv_tile[panel.vectors][tiles.begin(t + 1) - tiles.begin(t)](tile);
    }
  }

  void transform_products(const Step& step, const Panel& panel, int64_t first_tile, int64_t count,
                          const float* products) const {
    const Buffer& to = program_.buffer(step.output_buffer);
    const int64_t lanes = panel.vectors * table_.tiling.lanes;
    const int64_t size = step.winograd_size;
    Element* const output = output_of(step) + panel.channel;
    for (int64_t i = 0; i < count; ++i) {
      const auto [image, y, x] = WinogradTile(first_tile + i, size, to);
      Element* outputs[kMaxWinogradPositions];
      for (int64_t row = 0; row < size; ++row) {
        for (int64_t column = 0; column < size; ++column) {
          const bool exists = y + row < to.height && x + column < to.width;
          outputs[size * row + column] =
              exists ? output + ((image * to.height + y + row) * to.width + x + column) * to.pitch
                     : nullptr;
        }
      }
      winograd_functions(step).output(products + i * lanes, product_position(panel, count),
                                      packed_ + panel.bias, panel.channels, step.activation,
                                      outputs);
    }
  }

  const WinogradFunctions<Element>& winograd_functions(const Step& step) const {
    return step.winograd_size == 2 ? table_.winograd_2x2 : table_.winograd_4x4;
  }

  // Transforms the inputs of some tiles for the step that follows.
  void transform(const Step& step, int64_t block, float* scratch) const {
    const int64_t first = step.pixel_count * block / step.block_count;
    const int64_t count = step.pixel_count * (block + 1) / step.block_count - first;
    transform_inputs(step, first, count, elements_at(scratch),
                     transformed(step, partials_, step.pixel_count).from_tile(first));
  }

  // Where a part of a convolution with split taps leaves its sums: [pixel][NR].
  float* partial_sums(const Step& step, int64_t split, int64_t panel) const {
    return partials_ + (split * step.panel_count + panel) * step.pixel_count * kMaxTileVectors *
                           table_.tiling.lanes;
  }

  void reduce(const Step& step, int64_t group) const {
    const int32_t* output_pixels = program_.at<int32_t>(step.output_pixels);
    const int64_t pitch = program_.buffer(step.output_buffer).pitch;
    const int64_t last = std::min((group + 1) * step.group_panels, step.panel_count);
    for (int64_t p = group * step.group_panels; p < last; ++p) {
      const Panel& panel = program_.at<Panel>(step.panels)[p];
      const int64_t width = panel.vectors * table_.tiling.lanes;
      for (int64_t i = 0; i < step.pixel_count; ++i) {
        Element* output = output_of(step) + output_pixels[i] * pitch + panel.channel;
        for (int64_t c = 0; c < panel.channels; ++c) {
          float sum = partial_sums(step, 0, p)[i * width + c];
          for (int64_t split = 1; split < step.split_count; ++split)
            sum += partial_sums(step, split, p)[i * width + c];
          output[c] = rounded<Element>(activated(sum, step.activation));
        }
      }
    }
  }

  // Writes each pixel's window as one row [tap][channel], after the prologue; taps that fall on
  // padding are zero, which is why the prologue cannot come later.
  void gather(const Step& step, int64_t first_pixel, int64_t pixels, Element* rows) const {
    const int64_t pitch = gathered_pitch(step);
    const BufferSegment* segments = program_.at<BufferSegment>(step.segments);
    const int32_t* input_pixels = program_.at<int32_t>(step.input_pixels) + first_pixel;
    const uint64_t* pixel_taps = program_.at<uint64_t>(step.pixel_taps) + first_pixel;
    for (int64_t i = 0; i < pixels; ++i) {
      Element* row = rows + i * pitch;
      for (int64_t tap = 0; tap < step.kernel_height * step.kernel_width; ++tap) {
        Element* to = row + tap * step.padded_channels;
        if (!(pixel_taps[i] >> tap & 1)) {
          std::memset(to, 0, step.padded_channels * sizeof(Element));
          continue;
        }
        int64_t channel = 0;
        for (int64_t s = 0; s < step.segment_count; ++s) {
          const Buffer& buffer = program_.buffer(segments[s].buffer);
          const int64_t shift = tap_shift(step, tap, buffer);
          const Element* from = input_of(segments[s]) + (input_pixels[i] + shift) * buffer.pitch;
          if (step.scale_index >= 0) {
            table_.bn_relu(from, packed_ + step.scale + channel, packed_ + step.shift + channel,
                           segments[s].channels, to + channel);
          } else {
            std::memcpy(to + channel, from, segments[s].channels * sizeof(Element));
          }
          channel += segments[s].channels;
        }
        std::fill(to + channel, to + step.padded_channels, Element{});
      }
    }
  }

  // Some rows of the output, from the network's input in whatever strides it has.
  void convolve_image(const Step& step, int64_t first_row, int64_t count, float* scratch) const {
    const Buffer& to = program_.buffer(step.output_buffer);
    Run* const runs = reinterpret_cast<Run*>(scratch);
    Element* const image = elements_at(scratch + run_floats(step));
    const int64_t last_row = first_row + count;
    while (first_row < last_row) {
      // As many as belong to one image.
      const int64_t y = first_row % to.height;
      const int64_t rows = std::min(last_row - first_row, to.height - y);
      copy_image(step, first_row / to.height, y * step.stride - step.padding,
                 image_rows(step, rows), image);
      for (int64_t p = 0; p < step.panel_count; ++p)
        convolve_image_rows(step, program_.at<Panel>(step.panels)[p], first_row, rows, image, runs);
      first_row += rows;
    }
  }

  // Some rows of one image of the network's input, from `top` on: [row][column][channel] with zeros
  // in the place of the padding.
  void copy_image(const Step& step, int64_t image, int64_t top, int64_t rows, Element* to) const {
    const ProgramHeader& header = program_.header();
    const StridedInput& input = binding_.input;
    const int64_t pitch = step.padded_channels;
    const int64_t row_elements = image_row_elements(step, program_.buffer(step.output_buffer));
    const int64_t left = std::min(step.padding * pitch, row_elements);
    const int64_t columns = std::min(header.input_width, (row_elements - left) / pitch);
    const bool dense = input.channel_stride == 1 && input.width_stride == pitch;
    for (int64_t y = top; y < top + rows; ++y, to += row_elements) {
      if (y < 0 || y >= header.input_height) {
        std::fill(to, to + row_elements, Element{});
        continue;
      }
      const Element* from = static_cast<const Element*>(input.data) + image * input.batch_stride +
                            y * input.height_stride;
      std::fill(to, to + left, Element{});
      Element* const first = to + left;
      std::fill(first + columns * pitch, to + row_elements, Element{});
      if (dense) {
        std::memcpy(first, from, columns * pitch * sizeof(Element));
        continue;
      }
      for (int64_t c = 0; c < step.input_channels; ++c) {
        const Element* channel = from + c * input.channel_stride;
        for (int64_t x = 0; x < columns; ++x)
          first[x * pitch + c] = channel[x * input.width_stride];
      }
      for (int64_t c = step.input_channels; c < pitch; ++c) {
        for (int64_t x = 0; x < columns; ++x) first[x * pitch + c] = Element{};
      }
    }
  }

  // One panel of some rows of the output; a row of the window is one run.
  void convolve_image_rows(const Step& step, const Panel& panel, int64_t first_row, int64_t rows,
                           const Element* image, Run* runs) const {
    const Buffer& to = program_.buffer(step.output_buffer);
    const int64_t row_elements = image_row_elements(step, to);
    const int64_t window = step.kernel_width * step.padded_channels;
    const int64_t pitch = step.stride * step.padded_channels;
    const Tiles tiles(to.width, table_.tiling.tile_pixels[panel.vectors]);
    Tile tile = output_tile(step, panel);
    tile.runs = runs;
    tile.run_count = step.kernel_height;
    tile.input_pixels = kIota;
    int32_t outputs[kMaxTilePixels];
    tile.output_rows = outputs;
    for (int64_t y = 0; y < rows; ++y) {
      for (int64_t t = 0; t < tiles.tiles; ++t) {
        const int64_t x = tiles.begin(t);
        const int64_t pixels = tiles.begin(t + 1) - x;
        for (int64_t ky = 0; ky < step.kernel_height; ++ky)
          runs[ky] = {image + (y * step.stride + ky) * row_elements + x * pitch,
                      weights_of(panel) + ky * window * panel.pitch,
                      pitch,
                      window,
                      {}};
        for (int64_t i = 0; i < pixels; ++i)
          outputs[i] = static_cast<int32_t>((first_row + y) * to.width + x + i);
        table_.conv_tile[panel.vectors][pixels](tile);
      }
    }
  }

  Tile output_tile(const Step& step, const Panel& panel) const {
    Tile tile{};
    tile.initial = packed_ + panel.bias;
    tile.weight_pitch = panel.pitch;
    tile.initial_rows = kZeros;
    tile.output = output_of(step) + panel.channel;
    tile.output_pitch = program_.buffer(step.output_buffer).pitch;
    tile.channels = panel.channels;
    tile.activation = step.activation;
    return tile;
  }

  // What the block of pixels behind this one, which probably comes next, will gather. Only pixels
  // that lie side by side, as those of a 1x1 convolution in a dense block do.
  Fetching next_block(const Step& step, int64_t first_pixel, int64_t pixels) const {
    if (step.kernel_height * step.kernel_width > 1 || step.stride > 1 || step.segment_count > 1 ||
        first_pixel + pixels > step.pixel_count)
      return {{}, 0};
    const BufferSegment& segment = *program_.at<BufferSegment>(step.segments);
    const Buffer& buffer = program_.buffer(segment.buffer);
    if (buffer.offset == kNetworkInput) return {{}, 0};
    const int32_t first = program_.at<int32_t>(step.input_pixels)[first_pixel];
    return {{input_of(segment) + first * buffer.pitch, kLineBytes},
            pixels * buffer.pitch * static_cast<int64_t>(sizeof(Element))};
  }

  void convolve_packed(const Step& step, const Panel& panel, int64_t first_pixel, int64_t pixels,
                       const Element* rows, Fetching& next) const {
    const int64_t pitch = gathered_pitch(step);
    const int64_t length = step.kernel_height * step.kernel_width * step.padded_channels;
    const int32_t* output_pixels = program_.at<int32_t>(step.output_pixels) + first_pixel;
    Tile tile = output_tile(step, panel);
    const Tiles tiles(pixels, table_.tiling.tile_pixels[panel.vectors]);
    Fetching weights{{weights_of(panel) + length * panel.pitch, weight_part(panel, tiles.tiles)}};
    for (int64_t t = 0; t < tiles.tiles; ++t) {
      const int64_t begin = tiles.begin(t);
      const int64_t words = length / kWordChannels<Element>;
      const Fetch next_weights = tiles.tiles > 1 ? weights.take(words) : Fetch{};
      const Run run{
          rows + begin * pitch, weights_of(panel), pitch, length, {next_weights, next.take(words)}};
      tile.runs = &run;
      tile.run_count = 1;
      tile.input_pixels = kIota;
      tile.output_rows = output_pixels + begin;
      table_.conv_tile[panel.vectors][tiles.begin(t + 1) - begin](tile);
    }
  }

  // Appends the runs of one tap: the chunk's channels of the concatenation, shifted by the tap. A
  // run that goes on where the one before it ends, in memory and in the weights, joins it: where
  // pixels lie side by side, neighbouring taps do so.
  Run* append_runs(const Step& step, const Panel& panel, int64_t tap, const Chunk& chunk,
                   const Run* first, Run* run) const {
    const BufferSegment* segments = program_.at<BufferSegment>(step.segments);
    const Element* weights = weights_of(panel) + tap * step.padded_channels * panel.pitch;
    int64_t position = 0;
    for (int64_t s = 0; s < step.segment_count && position < chunk.last_channel; ++s) {
      const int64_t skipped = std::max<int64_t>(chunk.first_channel - position, 0);
      const int64_t channels =
          std::min(segments[s].channels, chunk.last_channel - position) - skipped;
      position += segments[s].channels;
      if (channels <= 0) continue;
      const Buffer& buffer = program_.buffer(segments[s].buffer);
      const int64_t shift = tap_shift(step, tap, buffer);
      const Run next{input_of(segments[s]) + shift * buffer.pitch + skipped,
                     weights + (position - segments[s].channels + skipped) * panel.pitch,
                     buffer.pitch,
                     channels,
                     {}};
      Run& last = run[-1];
      if (run > first && next.input == last.input + last.channels && next.pitch == last.pitch &&
          next.weights == last.weights + last.channels * panel.pitch) {
        last.channels += channels;
      } else {
        *run++ = next;
      }
    }
    return run;
  }

  void convolve_direct(const Step& step, int64_t panel_index, bool first_panel, int64_t split,
                       int64_t first_pixel, int64_t pixels, float* scratch) const {
    const Panel& panel = program_.at<Panel>(step.panels)[panel_index];
    const Tiles tiles(pixels, table_.tiling.tile_pixels[panel.vectors]);
    const int64_t lanes = panel.vectors * table_.tiling.lanes;
    const bool whole = step.split_count == 1;
    Run* const runs = reinterpret_cast<Run*>(scratch);
    float* const sums = whole ? scratch + run_floats(step) : partial_sums(step, split, panel_index);
    const int64_t first_chunk = step.chunk_count * split / step.split_count;
    const int64_t last_chunk = step.chunk_count * (split + 1) / step.split_count;
    const bool keeps_sums = !whole || step.chunk_count > 1;
    for (int64_t c = first_chunk; c < last_chunk; ++c) {
      for (int64_t t = 0; t < tiles.tiles; ++t) {
        TilePart part{};
        part.first_pixel = first_pixel + tiles.begin(t);
        part.pixels = tiles.begin(t + 1) - tiles.begin(t);
        part.chunk = program_.at<Chunk>(step.chunks)[c];
        part.tile = t;
        part.tiles = tiles.tiles;
        part.starts = c == first_chunk;
        part.has_bias = split == 0;
        part.finishes = whole && c + 1 == last_chunk;
        part.fetches_inputs = first_panel && step.kernel_height * step.kernel_width == 1;
        part.runs = runs;
        part.sums = keeps_sums ? sums + tiles.begin(t) * lanes : sums;
        convolve_part(step, panel, part);
      }
    }
  }

  // One chunk of one tile.
  struct TilePart {
    int64_t first_pixel, pixels;
    int64_t tile, tiles;  // its index, and how many the block has
    Chunk chunk;
    bool starts, has_bias, finishes;
    bool fetches_inputs;  // of the pixels that follow, as no panel before did so
    Run* runs;
    float* sums;  // [pixels][NR]: read unless `starts`, written unless `finishes`
  };

  void convolve_part(const Step& step, const Panel& panel, const TilePart& part) const {
    const int32_t* input_pixels = program_.at<int32_t>(step.input_pixels) + part.first_pixel;
    const int32_t* output_pixels = program_.at<int32_t>(step.output_pixels) + part.first_pixel;
    const uint64_t* pixel_taps = program_.at<uint64_t>(step.pixel_taps) + part.first_pixel;
    const ConvTileFunction<Element>* conv_tile = table_.conv_tile[panel.vectors];
    const int64_t lanes = panel.vectors * table_.tiling.lanes;
    const int64_t count = part.pixels;
    uint64_t every = part.chunk.taps;
    uint64_t any = 0;
    for (int64_t i = 0; i < count; ++i) {
      every &= pixel_taps[i];
      any |= pixel_taps[i];
    }

    // Taps that only some of the pixels need come first, through sums in memory; then all the
    // others, in registers, and the epilogue.
    Tile sums{};
    sums.runs = part.runs;
    sums.weight_pitch = panel.pitch;
    sums.initial = part.sums;
    sums.initial_pitch = lanes;
    sums.sums = part.sums;
    sums.output_pitch = lanes;
    sums.channels = lanes;
    Tile tile = output_tile(step, panel);
    tile.runs = part.runs;
    tile.input_pixels = input_pixels;
    tile.output_rows = output_pixels;
    if (!part.has_bias) tile.initial = kNoBias;
    bool started = !part.starts;
    for (uint64_t left = any & part.chunk.taps & ~every; left != 0; left &= left - 1) {
      const int64_t tap = __builtin_ctzll(left);
      if (!started) {
        for (int64_t i = 0; i < count; ++i)
          std::memcpy(part.sums + i * lanes, tile.initial, lanes * sizeof(float));
        started = true;
      }
      int32_t inputs[kMaxTilePixels];
      int32_t rows[kMaxTilePixels];
      int64_t used = 0;
      for (int64_t i = 0; i < count; ++i) {
        inputs[used] = input_pixels[i];
        rows[used] = static_cast<int32_t>(i);
        used += pixel_taps[i] >> tap & 1;
      }
      sums.run_count = append_runs(step, panel, tap, part.chunk, part.runs, part.runs) - part.runs;
      sums.input_pixels = inputs;
      sums.initial_rows = rows;
      sums.output_rows = rows;
      conv_tile[used](sums);
    }

    Run* run = part.runs;
    for (uint64_t left = every; left != 0; left &= left - 1)
      run = append_runs(step, panel, __builtin_ctzll(left), part.chunk, part.runs, run);
    tile.run_count = run - part.runs;
    if (part.tiles > 1) fetch_next_weights(step, panel, part, run);
    if (part.fetches_inputs) {
      for (Run* i = part.runs; i < run; ++i) {
        const int64_t bytes = count * i->pitch * static_cast<int64_t>(sizeof(Element));
        i->fetches[1] = {i->input + (input_pixels[count - 1] + 1) * i->pitch,
                         divide_up(bytes, i->channels / kWordChannels<Element>)};
      }
    }
    if (started) {
      tile.initial = part.sums;
      tile.initial_rows = kIota;
      tile.initial_pitch = lanes;
    }
    if (!part.finishes) {
      tile.sums = part.sums;
      tile.output_rows = kIota;
      tile.output_pitch = lanes;
      tile.channels = lanes;
      tile.activation = kIdentity;
    }
    conv_tile[count](tile);
  }

  // Bytes of every word's weights that each of some tiles fetches.
  static int64_t weight_part(const Panel& panel, int64_t tiles) {
    return divide_up(panel.pitch * static_cast<int64_t>(sizeof(float)), tiles);
  }

  // Lets every tile fetch its part of the weights of the chunk behind this one, or, as panels lie
  // one behind the other, of the next panel.
  void fetch_next_weights(const Step& step, const Panel& panel, const TilePart& part,
                          Run* last) const {
    const int64_t channels = part.chunk.last_channel - part.chunk.first_channel;
    const int64_t taps = channels < step.input_channels ? 1 : __builtin_popcountll(part.chunk.taps);
    const int64_t bytes = weight_part(panel, part.tiles);
    for (Run* run = part.runs; run < last; ++run) {
      const int64_t words = run->channels / kWordChannels<Element>;
      const Element* next = run->weights + taps * channels * panel.pitch;
      run->fetches[0] = {reinterpret_cast<const char*>(next) + part.tile * words * bytes, bytes};
    }
  }

  void pool(const Step& step, int64_t block, float* scratch) const {
    const BufferSegment& segment = *program_.at<BufferSegment>(step.segments);
    const Buffer& from = program_.buffer(segment.buffer);
    const Buffer& to = program_.buffer(step.output_buffer);
    const Element* input = input_of(segment);
    Element* output = output_of(step);
    int64_t* const offsets = reinterpret_cast<int64_t*>(scratch);
    const int64_t rows = program_.header().batch * to.height;
    const int64_t last = rows * (block + 1) / step.block_count;
    for (int64_t row = rows * block / step.block_count; row < last; ++row) {
      const int64_t n = row / to.height;
      const int64_t top = row % to.height * step.stride - step.padding;
      for (int64_t x = 0; x < to.width; ++x) {
        const int64_t left = x * step.stride - step.padding;
        int64_t count = 0;
        for (int64_t ky = 0; ky < step.kernel_height; ++ky) {
          for (int64_t kx = 0; kx < step.kernel_width; ++kx) {
            const int64_t y = top + ky;
            const int64_t column = left + kx;
            if (y >= 0 && y < from.height && column >= 0 && column < from.width)
              offsets[count++] = ((n * from.height + y) * from.width + column) * from.pitch;
          }
        }
        Element* const pixel = output + (row * to.width + x) * to.pitch;
        const float factor = 1.0f / static_cast<float>(count);
        if (step.scale_index >= 0) {
          table_.bn_relu_average_pool(input, offsets, count, packed_ + step.scale,
                                      packed_ + step.shift, segment.channels, factor, pixel);
        } else {
          (step.average ? table_.average_pool : table_.max_pool)(input, offsets, count,
                                                                 segment.channels, factor, pixel);
        }
      }
    }
  }

  void depthwise(const Step& step, int64_t block, float* scratch) const {
    const BufferSegment& segment = *program_.at<BufferSegment>(step.segments);
    const Panel& panel = *program_.at<Panel>(step.panels);
    const Buffer& from = program_.buffer(segment.buffer);
    const Buffer& to = program_.buffer(step.output_buffer);
    int64_t* const input_offsets = reinterpret_cast<int64_t*>(scratch);
    DepthwiseRow<Element> row{};
    row.weights = packed_ + panel.weights;
    row.bias = packed_ + panel.bias;
    row.input_offsets = input_offsets;
    row.weight_offsets = input_offsets + step.kernel_height * step.kernel_width;
    row.input_step = step.stride * from.pitch;
    row.output_step = to.pitch;
    row.channels = segment.channels;
    row.activation = step.activation;
    // Pixels from `inner` up to `outer` have all columns of their windows within the map.
    const int64_t inner = std::min(divide_up(step.padding, step.stride), to.width);
    const int64_t last_left = from.width + step.padding - step.kernel_width;
    const int64_t outer =
        std::clamp(last_left < 0 ? 0 : last_left / step.stride + 1, inner, to.width);
    const int64_t rows = program_.header().batch * to.height;
    const int64_t last = rows * (block + 1) / step.block_count;
    for (int64_t y = rows * block / step.block_count; y < last; ++y) {
      const int64_t top = y % to.height * step.stride - step.padding;
      const Element* image =
          input_of(segment) + y / to.height * from.height * from.width * from.pitch;
      for (int64_t x = 0; x < to.width; x += row.pixels) {
        const int64_t left = x * step.stride - step.padding;
        row.pixels = x >= inner && x < outer ? outer - x : 1;
        row.taps = window_taps(step, panel, from, top, left, input_offsets);
        row.input = image + (top * from.width + left) * from.pitch;
        row.output = output_of(step) + (y * to.width + x) * to.pitch;
        table_.depthwise(row);
      }
    }
  }

  // The taps of a window at a row and column of the input that are not padding: their offsets from
  // there, then those of their weights. Returns how many there are.
  static int64_t window_taps(const Step& step, const Panel& panel, const Buffer& from, int64_t top,
                             int64_t left, int64_t* offsets) {
    const int64_t taps = step.kernel_height * step.kernel_width;
    int64_t count = 0;
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t y = top + tap / step.kernel_width;
      const int64_t x = left + tap % step.kernel_width;
      if (y < 0 || y >= from.height || x < 0 || x >= from.width) continue;
      offsets[count] = tap_shift(step, tap, from) * from.pitch;
      offsets[taps + count] = tap * panel.pitch;
      ++count;
    }
    return count;
  }

  const Program& program_;
  const UkernelTable<Element>& table_;
  const float* packed_;
  Element* arena_;
  float* partials_;
  float* scratch_;
  const Binding& binding_;
};

}  // namespace

static int64_t task_count(const Step& step) {
  const int64_t tasks = step.block_count * step.group_count;
  return step.kind == kConvolution ? tasks * step.split_count : tasks;
}

template <typename Element>
static void run_elements(const Program& program, const float* packed, float* workspace,
                         const Binding& binding, int64_t threads, ParallelFor parallel_for,
                         const TaskObserver* observer) {
  const ProgramHeader& header = program.header();
  std::vector<int64_t> tasks;
  for (int64_t i = 0; i < header.step_count; ++i) tasks.push_back(task_count(program.step(i)));
  const Engine<Element> engine(program, packed, workspace, binding);
  run_team(threads, parallel_for, tasks, [&](int64_t step, int64_t task, int64_t thread) {
    engine.run(step, task, thread);
    if (observer != nullptr) observer->finished(observer->context, step, thread);
  });
}

void run(const Program& program, const float* packed, float* workspace, const Binding& binding,
         int64_t threads, ParallelFor parallel_for, const TaskObserver* observer) {
  const auto run_program =
      program.header().isa == kAvx512Bf16 ? run_elements<Bfloat16> : run_elements<float>;
  run_program(program, packed, workspace, binding, threads, parallel_for, observer);
}

}  // namespace threshnet_fast::cpu
