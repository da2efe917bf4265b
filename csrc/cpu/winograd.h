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
