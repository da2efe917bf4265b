// How pixels are divided into the tiles of a micro-kernel and taps into its runs. Free of torch.
#pragma once

#include <cstdint>

#include "cpu/ukernels/ukernels.h"

namespace threshnet_fast::cpu {

constexpr int64_t kLineBytes = 64;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// Splits [0, count) into as many parts as asked for, as equal as possible.
inline int64_t part_begin(int64_t count, int64_t parts, int64_t part) {
  return count * part / parts;
}

// Splits [0, count) into the fewest tiles of at most `most` pixels, as equal as possible.
struct Tiles {
  int64_t count, tiles;
  Tiles(int64_t count, int64_t most) : count(count), tiles(divide_up(count, most)) {}
  int64_t begin(int64_t tile) const { return part_begin(count, tiles, tile); }
};

// Of a micro-kernel's tile: pixels in their order, all the same row, and sums that start from
// nothing.
inline constexpr int32_t kIota[kMaxTilePixels] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13};
inline constexpr int32_t kZeroRows[kMaxTilePixels] = {};
inline constexpr float kNoBias[kMaxTileVectors * 16] = {};

// Appends a run to those from `first` on, of which `end` is behind the last; returns the new end. A
// run that goes on where the one before it ends, in memory and in the weights, joins it: where
// pixels lie side by side, neighbouring taps do so.
template <typename Element>
inline ChannelRun<Element>* append_run(const ChannelRun<Element>& next, int64_t weight_pitch,
                                       const ChannelRun<Element>* first, ChannelRun<Element>* end) {
  if (end > first) {
    ChannelRun<Element>& last = end[-1];
    if (next.input == last.input + last.channels && next.pitch == last.pitch &&
        next.weights == last.weights + last.channels * weight_pitch) {
      last.channels += next.channels;
      return end;
    }
  }
  *end = next;
  return end + 1;
}

}  // namespace threshnet_fast::cpu
