// What a convolution of training reads, several maps side by side, and how its panels are divided,
// forward and back. Free of torch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "bands.h"
#include "cpu/fetch.h"
#include "packing.h"
#include "steps.h"

namespace threshnet_fast::cpu {

// Calls body(segment, its first channel in the concatenation, from channel, to channel) for the
// segments that some channels of a concatenation lie in.
template <typename Segments, typename Body>
void for_each_segment(const Segments& segments, int64_t first, int64_t last, const Body& body) {
  int64_t start = 0;
  for (size_t i = 0; i < segments.size() && start < last; ++i) {
    const int64_t end = start + segments[i].channels;
    if (end > first) body(i, start, std::max(first, start), std::min(last, end));
    start = end;
  }
}

// Normalises channels [first, last) of the inputs into a patch.
inline void load_inputs(const TrainingTable& table, const std::vector<MapSegment>& inputs,
                        const Prologue& prologue, int64_t first, int64_t last, const Band& band,
                        const Patch& patch) {
  fill(patch, band, last - first, [&](int64_t pixel, int64_t step, int64_t count, float* to) {
    for_each_segment(inputs, first, last, [&](size_t i, int64_t start, int64_t from, int64_t end) {
      const MapSegment& input = inputs[i];
      table.normalize({input.data + pixel * input.pitch + from - start, step * input.pitch},
                      {prologue.scale + from, prologue.shift + from, prologue.activation}, count,
                      end - from, {to + from - first, patch.pitch});
    });
  });
}

// Adds what a band is going to read of channels [first, last) that the one before it has not.
inline void fetch_inputs(const std::vector<MapSegment>& inputs, int64_t first, int64_t last,
                         const Band& band, const Band& before, FetchList& ahead) {
  const int64_t pixel = std::max(band.first_input_pixel(), before.last_input_pixel());
  for_each_segment(inputs, first, last, [&](size_t i, int64_t start, int64_t from, int64_t end) {
    ahead.add(inputs[i].data + pixel * inputs[i].pitch + from - start, inputs[i].pitch, end - from,
              band.last_input_pixel() - pixel);
  });
}

inline int64_t channels_of(const std::vector<MapSegment>& segments) {
  int64_t channels = 0;
  for (const MapSegment& segment : segments) channels += segment.channels;
  return channels;
}

// How many groups the panels are divided into, so that all threads have work, and Winograd's
// products of one stay in L2.
inline int64_t panel_groups(const Bands& bands, const Panels& panels, int64_t threads) {
  constexpr int64_t kTogether = 4;
  const int64_t least = bands.tile != 0 ? divide_up(panels.count(), kTogether) : 1;
  return std::clamp<int64_t>(divide_up(3 * threads, bands.count), least, panels.count());
}

// Weights of an output channel for each input channel, as they are packed.
inline int64_t packed_taps(const Bands& bands) {
  return bands.tile != 0 ? winograd_positions(bands.tile) : bands.window.taps();
}

}  // namespace threshnet_fast::cpu
