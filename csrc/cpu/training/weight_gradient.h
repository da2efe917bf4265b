// The gradient of a convolution's weight: products of a band's inputs and of its output's gradient,
// pixel by pixel or of Winograd's tiles. Free of torch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "backward_plan.h"
#include "cpu/fetch.h"
#include "cpu/tiles.h"
#include "cpu/ukernels/training.h"
#include "cpu/winograd.h"
#include "products.h"

namespace threshnet_fast::cpu {

class WeightGradient {
 public:
  WeightGradient(const BackwardPlan& plan, const TrainingTable& training)
      : plan_(plan), training_(training) {}

  // Adds the products of a band to a block of the weight's gradient.
  void add(const Band& band, const Patch& inputs, const Patch& gradient, const GradientBlock& block,
           float* tiles, float* sums, FetchList& ahead) const {
    if (plan_.bands.tile != 0) {
      Band part = band;
      for (part.first = band.first; part.first < band.last; part.first = part.last) {
        part.last = std::min(part.first + plan_.gradient_rows(), band.last);
        add_tiles(part, inputs, gradient, block, tiles, sums, ahead);
      }
      return;
    }
    const Window& window = band.window;
    const int64_t distance = band.by_position ? inputs.pitch : window.stride * inputs.pitch;
    std::vector<PixelRun> runs;
    for (int64_t tap = 0; tap < window.taps(); ++tap) {
      runs.clear();
      for_each_group(band, false, [&](const Group& group) {
        const int64_t y = group.row * window.stride - window.padding + tap / window.kernel_width;
        const int64_t x = group.column * window.stride - window.padding + tap % window.kernel_width;
        if (band.by_position && (y < 0 || y >= window.height || x < 0 || x >= window.width)) return;
        runs.push_back({inputs.at(y, x), gradient.at(group.row, group.column), group.count});
      });
      if (!runs.empty())
        add_products(runs, block.inputs, distance, gradient.pitch, block,
                     sums + tap * block.inputs * block.pitch, ahead);
    }
  }

  // How many tiles of a block of the weight's gradient there are.
  int64_t calls(const GradientBlock& block) const {
    const Tiling& tiling = plan_.table.tiling;
    return plan_.gradient_positions() * divide_up(block.inputs, tiling.tile_pixels[kPanelVectors]) *
           divide_up(block.pitch, kPanelVectors * tiling.lanes);
  }

 private:
  // Adds the products of pixels to the rows of `inputs` input channels of a block's gradient.
  void add_products(std::vector<PixelRun>& runs, int64_t inputs, int64_t distance,
                    int64_t gradient_pitch, const GradientBlock& block, float* rows,
                    FetchList& ahead) const {
    const int64_t lanes = plan_.table.tiling.lanes;
    const int64_t tiles = divide_up(inputs, plan_.table.tiling.tile_pixels[kPanelVectors]);
    const int64_t run_count = static_cast<int64_t>(runs.size());
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t first = part_begin(inputs, tiles, t);
      const int64_t count = part_begin(inputs, tiles, t + 1) - first;
      for (int64_t c = 0; c < block.pitch; c += kPanelVectors * lanes) {
        const int64_t vectors = std::min<int64_t>(kPanelVectors, (block.pitch - c) / lanes);
        training_.weight_gradient[vectors][count]({runs.data(), run_count, distance, gradient_pitch,
                                                   rows + first * block.pitch + c, block.pitch,
                                                   ahead.next()});
        shift(runs, 0, vectors * lanes);
      }
      shift(runs, count, -block.pitch);
    }
  }

  static void shift(std::vector<PixelRun>& runs, int64_t inputs, int64_t gradient) {
    for (PixelRun& run : runs) {
      run.input += inputs;
      run.gradient += gradient;
    }
  }

  // The same of Winograd's tiles, position by position.
  void add_tiles(const Band& band, const Patch& inputs, const Patch& gradient,
                 const GradientBlock& block, float* memory, float* sums, FetchList& ahead) const {
    const int64_t tiles = tiles_of(band, kGradientTile);
    const int64_t gradient_pitch = scratch_pitch(block.pitch);
    constexpr int64_t positions = winograd_positions(kGradientTile);
    float* const gradient_tiles = memory;
    float* const input_tiles = gradient_tiles + positions * tiles * gradient_pitch;
    for_each_tile(band, kGradientTile, [&](int64_t number, int64_t y, int64_t x) {
      const TilePixels<const float> pixels(kGradientTile, [&](int64_t row, int64_t column) {
        const bool inside = y + row < band.last && x + column < band.window.output_width();
        return inside ? gradient.at(y + row, x + column) : kZeros;
      });
      training_.winograd_gradient(pixels.data, block.pitch,
                                  gradient_tiles + number * gradient_pitch, tiles * gradient_pitch);
    });
    std::vector<PixelRun> runs(1);
    const int64_t chunks = divide_up(block.inputs, kTileChannels);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t first = part_begin(block.inputs, chunks, chunk);
      const int64_t channels = part_begin(block.inputs, chunks, chunk + 1) - first;
      const int64_t pitch = scratch_pitch(channels);
      for_each_tile(band, kGradientTile, [&](int64_t number, int64_t y, int64_t x) {
        const int64_t padding = band.window.padding;
        const auto pixels = tile_of(inputs, kGradientTile + 2, y - padding, x - padding, first);
        plan_.table.winograd_2x2.input(pixels.data, channels, input_tiles + number * pitch,
                                       tiles * pitch);
      });
      for (int64_t position = 0; position < positions; ++position) {
        runs[0] = {input_tiles + position * tiles * pitch,
                   gradient_tiles + position * tiles * gradient_pitch, tiles};
        add_products(runs, channels, pitch, gradient_pitch, block,
                     sums + (position * block.inputs + first) * block.pitch, ahead);
      }
    }
  }

  const BackwardPlan& plan_;
  const TrainingTable& training_;
};

}  // namespace threshnet_fast::cpu
