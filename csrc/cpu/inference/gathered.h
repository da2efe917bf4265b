// Convolutions whose tasks gather the windows of their pixels first, to normalise them or because
// channels do not fill whole words. Free of torch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/fetch.h"
#include "cpu/tiles.h"
#include "operands.h"
#include "program.h"

namespace threshnet_fast::cpu {

template <typename Element>
class GatheredConvolution {
 public:
  explicit GatheredConvolution(const Operands<Element>& operands) : operands_(operands) {}

  // Writes each pixel's window as one row [tap][channel], after the prologue; taps that fall on
  // padding are zero, which is why the prologue cannot come later.
  void gather(const Step& step, int64_t first_pixel, int64_t pixels, Element* rows) const {
    const int64_t pitch = gathered_pitch(step);
    const BufferSegment* segments = operands_.segments_of(step);
    const int32_t* input_pixels = operands_.input_pixels_of(step) + first_pixel;
    const uint64_t* pixel_taps = operands_.pixel_taps_of(step) + first_pixel;
    const AffineFunction<Element> normalise = operands_.table.affine[step.prologue_activation];
    for (int64_t i = 0; i < pixels; ++i) {
      Element* row = rows + i * pitch;
      for (int64_t tap = 0; tap < step.window.taps(); ++tap) {
        Element* to = row + tap * step.padded_channels;
        if (!(pixel_taps[i] >> tap & 1)) {
          std::memset(to, 0, step.padded_channels * sizeof(Element));
          continue;
        }
        int64_t channel = 0;
        for (int64_t s = 0; s < step.segment_count; ++s) {
          const Buffer& buffer = operands_.program.buffer(segments[s].buffer);
          const int64_t shift = tap_shift(step.window, tap, buffer.width);
          const Element* from =
              operands_.input_of(segments[s]) + (input_pixels[i] + shift) * buffer.pitch;
          if (step.scale_index >= 0) {
            normalise(from, operands_.packed + step.scale + channel,
                      operands_.packed + step.shift + channel, segments[s].channels, to + channel);
          } else {
            std::memcpy(to + channel, from, segments[s].channels * sizeof(Element));
          }
          channel += segments[s].channels;
        }
        std::fill(to + channel, to + step.padded_channels, Element{});
      }
    }
  }

  // What the block of pixels behind this one, which probably comes next, will gather. Only pixels
  // that lie side by side, as those of a 1x1 convolution in a dense block do.
  Fetching next_block(const Step& step, int64_t first_pixel, int64_t pixels) const {
    const PlanWindow& window = step.window;
    if (window.taps() > 1 || window.stride_height > 1 || window.stride_width > 1 ||
        step.segment_count > 1 || first_pixel + pixels > step.pixel_count)
      return {{}, 0};
    const BufferSegment& segment = *operands_.segments_of(step);
    const Buffer& buffer = operands_.program.buffer(segment.buffer);
    if (buffer.offset == kNetworkInput) return {{}, 0};
    const int32_t first = operands_.input_pixels_of(step)[first_pixel];
    return {{operands_.input_of(segment) + first * buffer.pitch, kLineBytes},
            pixels * buffer.pitch * static_cast<int64_t>(sizeof(Element))};
  }

  // A panel of what was gathered; fetches the block behind it.
  void convolve(const Step& step, const Panel& panel, int64_t first_pixel, int64_t pixels,
                const Element* rows, Fetching& next) const {
    const int64_t pitch = gathered_pitch(step);
    const int64_t length = step.window.taps() * step.padded_channels;
    const int32_t* output_pixels = operands_.output_pixels_of(step) + first_pixel;
    ConvTile<Element> tile = operands_.output_tile(step, panel);
    const Tiles tiles = operands_.tiles_of(panel, pixels);
    Fetching weights{
        {operands_.weights_of(panel) + length * panel.pitch, weight_part(panel, tiles.tiles)}};
    for (int64_t t = 0; t < tiles.tiles; ++t) {
      const int64_t begin = tiles.begin(t);
      const int64_t words = length / kWordChannels<Element>;
      const Fetch next_weights = tiles.tiles > 1 ? weights.take(words) : Fetch{};
      const ChannelRun<Element> run{rows + begin * pitch,
                                    operands_.weights_of(panel),
                                    pitch,
                                    length,
                                    {next_weights, next.take(words)}};
      tile.runs = &run;
      tile.run_count = 1;
      tile.input_pixels = kIota;
      tile.output_rows = output_pixels + begin;
      operands_.table.conv_tile[panel.vectors][tiles.begin(t + 1) - begin](tile);
    }
  }

 private:
  const Operands<Element>& operands_;
};

}  // namespace threshnet_fast::cpu
