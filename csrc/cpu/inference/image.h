// The first convolution, which reads the network's input in whatever strides it has. Free of torch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/tiles.h"
#include "operands.h"
#include "program.h"

namespace threshnet_fast::cpu {

template <typename Element>
class ImageConvolution {
 public:
  explicit ImageConvolution(const Operands<Element>& operands) : operands_(operands) {}

  // Some rows of the output.
  void convolve(const Step& step, int64_t first_row, int64_t count, float* scratch) const {
    const Buffer& to = operands_.program.buffer(step.output_buffer);
    Run* const runs = reinterpret_cast<Run*>(scratch);
    Element* const image = elements_at<Element>(scratch + run_floats(step));
    const int64_t last_row = first_row + count;
    while (first_row < last_row) {
      // As many as belong to one image.
      const int64_t y = first_row % to.height;
      const int64_t rows = std::min(last_row - first_row, to.height - y);
      copy_image(step, first_row / to.height,
                 y * step.window.stride_height - step.window.padding_top, image_rows(step, rows),
                 image);
      for (int64_t p = 0; p < step.panel_count; ++p)
        convolve_rows(step, operands_.panels_of(step)[p], first_row, rows, image, runs);
      first_row += rows;
    }
  }

 private:
  using Run = ChannelRun<Element>;
  using Tile = ConvTile<Element>;

  // Some rows of one image of the network's input, from `top` on: [row][column][channel] with zeros
  // in the place of the padding.
  void copy_image(const Step& step, int64_t image, int64_t top, int64_t rows, Element* to) const {
    const ProgramHeader& header = operands_.program.header();
    const StridedInput& input = operands_.binding.input;
    const int64_t pitch = step.padded_channels;
    const int64_t row_elements =
        image_row_elements(step, operands_.program.buffer(step.output_buffer));
    const int64_t left = std::min(step.window.padding_left * pitch, row_elements);
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

  // One panel of some rows of the output; a row of the window is one run, but where it is dilated.
  void convolve_rows(const Step& step, const Panel& panel, int64_t first_row, int64_t rows,
                     const Element* image, Run* runs) const {
    const Buffer& to = operands_.program.buffer(step.output_buffer);
    const int64_t row_elements = image_row_elements(step, to);
    const PlanWindow& window = step.window;
    const int64_t columns = window.dilation_width == 1 ? 1 : window.kernel_width;
    const int64_t length = window.kernel_width / columns * step.padded_channels;
    const int64_t pitch = window.stride_width * step.padded_channels;
    const Tiles tiles = operands_.tiles_of(panel, to.width);
    Tile tile = operands_.output_tile(step, panel);
    tile.runs = runs;
    tile.run_count = window.kernel_height * columns;
    tile.input_pixels = kIota;
    int32_t outputs[kMaxTilePixels];
    tile.output_rows = outputs;
    for (int64_t y = 0; y < rows; ++y) {
      for (int64_t t = 0; t < tiles.tiles; ++t) {
        const int64_t x = tiles.begin(t);
        const int64_t pixels = tiles.begin(t + 1) - x;
        for (int64_t i = 0; i < tile.run_count; ++i) {
          const int64_t row = y * window.stride_height + i / columns * window.dilation_height;
          const int64_t column = i % columns * window.dilation_width * step.padded_channels;
          runs[i] = {image + row * row_elements + x * pitch + column,
                     operands_.weights_of(panel) + i * length * panel.pitch,
                     pitch,
                     length,
                     {}};
        }
        for (int64_t i = 0; i < pixels; ++i)
          outputs[i] = static_cast<int32_t>((first_row + y) * to.width + x + i);
        operands_.table.conv_tile[panel.vectors][pixels](tile);
      }
    }
  }

  const Operands<Element>& operands_;
};

}  // namespace threshnet_fast::cpu
