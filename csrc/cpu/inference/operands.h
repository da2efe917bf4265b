// What the steps of a program read and write, for the duration of one run. Free of torch.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/fetch.h"
#include "cpu/tiles.h"
#include "cpu/ukernels/kinds.h"
#include "program.h"

namespace threshnet_fast::cpu {

template <typename Element>
Element* elements_at(float* memory) {
  return reinterpret_cast<Element*>(memory);
}
template <typename Element>
const Element* elements_at(const float* memory) {
  return reinterpret_cast<const Element*>(memory);
}

// The part of [0, count) that a block of a step works on.
struct BlockRange {
  int64_t first, last;
  BlockRange(int64_t count, int64_t block, int64_t blocks)
      : first(part_begin(count, blocks, block)), last(part_begin(count, blocks, block + 1)) {}
  int64_t count() const { return last - first; }
};

template <typename Element>
struct Operands {
  using Tile = ConvTile<Element>;

  const Program& program;
  const UkernelTable<Element>& table;
  const float* packed;
  Element* arena;
  float* partials;
  const Binding& binding;

  Operands(const Program& program, const float* packed, float* workspace, const Binding& binding)
      : program(program),
        table(ukernel_table<Element>(program.header().isa)),
        packed(packed),
        arena(elements_at<Element>(workspace)),
        partials(workspace + program.header().arena_floats),
        binding(binding) {}

  const Element* input_of(const BufferSegment& segment) const {
    const Buffer& buffer = program.buffer(segment.buffer);
    return map_of(buffer) + segment.channel;
  }

  Element* output_of(const Step& step) const {
    const Buffer& buffer = program.buffer(step.output_buffer);
    Element* const base =
        buffer.offset == kNetworkOutput ? static_cast<Element*>(binding.output) : map_of(buffer);
    return base + step.output_channel;
  }

  // A map of the arena or of the caller's.
  Element* map_of(const Buffer& buffer) const {
    return buffer.offset >= 0
               ? arena + buffer.offset
               : static_cast<Element*>(binding.externals[kFirstExternal - buffer.offset]);
  }

  const BufferSegment* segments_of(const Step& step) const {
    return program.at<BufferSegment>(step.segments);
  }
  const Panel* panels_of(const Step& step) const { return program.at<Panel>(step.panels); }
  const Chunk* chunks_of(const Step& step) const { return program.at<Chunk>(step.chunks); }
  const int32_t* input_pixels_of(const Step& step) const {
    return program.at<int32_t>(step.input_pixels);
  }
  const int32_t* output_pixels_of(const Step& step) const {
    return program.at<int32_t>(step.output_pixels);
  }
  const uint64_t* pixel_taps_of(const Step& step) const {
    return program.at<uint64_t>(step.pixel_taps);
  }

  const Element* weights_of(const Panel& panel) const {
    return elements_at<Element>(packed + panel.weights);
  }

  // The outputs of a panel, from its bias on.
  Tile output_tile(const Step& step, const Panel& panel) const {
    Tile tile{};
    tile.initial = packed + panel.bias;
    tile.weight_pitch = panel.pitch;
    tile.initial_rows = kZeroRows;
    tile.output = output_of(step) + panel.channel;
    tile.output_pitch = program.buffer(step.output_buffer).pitch;
    tile.channels = panel.channels;
    tile.activation = step.activation;
    return tile;
  }

  // Where a part of a convolution with split taps leaves its sums: [pixel][NR].
  float* partial_sums(const Step& step, int64_t split, int64_t panel) const {
    return partials + (split * step.panel_count + panel) * step.pixel_count * kMaxTileVectors *
                          table.tiling.lanes;
  }

  // Output channels that a panel's tiles compute.
  int64_t lanes_of(const Panel& panel) const { return panel.vectors * table.tiling.lanes; }
  // A block's pixels in tiles for a panel.
  Tiles tiles_of(const Panel& panel, int64_t pixels) const {
    return Tiles(pixels, table.tiling.tile_pixels[panel.vectors]);
  }
};

// Bytes of every word's weights that each of some tiles fetches.
inline int64_t weight_part(const Panel& panel, int64_t tiles) {
  return divide_up(panel.pitch * static_cast<int64_t>(sizeof(float)), tiles);
}

}  // namespace threshnet_fast::cpu
