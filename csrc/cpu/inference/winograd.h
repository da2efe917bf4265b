// Winograd's convolutions of inference, in one task or in steps of their own. Free of torch.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/fetch.h"
#include "cpu/tiles.h"
#include "cpu/winograd.h"
#include "operands.h"
#include "program.h"

namespace threshnet_fast::cpu {

template <typename Element>
class WinogradConvolution {
 public:
  explicit WinogradConvolution(const Operands<Element>& operands) : operands_(operands) {}

  // F(m x m, 3x3) for some tiles in one task: all inputs are transformed, multiplied position by
  // position, and the products transformed back, while everything stays in L2.
  void convolve(const Step& step, int64_t first_tile, int64_t count, float* scratch) const {
    float* const memory = scratch + floats_of<Element>(zero_elements(step));
    const TransformedTiles<Element> inputs = transformed(step, memory, count);
    transform_inputs(step, first_tile, count, elements_at<Element>(scratch), inputs);
    const int64_t floats = positions_of(step) * floats_of<Element>(inputs.position);
    Fetching next = next_tiles(step, first_tile + count, count);
    for (int64_t p = 0; p < step.panel_count; ++p)
      multiply_transformed(step, operands_.panels_of(step)[p], first_tile, count, inputs,
                           memory + floats, &next);
  }

  // Transforms the inputs of some tiles for the step that follows.
  void transform(const Step& step, int64_t first_tile, int64_t count, float* scratch) const {
    transform_inputs(step, first_tile, count, elements_at<Element>(scratch),
                     shared_inputs(step).from_tile(first_tile));
  }

  // Multiplies what such a step has transformed.
  void multiply(const Step& step, const Panel& panel, int64_t first_tile, int64_t count,
                float* scratch) const {
    multiply_transformed(step, panel, first_tile, count, shared_inputs(step).from_tile(first_tile),
                         scratch, nullptr);
  }

 private:
  static TransformedTiles<Element> transformed(const Step& step, float* memory, int64_t tiles) {
    const int64_t floats = position_floats(floats_of<Element>(tiles * step.padded_channels));
    return {elements_at<Element>(memory), floats * kWordChannels<Element>, step.padded_channels};
  }

  TransformedTiles<Element> shared_inputs(const Step& step) const {
    return transformed(step, operands_.partials, step.pixel_count);
  }

  // The rows of the map that the tiles of the block behind this one, which probably comes next,
  // will read, where all channels lie side by side.
  Fetching next_tiles(const Step& step, int64_t first_tile, int64_t count) const {
    if (step.segment_count > 1 || first_tile + count > step.pixel_count) return {{}, 0};
    const Buffer& to = operands_.program.buffer(step.output_buffer);
    const BufferSegment& segment = *operands_.segments_of(step);
    const Buffer& from = operands_.program.buffer(segment.buffer);
    const WinogradTile first(first_tile, step.winograd_size, to.height, to.width);
    const WinogradTile last(first_tile + count - 1, step.winograd_size, to.height, to.width);
    const int64_t begin = first.image * from.height + first.y;
    const int64_t end = last.image * from.height + last.y + step.winograd_size + 1;
    const int64_t row = from.width * from.pitch;
    return {{operands_.input_of(segment) + begin * row, kLineBytes},
            (end - begin) * row * static_cast<int64_t>(sizeof(Element))};
  }

  // `zeros` is room for a pixel of padding.
  void transform_inputs(const Step& step, int64_t first_tile, int64_t count, Element* zeros,
                        const TransformedTiles<Element>& inputs) const {
    const Buffer& to = operands_.program.buffer(step.output_buffer);
    const int64_t extent = step.winograd_size + 2;
    const WinogradFunctions<Element>& functions =
        winograd_functions(operands_.table, step.winograd_size);
    std::memset(zeros, 0, step.padded_channels * sizeof(Element));
    const BufferSegment* segments = operands_.segments_of(step);
    for (int64_t i = 0; i < count; ++i) {
      const WinogradTile tile(first_tile + i, step.winograd_size, to.height, to.width);
      const int64_t left = tile.x - 1;
      const int64_t top = tile.y - 1;
      Element* output = inputs.data + i * inputs.tile;
      for (int64_t s = 0; s < step.segment_count; ++s) {
        const Buffer& from = operands_.program.buffer(segments[s].buffer);
        const Element* base = operands_.input_of(segments[s]);
        const TilePixels<const Element> pixels(extent, [&](int64_t y, int64_t x) {
          const bool valid =
              top + y >= 0 && top + y < from.height && left + x >= 0 && left + x < from.width;
          const int64_t row = (tile.image * from.height + top + y) * from.width + left;
          return valid ? base + (row + x) * from.pitch : zeros;
        });
        functions.input(pixels.data, segments[s].channels, output, inputs.position);
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
                            const TransformedTiles<Element>& inputs, float* products,
                            Fetching* next_block) const {
    for (int64_t position = 0; position < positions_of(step); ++position)
      multiply_position(step, panel, position, count, inputs,
                        products + position * product_position(panel, count), next_block);
    transform_products(step, panel, first_tile, count, products);
  }

  // Floats between a panel's products at neighbouring positions, [tile][NR] each.
  int64_t product_position(const Panel& panel, int64_t count) const {
    return position_floats(count * operands_.lanes_of(panel));
  }

  void multiply_position(const Step& step, const Panel& panel, int64_t position, int64_t count,
                         const TransformedTiles<Element>& transformed, float* products,
                         Fetching* next_block) const {
    const Element* inputs = transformed.data + position * transformed.position;
    const int64_t channels = step.padded_channels;
    const int64_t lanes = operands_.lanes_of(panel);
    const Element* weights = operands_.weights_of(panel) + position * channels * panel.pitch;
    ConvTile<Element> tile{};
    tile.run_count = 1;
    tile.weight_pitch = panel.pitch;
    tile.input_pixels = kIota;
    tile.initial = kNoBias;
    tile.initial_rows = kZeroRows;
    tile.output_rows = kIota;
    tile.output_pitch = lanes;
    tile.channels = lanes;
    const Tiles tiles = operands_.tiles_of(panel, count);
    // The next position's weights in as many parts as there are tiles, and the next tile's inputs.
    Fetching next{{weights + channels * panel.pitch, weight_part(panel, tiles.tiles)}};
    for (int64_t t = 0; t < tiles.tiles; ++t) {
      const Element* following =
          inputs + (t + 1 < tiles.tiles ? tiles.begin(t + 1) * channels : transformed.position);
      const int64_t words = channels / kWordChannels<Element>;
      const Fetch next_inputs =
          next_block != nullptr ? next_block->take(words) : Fetch{following, kLineBytes};
      const ChannelRun<Element> run{inputs + tiles.begin(t) * channels,
                                    weights,
                                    channels,
                                    channels,
                                    {next.take(words), next_inputs}};
      tile.runs = &run;
      tile.sums = products + tiles.begin(t) * lanes;
      operands_.table.conv_tile[panel.vectors][tiles.begin(t + 1) - tiles.begin(t)](tile);
    }
  }

  void transform_products(const Step& step, const Panel& panel, int64_t first_tile, int64_t count,
                          const float* products) const {
    const Buffer& to = operands_.program.buffer(step.output_buffer);
    const int64_t lanes = operands_.lanes_of(panel);
    const int64_t size = step.winograd_size;
    const WinogradFunctions<Element>& functions = winograd_functions(operands_.table, size);
    Element* const output = operands_.output_of(step) + panel.channel;
    for (int64_t i = 0; i < count; ++i) {
      const WinogradTile tile(first_tile + i, size, to.height, to.width);
      const TilePixels<Element> outputs(size, [&](int64_t row, int64_t column) {
        const bool exists = tile.y + row < to.height && tile.x + column < to.width;
        const int64_t pixel = (tile.image * to.height + tile.y + row) * to.width + tile.x + column;
        return exists ? output + pixel * to.pitch : nullptr;
      });
      functions.output(products + i * lanes, product_position(panel, count),
                       operands_.packed + panel.bias, panel.channels, step.activation,
                       outputs.data);
    }
  }

  const Operands<Element>& operands_;
};

}  // namespace threshnet_fast::cpu
