// A network's first convolution: few input channels in any strides, so no tensor cores. A thread
// computes eight output channels of one pixel; each element that it reads of the input is then
// worth eight products, and a warp's threads that share a pixel read it at once.
#pragma once

#include "elementwise.cuh"

namespace threshnet_fast::cuda {

constexpr int kStemColumns = 8;
// Blocks that a multiprocessor can hold at least of the kernel for any window. Unsaid (0), the
// compiler spills some registers of this one to make room for more.
constexpr int kAnyStemBlocks = 8;

struct StemParameters {
  StemConvolution convolution;
  ElementwiseGrid grid;
  bool aligned;  // whether the output's pixels are
};

// sums += value * weight[0 .. kStemColumns).
template <typename T>
__device__ __forceinline__ void add_products(float (&sums)[kStemColumns], float value,
                                             const T* weight) {
  constexpr int kElements = Vector<T>::kElements;
#pragma unroll
  for (int first = 0; first < kStemColumns; first += kElements) {
    const Vector<T> factors = load_vector(weight + first);
#pragma unroll
    for (int element = 0; element < kElements; ++element)
      sums[first + element] =
          fmaf(value, to_float(factors.elements[element]), sums[first + element]);
  }
}

// kKernel: height and width of the window, kChannels: of the input; both 0 for any.
template <typename T, int kKernel, int kChannels>
__global__ void __launch_bounds__(kElementwiseThreads, kKernel > 0 ? 0 : kAnyStemBlocks)
    stem_convolution_kernel(const __grid_constant__ StemParameters p) {
  const StemConvolution& convolution = p.convolution;
  const Window& window = convolution.window;
  const ElementwiseIndex index = elementwise_index(p.grid);
  if (!index.exists) return;
  const Position position = position_of(index.pixel, window.out_height, window.out_width);
  const int top = position.row * window.stride - window.padding;
  const int left = position.column * window.stride - window.padding;
  const int first_column = index.vector * kStemColumns;
  const T* image =
      static_cast<const T*>(convolution.input) + position.image * convolution.batch_stride;
  const T* weight = static_cast<const T*>(convolution.weight) + first_column;

  float sums[kStemColumns] = {};
  if constexpr (kKernel > 0) {
    // All at once: their latencies overlap.
    float values[kKernel][kKernel][kChannels];
#pragma unroll
    for (int tap_row = 0; tap_row < kKernel; ++tap_row) {
      const int y = top + tap_row;
#pragma unroll
      for (int tap_column = 0; tap_column < kKernel; ++tap_column) {
        const int x = left + tap_column;
        const bool inside = y >= 0 && y < window.in_height && x >= 0 && x < window.in_width;
        const T* element = image + y * convolution.height_stride + x * convolution.width_stride;
#pragma unroll
        for (int channel = 0; channel < kChannels; ++channel)
          values[tap_row][tap_column][channel] =
              inside ? to_float(__ldg(element + channel * convolution.channel_stride)) : 0.0f;
      }
    }
#pragma unroll
    for (int tap_row = 0; tap_row < kKernel; ++tap_row)
#pragma unroll
      for (int tap_column = 0; tap_column < kKernel; ++tap_column)
#pragma unroll
        for (int channel = 0; channel < kChannels; ++channel) {
          add_products(sums, values[tap_row][tap_column][channel], weight);
          weight += convolution.weight_columns;
        }
  } else {
    for (int tap_row = 0; tap_row < window.kernel_height; ++tap_row) {
      const int y = top + tap_row;
      if (y < 0 || y >= window.in_height) continue;
      for (int tap_column = 0; tap_column < window.kernel_width; ++tap_column) {
        const int x = left + tap_column;
        if (x < 0 || x >= window.in_width) continue;
        const T* element = image + y * convolution.height_stride + x * convolution.width_stride;
        const T* factors = weight + int64_t{tap_row * window.kernel_width + tap_column} *
                                        convolution.in_channels * convolution.weight_columns;
#pragma unroll 4
        for (int channel = 0; channel < convolution.in_channels; ++channel) {
          add_products(sums, to_float(__ldg(element)), factors);
          element += convolution.channel_stride;
          factors += convolution.weight_columns;
        }
      }
    }
  }

  constexpr int kElements = Vector<T>::kElements;
  T* output = static_cast<T*>(convolution.output) + index.pixel * convolution.output_pitch;
#pragma unroll
  for (int first = 0; first < kStemColumns; first += kElements) {
    const int column = first_column + first;
    Vector<T> result;
#pragma unroll
    for (int element = 0; element < kElements; ++element) {
      float value = sums[first + element];
      if (convolution.bias != nullptr) value += __ldg(convolution.bias + column + element);
      if (convolution.relu) value = rectify(value);
      result.elements[element] = from_float<T>(value);
    }
    store_elements(output + column, result, convolution.out_channels - column, p.aligned);
  }
}

}  // namespace threshnet_fast::cuda
