// What kernels share whose threads compute each a vector of channels of one pixel.
#pragma once

#include <cstdint>
#include <cstring>

#include "operands.h"
#include "primitives.cuh"

namespace threshnet_fast::cuda {

constexpr int kElementwiseThreads = 128;

// How a grid's threads are numbered: vectors of channels first, so that a warp reads and writes
// what is next to each other, then pixels. A block has `vectors` times `pixels` working threads,
// blocks along x are for more pixels and blocks along y for more vectors.
struct ElementwiseGrid {
  int32_t total_vectors, total_pixels;
  int32_t vectors, pixels;  // of a block

  ElementwiseGrid() = default;
  ElementwiseGrid(int64_t all_vectors, int64_t all_pixels)
      : total_vectors(static_cast<int32_t>(all_vectors)),
        total_pixels(static_cast<int32_t>(all_pixels)) {
    vectors = divide_up(total_vectors, divide_up(total_vectors, kElementwiseThreads));
    pixels = kElementwiseThreads / vectors;
  }

  int64_t blocks() const { return divide_up(total_pixels, pixels); }
  int parts() const { return divide_up(total_vectors, vectors); }
};

struct ElementwiseIndex {
  int32_t pixel, vector;
  bool exists;
};

__device__ __forceinline__ ElementwiseIndex elementwise_index(const ElementwiseGrid& grid) {
  const int thread = static_cast<int>(threadIdx.x);
  const int pixel_of_block = thread / grid.vectors;
  ElementwiseIndex index;
  index.pixel = static_cast<int>(blockIdx.x) * grid.pixels + pixel_of_block;
  index.vector =
      static_cast<int>(blockIdx.y) * grid.vectors + thread - pixel_of_block * grid.vectors;
  index.exists = pixel_of_block < grid.pixels && index.pixel < grid.total_pixels &&
                 index.vector < grid.total_vectors;
  return index;
}

// Where a pixel of a batch lies.
struct Position {
  int32_t image, row, column;
};

__device__ __forceinline__ Position position_of(int32_t pixel, int32_t height, int32_t width) {
  const int rows = pixel / width;
  const int image = rows / height;
  return {image, rows - image * height, pixel - rows * width};
}

// Reads memory that no thread of the launch writes.
template <typename T>
__device__ __forceinline__ Vector<T> load_vector(const T* address) {
  const uint4 bits = __ldg(reinterpret_cast<const uint4*>(address));
  Vector<T> vector;
  memcpy(&vector, &bits, sizeof(bits));
  return vector;
}

template <typename T>
__device__ __forceinline__ void store_vector(T* address, const Vector<T>& vector) {
  uint4 bits;
  memcpy(&bits, &vector, sizeof(bits));
  *reinterpret_cast<uint4*>(address) = bits;
}

// Stores the first `count` elements, at once where all are wanted and the address is aligned.
template <typename T>
__device__ __forceinline__ void store_elements(T* address, const Vector<T>& vector, int64_t count,
                                               bool aligned) {
  if (aligned && count >= Vector<T>::kElements) {
    store_vector(address, vector);
    return;
  }
#pragma unroll
  for (int element = 0; element < Vector<T>::kElements; ++element)
    if (element < count) address[element] = vector.elements[element];
}

// Whether every pixel of a map can be accessed in vectors.
inline bool has_aligned_pixels(const void* data, int64_t pitch, DType dtype) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && pitch * bytes_of(dtype) % 16 == 0;
}

}  // namespace threshnet_fast::cuda
