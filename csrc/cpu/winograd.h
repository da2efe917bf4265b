// What inference and training share of Winograd's convolutions. Free of torch.
#pragma once

#include <cstdint>

#include "cpu/tiles.h"
#include "cpu/ukernels/ukernels.h"

namespace threshnet_fast::cpu {

// Products of a tile of F(m x m, 3x3).
constexpr int64_t winograd_positions(int64_t size) { return (size + 2) * (size + 2); }

// Where a tile of `size` x `size` outputs lies in maps of so many rows and columns, one image after
// the other: its image and its first row and column.
struct WinogradTile {
  int64_t image, y, x;
  WinogradTile(int64_t index, int64_t size, int64_t height, int64_t width) {
    const int64_t rows = divide_up(height, size);
    const int64_t columns = divide_up(width, size);
    x = index % columns * size;
    y = index / columns % rows * size;
    image = index / columns / rows;
  }
};

// Tiles that are transformed, or their products: tile t's channels at a position begin at
// data[position * i + tile * t].
template <typename Element>
struct TransformedTiles {
  Element* data;
  int64_t position, tile;

  TransformedTiles from_tile(int64_t first) const { return {data + first * tile, position, tile}; }
};

template <typename Element>
const WinogradFunctions<Element>& winograd_functions(const UkernelTable<Element>& table,
                                                     int64_t size) {
  return size == 2 ? table.winograd_2x2 : table.winograd_4x4;
}

// The (m + 2) x (m + 2) pixels that a tile is made of, or the m x m of its outputs: at(y, x) is a
// pointer to the one in a row and column of the tile.
template <typename Element>
struct TilePixels {
  Element* data[kMaxWinogradPositions];

  template <typename At>
  TilePixels(int64_t extent, const At& at) {
    for (int64_t y = 0; y < extent; ++y) {
      for (int64_t x = 0; x < extent; ++x) data[extent * y + x] = at(y, x);
    }
  }
};

// Below, `Number` is double, or many floats.

// G g G^T of F(2x2, 3x3).
template <typename Number>
inline void winograd_kernel_2x2(const Number* kernel, Number* transformed) {
  Number half[4][3];
  for (int x = 0; x < 3; ++x) {
    half[0][x] = kernel[x];
    half[1][x] = (kernel[x] + kernel[3 + x] + kernel[6 + x]) * 0.5f;
    half[2][x] = (kernel[x] - kernel[3 + x] + kernel[6 + x]) * 0.5f;
    half[3][x] = kernel[6 + x];
  }
  for (int y = 0; y < 4; ++y) {
    transformed[4 * y] = half[y][0];
    transformed[4 * y + 1] = (half[y][0] + half[y][1] + half[y][2]) * 0.5f;
    transformed[4 * y + 2] = (half[y][0] - half[y][1] + half[y][2]) * 0.5f;
    transformed[4 * y + 3] = half[y][2];
  }
}

// G g G^T of F(4x4, 3x3), with factors in `Scalar`; see ukernels/templates.h for the points.
template <typename Scalar, typename Number>
inline void winograd_kernel_4x4(const Number* kernel, Number* transformed) {
  constexpr double a = 0.70710678118654752440, b = 1.41421356237309504880;
  constexpr Scalar rows[6][3] = {{1, 0, 0},
                                 {Scalar(-2.0 / 3), Scalar(-2.0 / 3 * a), Scalar(-1.0 / 3)},
                                 {Scalar(-2.0 / 3), Scalar(2.0 / 3 * a), Scalar(-1.0 / 3)},
                                 {Scalar(1.0 / 6), Scalar(1.0 / 6 * b), Scalar(1.0 / 3)},
                                 {Scalar(1.0 / 6), Scalar(-1.0 / 6 * b), Scalar(1.0 / 3)},
                                 {0, 0, 1}};
  Number half[6][3];
  for (int y = 0; y < 6; ++y) {
    for (int x = 0; x < 3; ++x)
      half[y][x] = rows[y][0] * kernel[x] + rows[y][1] * kernel[3 + x] + rows[y][2] * kernel[6 + x];
  }
  for (int y = 0; y < 6; ++y) {
    for (int x = 0; x < 6; ++x)
      transformed[6 * y + x] =
          rows[x][0] * half[y][0] + rows[x][1] * half[y][1] + rows[x][2] * half[y][2];
  }
}

// The transform of a kernel to as many weights as a tile of F(m x m, 3x3) has products.
template <typename Scalar, typename Number>
inline void winograd_kernel(int64_t size, const Number* kernel, Number* transformed) {
  if (size == 2) {
    winograd_kernel_2x2(kernel, transformed);
  } else {
    winograd_kernel_4x4<Scalar>(kernel, transformed);
  }
}

// The way back from F(2x2, 3x3): G^T u G of the gradient of what the above transforms to.
template <typename Number>
inline void winograd_kernel_gradient_2x2(const Number* transformed, Number* kernel) {
  Number half[3][4];
  for (int x = 0; x < 4; ++x) {
    half[0][x] = transformed[x] + (transformed[4 + x] + transformed[8 + x]) * 0.5f;
    half[1][x] = (transformed[4 + x] - transformed[8 + x]) * 0.5f;
    half[2][x] = (transformed[4 + x] + transformed[8 + x]) * 0.5f + transformed[12 + x];
  }
  for (int y = 0; y < 3; ++y) {
    kernel[3 * y] = half[y][0] + (half[y][1] + half[y][2]) * 0.5f;
    kernel[3 * y + 1] = (half[y][1] - half[y][2]) * 0.5f;
    kernel[3 * y + 2] = (half[y][1] + half[y][2]) * 0.5f + half[y][3];
  }
}

}  // namespace threshnet_fast::cpu
