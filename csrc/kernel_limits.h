// What the kernels of several engines take. threshnet_fast/plan/limits.py and kernels/layout.py
// have the same numbers. Free of torch and of the standard library.
#pragma once

#include <cstdint>

namespace threshnet_fast {

// Channels of a group: segments begin with a whole one, and buffers are aligned to as many
// elements.
constexpr int64_t kGroupChannels = 16;

// The most pixels of a map on a GPU. Indices of pixels are 32-bit there, those behind the last
// pixel in the last tile too; offsets are 64-bit.
constexpr int64_t kMostPixels = (int64_t{1} << 31) - 1024;

// The most taps of a kernel on the CPU, of which masks have a bit each.
constexpr int64_t kMostTaps = 64;

// In one direction, the taps of a window that begins at pixel `first` which lie on a map of `size`
// pixels: from `begin` up to `end`, none where that is not more.
struct TapRange {
  int64_t begin, end;
};
inline TapRange valid_taps(int64_t first, int64_t size, int64_t kernel) {
  return {first < 0 ? -first : 0, size - first < kernel ? size - first : kernel};
}
// The same where neighbouring taps are `dilation` pixels apart.
inline TapRange valid_taps(int64_t first, int64_t size, int64_t kernel, int64_t dilation) {
  const int64_t behind = size > first ? (size - first + dilation - 1) / dilation : 0;
  return {first < 0 ? (dilation - 1 - first) / dilation : 0, behind < kernel ? behind : kernel};
}

// In one direction, the taps that can meet a pixel, from the first such tap to the last: of a
// padded 3x3 window on a map of one pixel that is one, not nine.
inline TapRange live_taps(int64_t size, int64_t out_size, int64_t kernel, int64_t stride,
                          int64_t padding) {
  TapRange live = {0, 0};
  for (int64_t tap = 0; tap < kernel; ++tap) {
    const int64_t output = padding > tap ? (padding - tap + stride - 1) / stride : 0;
    if (output >= out_size || output * stride - padding + tap >= size) continue;
    if (live.end == 0) live.begin = tap;
    live.end = tap + 1;
  }
  return live;
}

}  // namespace threshnet_fast
