// What inference and training share of Winograd's convolutions.
#pragma once

namespace threshnet_fast::cpu {

// G g G^T of F(2x2, 3x3), in float64.
inline void winograd_kernel_2x2(const float* kernel, float* transformed) {
  double half[4][3];
  for (int x = 0; x < 3; ++x) {
    const double top = kernel[x], middle = kernel[3 + x], bottom = kernel[6 + x];
    half[0][x] = top;
    half[1][x] = (top + middle + bottom) / 2;
    half[2][x] = (top - middle + bottom) / 2;
    half[3][x] = bottom;
  }
  for (int y = 0; y < 4; ++y) {
    const double left = half[y][0], middle = half[y][1], right = half[y][2];
    transformed[4 * y] = static_cast<float>(left);
    transformed[4 * y + 1] = static_cast<float>((left + middle + right) / 2);
    transformed[4 * y + 2] = static_cast<float>((left - middle + right) / 2);
    transformed[4 * y + 3] = static_cast<float>(right);
  }
}

// The way back: G^T u G of the gradient of what the above transforms to. May be in place.
inline void winograd_kernel_gradient_2x2(const float* transformed, float* kernel) {
  double half[3][4];
  for (int x = 0; x < 4; ++x) {
    const double top = transformed[x], sum = transformed[4 + x], difference = transformed[8 + x];
    half[0][x] = top + (sum + difference) / 2;
    half[1][x] = (sum - difference) / 2;
    half[2][x] = (sum + difference) / 2 + transformed[12 + x];
  }
  for (int y = 0; y < 3; ++y) {
    const double left = half[y][0], sum = half[y][1], difference = half[y][2];
    kernel[3 * y] = static_cast<float>(left + (sum + difference) / 2);
    kernel[3 * y + 1] = static_cast<float>((sum - difference) / 2);
    kernel[3 * y + 2] = static_cast<float>((sum + difference) / 2 + half[y][3]);
  }
}

}  // namespace threshnet_fast::cpu
