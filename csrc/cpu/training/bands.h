// How a convolution of training is divided: bands that a thread works on at a time, the groups of
// pixels and the tiles in them, and the patches of maps that they are made from. Free of torch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "cpu/costs.h"
#include "cpu/tiles.h"
#include "packing.h"
#include "steps.h"

namespace threshnet_fast::cpu {

// Maps of no more pixels than this are worked on image by image in step, position by position, so
// that taps on padding cost nothing and tiles are full.
constexpr int64_t kFewPixels = 64;
constexpr int64_t kManyImages = 8;

// Floats between pixels in scratch memory, not a multiple of a page's fraction that would put many
// of them into the same set of L1.
inline int64_t scratch_pitch(int64_t channels) {
  if (channels < 16) return channels;
  const int64_t pitch = round_up(channels, 16);
  return pitch % 64 == 0 ? pitch + 16 : pitch;
}

// The size of Winograd's tiles for a window, 0 where its taps take less time; `winograd` as in
// ConvolutionForward.
inline int64_t choose_tile(const Window& window, int64_t inputs, int64_t outputs,
                           int64_t winograd) {
  if (winograd == 0 || window.kernel_height != 3 || window.kernel_width != 3 ||
      window.stride != 1 || window.padding != 1 ||
      window.input_pixels() < kTrainingWinogradPixels ||
      std::min(inputs, outputs) < kTrainingWinogradChannels)
    return 0;
  if (winograd > 0) return winograd;
  const int64_t tiles = divide_up(window.output_height(), 4) * divide_up(window.output_width(), 4);
  return tiles >= band_tiles(4) ? 4 : 2;
}

// How many images or rows a thread works on at a time.
struct Bands {
  Window window;
  bool by_position;  // a band is some images, otherwise some rows of one
  int64_t tile;      // size of Winograd's tiles, or 0
  int64_t count;

  // The floats are those of a pixel of the input and of the output, and where there are tiles, of
  // the patches that they are taken from.
  Bands(const Window& original, int64_t input_floats, int64_t output_floats, int64_t patch_floats,
        int64_t threads, int64_t tile_pixels, int64_t tile)
      : window(original), tile(tile) {
    const bool pointwise = original.taps() == 1 && original.stride == 1 && original.padding == 0;
    if (pointwise) {
      window.batch *= original.input_pixels();
      window.height = window.width = 1;
    }
    by_position = pointwise || (window.input_pixels() <= kFewPixels && window.batch >= kManyImages);
    if (by_position) {
      const int64_t floats =
          window.input_pixels() * input_floats + window.output_pixels() * output_floats;
      int64_t images = std::max<int64_t>(kBandFloats / floats, 1);
      images = std::max(images / tile_pixels * tile_pixels, tile_pixels);
      count = std::max(divide_up(window.batch, images),
                       std::min(divide_up(window.batch, tile_pixels), 2 * threads));
      return;
    }
    const int64_t row =
        window.width * (window.stride * input_floats) + window.output_width() * output_floats;
    int64_t rows = std::clamp<int64_t>(kBandFloats / row, 1, window.output_height());
    if (tile != 0) {
      const int64_t columns = divide_up(window.output_width(), tile);
      rows = std::max<int64_t>(band_tiles(tile) / columns, 1) * tile;
      const int64_t most = std::max(kPatchFloats / (window.width * patch_floats), tile);
      rows = std::min(rows, most / tile * tile);
    }
    const int64_t parts = divide_up(window.output_height(), rows);
    count = window.batch * parts;
  }

  // Whether a band reads enough for its products that they should not wait for the memory; those of
  // tiles are read from a cache that has no room for more.
  bool fetches_ahead() const { return tile == 0; }
  int64_t parts() const { return count / window.batch; }
  int64_t row_step() const { return std::max<int64_t>(tile, 1); }
  int64_t most_rows() const {
    return divide_up(divide_up(window.output_height(), row_step()), parts()) * row_step();
  }
  int64_t most_tiles() const {
    return tile == 0 ? 0 : most_rows() / tile * divide_up(window.output_width(), tile);
  }
};

// One band: images [first, last), or output rows [first, last) of an image.
struct Band {
  Window window;
  bool by_position;
  int64_t image, first, last;

  Band(const Bands& bands, int64_t index)
      : window(bands.window), by_position(bands.by_position), image(0) {
    if (by_position) {
      first = part_begin(window.batch, bands.count, index);
      last = part_begin(window.batch, bands.count, index + 1);
      return;
    }
    const int64_t parts = bands.parts();
    image = index / parts;
    const int64_t step = bands.row_step();
    const int64_t steps = divide_up(window.output_height(), step);
    first = part_begin(steps, parts, index % parts) * step;
    last = std::min(part_begin(steps, parts, index % parts + 1) * step, window.output_height());
  }

  int64_t images() const { return last - first; }
  // The pixels of the input that it is made from, which follow each other.
  int64_t first_input_pixel() const {
    if (by_position) return first * window.input_pixels();
    const int64_t row = std::max<int64_t>(first * window.stride - window.padding, 0);
    return (image * window.height + row) * window.width;
  }
  int64_t last_input_pixel() const {
    if (by_position) return last * window.input_pixels();
    const int64_t row = (last - 1) * window.stride - window.padding + window.kernel_height;
    return (image * window.height + std::min(row, window.height)) * window.width;
  }
  // A band is made of pixels that follow each other, in the output as in an input of its size.
  int64_t first_pixel() const {
    return by_position ? first * window.output_pixels()
                       : (image * window.output_height() + first) * window.output_width();
  }
  int64_t pixels() const {
    return by_position ? images() * window.output_pixels() : (last - first) * window.output_width();
  }
};

// A group: output pixels of a band whose windows have the same taps, a row of them or neighbouring
// positions of all images, image after image.
struct Group {
  int64_t row, column;  // of the output, of its first pixel
  int64_t count;        // of pixels
  int64_t images;       // of a position; as many as pixels in a row
  int64_t place;        // of its first pixel among those of the band
  int64_t pixel, step;  // its first pixel among those of the whole map, and from one to the next

  // Where the i-th pixel is in the map, counted from the first.
  int64_t pixel_of(int64_t i) const { return i / images + i % images * step; }
};

// Calls body(group) for the output of a band, or for its input where that is as large; groups are
// as large as can be, or of pixels at equal distances in the map.
template <typename Body>
void for_each_group(const Band& band, bool equal_distances, const Body& body) {
  const Window& window = band.window;
  const int64_t height = window.output_height(), width = window.output_width();
  if (!band.by_position) {
    for (int64_t y = band.first; y < band.last; ++y) {
      body(Group{y, 0, width, width, (y - band.first) * width, (band.image * height + y) * width,
                 1});
    }
    return;
  }
  const int64_t images = band.images();
  const auto taps_of = [&](int64_t x) {
    const TapRange taps =
        valid_taps(x * window.stride - window.padding, window.width, window.kernel_width);
    return std::pair(taps.begin, taps.end);
  };
  for (int64_t y = 0; y < height; ++y) {
    int64_t end;
    for (int64_t x = 0; x < width; x = end) {
      end = x + 1;
      while (!equal_distances && window.stride == 1 && end < width && taps_of(end) == taps_of(x))
        ++end;
      const int64_t position = y * width + x;
      body(Group{y, x, (end - x) * images, images, position * images,
                 band.first * height * width + position, height * width});
    }
  }
}

// A part of a map in scratch memory: all positions of some images, or rows of one image with a ring
// of zeros.
struct Patch {
  bool by_position;
  int64_t images;
  int64_t height, width;  // of the map
  int64_t first_row, last_row, ring;
  int64_t pitch;
  float* data;

  int64_t row_floats() const { return (width + 2 * ring) * pitch; }
  float* at(int64_t y, int64_t x) const {
    if (by_position) return data + (y * width + x) * images * pitch;
    return data + (y - first_row) * row_floats() + (x + ring) * pitch;
  }
};

// The part of an input that a band's windows lie on.
inline Patch input_patch(const Band& band, int64_t channels, float* data) {
  const Window& window = band.window;
  const int64_t first_row = band.first * window.stride - window.padding;
  const int64_t last_row = (band.last - 1) * window.stride - window.padding + window.kernel_height;
  return {band.by_position, band.images(),  window.height,           window.width, first_row,
          last_row,         window.padding, scratch_pitch(channels), data};
}

inline int64_t patch_floats(const Bands& bands, int64_t channels) {
  const Window& window = bands.window;
  if (bands.by_position)
    return divide_up(window.batch, bands.count) * window.input_pixels() * scratch_pitch(channels);
  const int64_t rows = (bands.most_rows() - 1) * window.stride + window.kernel_height;
  return rows * (window.width + 2 * window.padding) * scratch_pitch(channels);
}

inline int64_t most_pixels(const Bands& bands) {
  const Window& window = bands.window;
  return bands.by_position ? divide_up(window.batch, bands.count) * window.output_pixels()
                           : bands.most_rows() * window.output_width();
}

// Calls load(first pixel of the map, distance in pixels, count, where to) for the pixels of a patch
// that lie on the map, and writes zeros around it.
template <typename Load>
void fill(const Patch& patch, const Band& band, int64_t channels, const Load& load) {
  const int64_t pixels = patch.height * patch.width;
  if (patch.by_position) {
    for (int64_t position = 0; position < pixels; ++position)
      load(band.first * pixels + position, pixels, patch.images,
           patch.data + position * patch.images * patch.pitch);
    return;
  }
  for (int64_t y = patch.first_row; y < patch.last_row; ++y) {
    float* const row = patch.at(y, -patch.ring);
    if (y < 0 || y >= patch.height) {
      std::memset(row, 0, patch.row_floats() * sizeof(float));
      continue;
    }
    for (int64_t x = 0; x < patch.ring; ++x) {
      std::memset(row + x * patch.pitch, 0, channels * sizeof(float));
      std::memset(row + (patch.ring + patch.width + x) * patch.pitch, 0, channels * sizeof(float));
    }
    load((band.image * patch.height + y) * patch.width, 1, patch.width, patch.at(y, 0));
  }
}

// Calls body(number, first row, first column) for the tiles of a band.
template <typename Body>
void for_each_tile(const Band& band, int64_t tile, const Body& body) {
  int64_t number = 0;
  for (int64_t y = band.first; y < band.last; y += tile) {
    for (int64_t x = 0; x < band.window.output_width(); x += tile) body(number++, y, x);
  }
}

inline int64_t tiles_of(const Band& band, int64_t tile) {
  return divide_up(band.last - band.first, tile) * divide_up(band.window.output_width(), tile);
}

}  // namespace threshnet_fast::cpu
