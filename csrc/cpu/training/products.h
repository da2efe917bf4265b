// The products of a band's pixels, or of its tiles, with packed weights. Free of torch.
#pragma once

#include <cstdint>
#include <vector>

#include "bands.h"
#include "cpu/costs.h"
#include "cpu/fetch.h"
#include "cpu/tiles.h"
#include "cpu/winograd.h"
#include "packing.h"

namespace threshnet_fast::cpu {

// As long as the channels that are transformed at a time: those of a chunk, or of a small gradient.
constexpr float kZeros[kGradientFloats / (winograd_positions(2) * kTrainingWinogradChannels) + 64] =
    {};

// The pixels of a patch from row y and column x on; what lies beyond the patch is zero.
inline TilePixels<const float> tile_of(const Patch& patch, int64_t extent, int64_t y, int64_t x,
                                       int64_t channel) {
  return {extent, [&](int64_t row, int64_t column) {
            const bool inside = y + row < patch.last_row && x + column < patch.width + patch.ring;
            return inside ? patch.at(y + row, x + column) + channel : kZeros;
          }};
}

// Multiplies the patch of a band by packed weights: window by window, or tile by tile.
class Convolution {
 public:
  Convolution(const Panels& panels, const UkernelTable<float>& table, int64_t tile)
      : panels_(panels), table_(table), tile_(tile), bias_(panels.padded_outputs()) {
    const int64_t most =
        tile != 0
            ? kTileChannels
            : std::max<int64_t>(kPanelFloats / (panels.taps * kPanelVectors * panels.lanes), 16);
    chunks_ = divide_up(panels.inputs, most);
  }

  // Floats of the memory that a band of so many tiles needs for so many output channels.
  int64_t tile_floats(int64_t tiles, int64_t outputs) const {
    if (tile_ == 0) return 0;
    return round_up(winograd_positions(tile_) * tiles * (input_pitch() + scratch_pitch(outputs)),
                    16);
  }

  // Where the products of a band go: by place, [place][pitch], or where there is a map, there.
  // Chunks of input channels but the last add up by place.
  struct Result {
    float* places;
    int64_t pitch;
    float* map;
    int64_t map_pitch;
    float* tiles;  // memory for Winograd's tiles
    FetchList* ahead;
  };

  // The words of a tile of pixels, at least, and how many tiles of some panels there are.
  int64_t words() const { return panels_.inputs / chunks_; }
  int64_t tile_calls(const Band& band, int64_t panels) const {
    return chunks_ * panels * divide_up(band.pixels(), table_.tiling.tile_pixels[kPanelVectors]);
  }

  // The products of a patch with some panels; the result begins with the first panel's channels.
  void multiply(const Band& band, const Patch& patch, const float* packed, int64_t first_panel,
                int64_t last_panel, const Result& result) const {
    if (tile_ != 0) return multiply_tiles(band, patch, packed, first_panel, last_panel, result);
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
      for (int64_t panel = first_panel; panel < last_panel; ++panel) {
        const int64_t channel = panels_.first(panel) - panels_.first(first_panel);
        for_each_group(band, false, [&](const Group& group) {
          Result to = result;
          to.places += group.place * result.pitch + channel;
          if (to.map != nullptr) to.map += group.pixel * result.map_pitch + channel;
          multiply_group(band.window, patch, packed, panel, chunk, group, to);
        });
      }
    }
  }

 private:
  int64_t chunk_begin(int64_t chunk) const { return part_begin(panels_.inputs, chunks_, chunk); }
  int64_t input_pitch() const { return scratch_pitch(divide_up(panels_.inputs, chunks_)); }

  void multiply_tiles(const Band& band, const Patch& patch, const float* packed,
                      int64_t first_panel, int64_t last_panel, const Result& result) const {
    const int64_t tiles = tiles_of(band, tile_), positions = winograd_positions(tile_);
    const int64_t channels =
        std::min(panels_.first(last_panel), panels_.outputs) - panels_.first(first_panel);
    const int64_t pitch = scratch_pitch(round_up(channels, panels_.lanes));
    const TransformedTiles<float> inputs{result.tiles, tiles * input_pitch(), input_pitch()};
    const TransformedTiles<float> products{inputs.data + positions * inputs.position, tiles * pitch,
                                           pitch};
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
      const int64_t from = chunk_begin(chunk), count = chunk_begin(chunk + 1) - from;
      const int64_t padding = band.window.padding;
      for_each_tile(band, tile_, [&](int64_t number, int64_t y, int64_t x) {
        const auto pixels = tile_of(patch, tile_ + 2, y - padding, x - padding, from);
        winograd_functions(table_, tile_)
            .input(pixels.data, count, inputs.from_tile(number).data, inputs.position);
      });
      for (int64_t panel = first_panel; panel < last_panel; ++panel) {
        Result to = result;
        to.map = nullptr;
        to.pitch = pitch;
        for (int64_t position = 0; position < positions; ++position) {
          ChannelRun<float> run = {inputs.data + position * inputs.position,
                                   weights_of(packed, panel, position, from),
                                   input_pitch(),
                                   count,
                                   {}};
          to.places = products.data + position * products.position + panels_.first(panel) -
                      panels_.first(first_panel);
          multiply_pixels(&run, 1, panel, chunk, Group{0, 0, tiles, tiles, 0, 0, 1}, to);
        }
      }
    }
    for_each_tile(band, tile_, [&](int64_t number, int64_t y, int64_t x) {
      const int64_t width = band.window.output_width();
      const TilePixels<float> outputs(tile_, [&](int64_t row, int64_t column) -> float* {
        if (y + row >= band.last || x + column >= width) return nullptr;
        const int64_t place = (y + row - band.first) * width + x + column;
        return result.map != nullptr ? result.map + (band.first_pixel() + place) * result.map_pitch
                                     : result.places + place * result.pitch;
      });
      winograd_functions(table_, tile_)
          .output(products.from_tile(number).data, products.position, bias_.data(), channels,
                  kIdentity, outputs.data);
    });
  }

  // The weights of a panel for a tap or position, from an input channel on.
  const float* weights_of(const float* packed, int64_t panel, int64_t tap, int64_t channel) const {
    return packed + panels_.offset(panel) + (tap * panels_.inputs + channel) * panels_.pitch(panel);
  }

  void multiply_group(const Window& window, const Patch& patch, const float* packed, int64_t panel,
                      int64_t chunk, const Group& group, const Result& to) const {
    const int64_t first_channel = chunk_begin(chunk);
    const int64_t channels = chunk_begin(chunk + 1) - first_channel;
    const int64_t distance = patch.by_position ? patch.pitch : window.stride * patch.pitch;
    ChannelRun<float> runs[kMostTaps];
    ChannelRun<float>* end = runs;
    for (int64_t ky = 0; ky < window.kernel_height; ++ky) {
      for (int64_t kx = 0; kx < window.kernel_width; ++kx) {
        const int64_t y = group.row * window.stride - window.padding + ky;
        const int64_t x = group.column * window.stride - window.padding + kx;
        if (patch.by_position && (y < 0 || y >= patch.height || x < 0 || x >= patch.width))
          continue;
        const float* const weights =
            weights_of(packed, panel, ky * window.kernel_width + kx, first_channel);
        end = append_run({patch.at(y, x) + first_channel, weights, distance, channels, {}},
                         panels_.pitch(panel), runs, end);
      }
    }
    multiply_pixels(runs, end - runs, panel, chunk, group, to);
  }

  // Multiplies pixels at equal distances, the runs being the first one's.
  void multiply_pixels(ChannelRun<float>* runs, int64_t run_count, int64_t panel, int64_t chunk,
                       const Group& group, const Result& to) const {
    const int64_t pixels = group.count;
    const int64_t vectors = panels_.vectors(panel);
    const Tiles tiles(pixels, table_.tiling.tile_pixels[vectors]);
    for (int64_t t = 0; t < tiles.tiles; ++t) {
      const int64_t first = tiles.begin(t);
      const int64_t count = tiles.begin(t + 1) - first;
      ConvTile<float> tile;
      tile.runs = runs;
      tile.run_count = run_count;
      tile.weight_pitch = panels_.pitch(panel);
      tile.input_pixels = kIota;
      tile.output_rows = kIota;
      tile.activation = kIdentity;
      float* const places = to.places + first * to.pitch;
      int32_t rows[kMaxTilePixels];
      if (chunk + 1 == chunks_ && to.map != nullptr) {
        tile.sums = nullptr;
        tile.output = to.map + group.pixel_of(first) * to.map_pitch;
        tile.output_pitch = group.step * to.map_pitch;
        if (group.images < pixels) {
          for (int64_t i = 0; i < count; ++i)
            rows[i] = static_cast<int32_t>(group.pixel_of(first + i) - group.pixel_of(first));
          tile.output_rows = rows;
          tile.output_pitch = to.map_pitch;
        }
        tile.channels = panels_.channels(panel);
      } else {
        tile.sums = places;
        tile.output = nullptr;
        tile.output_pitch = to.pitch;
        tile.channels = panels_.pitch(panel);
      }
      tile.initial = chunk == 0 ? kNoBias : places;
      tile.initial_rows = kIota;
      tile.initial_pitch = chunk == 0 ? 0 : to.pitch;
      runs[0].fetches[0] = to.ahead->next();
      table_.conv_tile[vectors][count](tile);
      for (int64_t r = 0; r < run_count; ++r) runs[r].input += count * runs[r].pitch;
    }
  }

  Panels panels_;
  const UkernelTable<float>& table_;
  int64_t tile_;             // size of Winograd's tiles, or 0
  std::vector<float> bias_;  // zeros
  int64_t chunks_;
};

}  // namespace threshnet_fast::cpu
