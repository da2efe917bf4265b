// How the way back of a convolution is divided between threads and in memory. Free of torch.
#pragma once

#include <algorithm>
#include <cstdint>

#include "concatenation.h"
#include "cpu/ukernels/ukernels.h"
#include "products.h"
#include "steps.h"

namespace threshnet_fast::cpu {

// The convolution that leads back from the output's gradient to the input's.
inline Window backward_window(const Window& window) {
  return {window.batch,
          window.output_height(),
          window.output_width(),
          window.kernel_height,
          window.kernel_width,
          1,
          window.kernel_height - 1 - window.padding};
}

// Small weight gradients are added up for a part of the pixels at a time, in the same pass that
// calculates the input's gradient; large ones for some channels at a time, over all pixels.
struct BackwardPlan {
  const UkernelTable<float>& table;
  int64_t input_channels, output_channels;
  bool wants_inputs, wants_weight;
  int64_t gradient_pitch;  // floats between pixels of the output's gradient
  Bands bands;
  Panels panels;  // of the way back: from output channels to input channels
  Convolution convolution;
  bool together;
  int64_t splits, groups;
  int64_t input_blocks, output_blocks;
  int64_t result_pitch;
  Bands block_bands;
  int64_t input_patch, output_patch, scratch;

  BackwardPlan(const ConvolutionBackward& step, const Workers& workers)
      : table(ukernel_table<float>(workers.isa)),
        input_channels(channels_of(step.inputs)),
        output_channels(step.output_channels),
        wants_inputs(!step.input_gradients.empty()),
        wants_weight(step.weight_gradient != nullptr),
        gradient_pitch(scratch_pitch(padded(output_channels))),
        bands(bands_of(step, workers, scratch_pitch(input_channels))),
        panels{output_channels, input_channels, packed_taps(bands), table.tiling.lanes},
        convolution(panels, table, bands.tile),
        result_pitch(scratch_pitch(panels.padded_outputs())),
        block_bands(bands) {
    together = block_floats(input_channels, output_channels) <= kGradientFloats;
    // Each on its own, they need either the gradient's patches or these and some of the inputs'.
    if (!together) bands = bands_of(step, workers, 0);
    splits = std::min(bands.count, 2 * workers.threads);
    groups = together ? 1 : panel_groups(bands, panels, workers.threads);
    output_blocks = bands.tile != 0 && !together ? divide_up(output_channels, kBlockOutputs) : 1;
    const int64_t tile = table.tiling.tile_pixels[kPanelVectors];
    const int64_t row = block_floats(1, block_outputs());
    const int64_t most = std::max(kGradientFloats / row / tile * tile, tile);
    input_blocks = std::min(
        std::max(divide_up(input_channels, most), divide_up(2 * workers.threads, output_blocks)),
        divide_up(input_channels, tile));
    if (!together) block_bands = bands_of(step, workers, scratch_pitch(block_inputs()));
    const int64_t inputs = together ? input_channels : block_inputs();
    input_patch = patch_floats(block_bands, inputs);
    output_patch = std::max(most_pixels(block_bands), most_pixels(bands)) * gradient_pitch;
    if (wants_inputs) {
      Bands back = bands;
      back.window = backward_window(bands.window);
      output_patch = std::max(output_patch, patch_floats(back, gradient_pitch));
    }
    input_patch = round_up(input_patch, 16);
    output_patch = round_up(output_patch, 16);
    // A part of the weight's gradient and a band of the input's are never there at once.
    const int64_t outputs = divide_up(panels.count(), groups) * panels.first(1);
    const int64_t band = round_up(most_pixels(bands) * result_pitch, 16) +
                         convolution.tile_floats(bands.most_tiles(), outputs);
    const int64_t block = (together ? 0 : round_up(block_floats(inputs, block_outputs()), 16)) +
                          weight_tile_floats(inputs);
    scratch = input_patch + output_patch + std::max(band, block);
  }

  // Of a weight's gradient: sums for each pair of channels, as it is added up.
  int64_t gradient_positions() const {
    return bands.tile != 0 ? winograd_positions(kGradientTile) : bands.window.taps();
  }
  // Rows of a band whose tiles are there at once, for the weight's gradient.
  int64_t gradient_rows() const {
    const int64_t columns = divide_up(bands.window.output_width(), kGradientTile);
    return std::max<int64_t>(band_tiles(kGradientTile) / columns, 1) * kGradientTile;
  }
  int64_t most_gradient_tiles() const {
    return gradient_rows() / kGradientTile * divide_up(bands.window.output_width(), kGradientTile);
  }
  int64_t padded(int64_t outputs) const { return round_up(outputs, table.tiling.lanes); }
  int64_t block_floats(int64_t inputs, int64_t outputs) const {
    return gradient_positions() * inputs * padded(outputs);
  }
  int64_t block_inputs() const { return divide_up(input_channels, input_blocks); }
  int64_t block_outputs() const {
    return std::min(padded(divide_up(output_channels, output_blocks)), padded(output_channels));
  }
  GradientBlock whole() const {
    return {0, input_channels, 0, output_channels, padded(output_channels)};
  }
  GradientBlock block(int64_t index) const {
    const int64_t input = index / output_blocks;
    const int64_t first = part_begin(input_channels, input_blocks, input);
    const int64_t first_output = index % output_blocks * block_outputs();
    const int64_t outputs = std::min(block_outputs(), output_channels - first_output);
    return {first, part_begin(input_channels, input_blocks, input + 1) - first, first_output,
            outputs, padded(outputs)};
  }
  int64_t weight_tile_floats(int64_t inputs) const {
    if (bands.tile == 0) return 0;
    const int64_t pitches =
        scratch_pitch(std::min(inputs, kTileChannels)) + scratch_pitch(block_outputs());
    return round_up(winograd_positions(kGradientTile) * most_gradient_tiles() * pitches, 16);
  }

  int64_t packed_floats() const { return wants_inputs ? panels.floats() : 0; }
  // Of the weight's gradient, one for each split.
  int64_t split_floats() const {
    return round_up(block_floats(input_channels, output_channels), 16);
  }
  int64_t partial_floats() const { return together && wants_weight ? splits * split_floats() : 0; }
  // How many tasks add to sums of their own.
  int64_t sum_count() const { return together ? splits : bands.count; }
  int64_t sum_floats() const {
    return wants_inputs ? round_up(sum_count() * 2 * input_channels, 16) : 0;
  }

 private:
  static constexpr int64_t kBlockOutputs = 128;

  // `input_floats` are those of a pixel of the normalised inputs, where there are any.
  Bands bands_of(const ConvolutionBackward& step, const Workers& workers,
                 int64_t input_floats) const {
    return Bands(step.window, input_floats + (wants_inputs ? input_channels : 0), gradient_pitch,
                 input_floats + gradient_pitch, workers.threads,
                 table.tiling.tile_pixels[kPanelVectors],
                 choose_tile(step.window, input_channels, output_channels, step.winograd));
  }
};

}  // namespace threshnet_fast::cpu
