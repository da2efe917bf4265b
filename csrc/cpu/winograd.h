// What inference and training share of Winograd's convolutions. `Number` is double, or many floats.
#pragma once

namespace threshnet_fast::cpu {

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

// The way back: G^T u G of the gradient of what the above transforms to.
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
