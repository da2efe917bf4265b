// Convolutions that read their inputs in place, as runs of channels: chunk by chunk, and where taps
// are split between tasks, with sums that a step of its own adds up. Free of torch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/tiles.h"
#include "operands.h"
#include "program.h"

namespace threshnet_fast::cpu {

inline float activated(float value, Activation activation) {
  if (activation != kIdentity && value < 0.0f) return 0.0f;
  return activation == kRelu6 && value > 6.0f ? 6.0f : value;
}

template <typename Element>
class DirectConvolution {
 public:
  explicit DirectConvolution(const Operands<Element>& operands) : operands_(operands) {}

  // A panel of a block of pixels, or the part of its taps or channels that belongs to a split.
  void convolve(const Step& step, int64_t panel_index, bool first_panel, int64_t split,
                int64_t first_pixel, int64_t pixels, float* scratch) const {
    const Panel& panel = operands_.panels_of(step)[panel_index];
    const Tiles tiles = operands_.tiles_of(panel, pixels);
    const int64_t lanes = operands_.lanes_of(panel);
    const bool whole = step.split_count == 1;
    Run* const runs = reinterpret_cast<Run*>(scratch);
    float* const sums =
        whole ? scratch + run_floats(step) : operands_.partial_sums(step, split, panel_index);
    const int64_t first_chunk = step.chunk_count * split / step.split_count;
    const int64_t last_chunk = step.chunk_count * (split + 1) / step.split_count;
    const bool keeps_sums = !whole || step.chunk_count > 1;
    for (int64_t c = first_chunk; c < last_chunk; ++c) {
      for (int64_t t = 0; t < tiles.tiles; ++t) {
        TilePart part{};
        part.first_pixel = first_pixel + tiles.begin(t);
        part.pixels = tiles.begin(t + 1) - tiles.begin(t);
        part.chunk = operands_.chunks_of(step)[c];
        part.tile = t;
        part.tiles = tiles.tiles;
        part.starts = c == first_chunk;
        part.has_bias = split == 0;
        part.finishes = whole && c + 1 == last_chunk;
        part.fetches_inputs = first_panel && step.window.taps() == 1;
        part.runs = runs;
        part.sums = keeps_sums ? sums + tiles.begin(t) * lanes : sums;
        convolve_part(step, panel, part);
      }
    }
  }

  // Adds up the splits' sums of a group of panels.
  void reduce(const Step& step, int64_t group) const {
    const int32_t* output_pixels = operands_.output_pixels_of(step);
    const int64_t pitch = operands_.program.buffer(step.output_buffer).pitch;
    const int64_t last = std::min((group + 1) * step.group_panels, step.panel_count);
    for (int64_t p = group * step.group_panels; p < last; ++p) {
      const Panel& panel = operands_.panels_of(step)[p];
      const int64_t width = operands_.lanes_of(panel);
      for (int64_t i = 0; i < step.pixel_count; ++i) {
        Element* output = operands_.output_of(step) + output_pixels[i] * pitch + panel.channel;
        for (int64_t c = 0; c < panel.channels; ++c) {
          float sum = operands_.partial_sums(step, 0, p)[i * width + c];
          for (int64_t split = 1; split < step.split_count; ++split)
            sum += operands_.partial_sums(step, split, p)[i * width + c];
          output[c] = rounded<Element>(activated(sum, step.activation));
        }
      }
    }
  }

 private:
  using Run = ChannelRun<Element>;
  using Tile = ConvTile<Element>;

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

  // Appends the runs of one tap: the chunk's channels of the concatenation, shifted by the tap.
  Run* append_runs(const Step& step, const Panel& panel, int64_t tap, const Chunk& chunk,
                   const Run* first, Run* run) const {
    const BufferSegment* segments = operands_.segments_of(step);
    const Element* weights = operands_.weights_of(panel) + tap * step.padded_channels * panel.pitch;
    int64_t position = 0;
    for (int64_t s = 0; s < step.segment_count && position < chunk.last_channel; ++s) {
      const int64_t skipped = std::max<int64_t>(chunk.first_channel - position, 0);
      const int64_t channels =
          std::min(segments[s].channels, chunk.last_channel - position) - skipped;
      position += segments[s].channels;
      if (channels <= 0) continue;
      const Buffer& buffer = operands_.program.buffer(segments[s].buffer);
      const int64_t shift = tap_shift(step.window, tap, buffer.width);
      const Run next{operands_.input_of(segments[s]) + shift * buffer.pitch + skipped,
                     weights + (position - segments[s].channels + skipped) * panel.pitch,
                     buffer.pitch,
                     channels,
                     {}};
      run = append_run(next, panel.pitch, first, run);
    }
    return run;
  }

  void convolve_part(const Step& step, const Panel& panel, const TilePart& part) const {
    const int32_t* input_pixels = operands_.input_pixels_of(step) + part.first_pixel;
    const int32_t* output_pixels = operands_.output_pixels_of(step) + part.first_pixel;
    const uint64_t* pixel_taps = operands_.pixel_taps_of(step) + part.first_pixel;
    const ConvTileFunction<Element>* conv_tile = operands_.table.conv_tile[panel.vectors];
    const int64_t lanes = operands_.lanes_of(panel);
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
    Tile tile = operands_.output_tile(step, panel);
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

  const Operands<Element>& operands_;
};

}  // namespace threshnet_fast::cpu
