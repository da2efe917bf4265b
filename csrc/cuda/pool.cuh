// Maximum and average over windows. A thread computes a vector of channels of one pixel.
#pragma once

#include <cmath>

#include "elementwise.cuh"

namespace threshnet_fast::cuda {

struct PoolParameters {
  Pool pool;
  ElementwiseGrid grid;
  bool aligned;      // whether the output's pixels are
  float reciprocal;  // of the pixels of a window
};

// The greater one, or NaN where either is: what PyTorch chooses, and fmaxf does not.
__device__ __forceinline__ float maximum(float a, float b) { return b > a || b != b ? b : a; }

// kKernel: height and width of the window, 0 for any.
template <typename T, bool kAverage, int kKernel>
__global__ void __launch_bounds__(kElementwiseThreads)
    pool_kernel(const __grid_constant__ PoolParameters p) {
  constexpr int kElements = Vector<T>::kElements;
  const Window& window = p.pool.window;
  const ElementwiseIndex index = elementwise_index(p.grid);
  if (!index.exists) return;
  const Position position = position_of(index.pixel, window.out_height, window.out_width);
  const int top = position.row * window.stride - window.padding;
  const int left = position.column * window.stride - window.padding;
  const int channel = index.vector * kElements;
  const int kernel_height = kKernel > 0 ? kKernel : window.kernel_height;
  const int kernel_width = kKernel > 0 ? kKernel : window.kernel_width;
  const T* image =
      static_cast<const T*>(p.pool.input.data) + channel +
      int64_t{position.image} * window.in_height * window.in_width * p.pool.input.pitch;

  float results[kElements];
#pragma unroll
  for (int element = 0; element < kElements; ++element)
    results[element] = kAverage ? 0.0f : -INFINITY;
#pragma unroll(kKernel > 0 ? kKernel : 1)
  for (int tap_row = 0; tap_row < kernel_height; ++tap_row) {
    // Instead of padding the nearest pixel of the map, which is in the window too: a maximum does
    // not change, and no load waits for a branch. Windows of averages have no padding.
    const int y = min(max(top + tap_row, 0), window.in_height - 1);
#pragma unroll(kKernel > 0 ? kKernel : 4)
    for (int tap_column = 0; tap_column < kernel_width; ++tap_column) {
      const int x = min(max(left + tap_column, 0), window.in_width - 1);
      const Vector<T> values =
          load_vector(image + int64_t{y * window.in_width + x} * p.pool.input.pitch);
#pragma unroll
      for (int element = 0; element < kElements; ++element) {
        const float value = to_float(values.elements[element]);
        results[element] = kAverage ? results[element] + value : maximum(results[element], value);
      }
    }
  }

  Vector<T> result;
#pragma unroll
  for (int element = 0; element < kElements; ++element)
    result.elements[element] =
        from_float<T>(kAverage ? results[element] * p.reciprocal : results[element]);
  T* output = static_cast<T*>(p.pool.output) + index.pixel * p.pool.output_pitch + channel;
  store_elements(output, result, p.pool.out_channels - channel, p.aligned);
}

}  // namespace threshnet_fast::cuda
