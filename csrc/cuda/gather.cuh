// Copies a map of any strides into whole groups of channels. Along which of its axes a warp reads
// is chosen by its strides; what it writes is always a row of vectors of 16 bytes.
#pragma once

#include "elementwise.cuh"

namespace threshnet_fast::cuda {

struct GatherChannelsParameters {
  Gather gather;
  ElementwiseGrid grid;
  bool aligned;  // whether each vector of the input can be read at once
};

struct GatherPixelsParameters {
  Gather gather;
  int32_t pixels;
};

template <typename T>
__device__ __forceinline__ const T* input_pixel(const Gather& gather, int32_t pixel) {
  const Position position = position_of(pixel, gather.height, gather.width);
  return static_cast<const T*>(gather.input) + position.image * gather.batch_stride +
         position.row * gather.height_stride + position.column * gather.width_stride;
}

// A thread copies a vector of channels: for inputs whose channels are next to each other, and for
// few channels.
template <typename T>
__global__ void __launch_bounds__(kElementwiseThreads)
    gather_channels_kernel(const __grid_constant__ GatherChannelsParameters p) {
  constexpr int kElements = Vector<T>::kElements;
  const Gather& gather = p.gather;
  const ElementwiseIndex index = elementwise_index(p.grid);
  if (!index.exists) return;
  const int first = index.vector * kElements;
  const T* input = input_pixel<T>(gather, index.pixel);
  Vector<T> values;
  if (p.aligned && first + kElements <= gather.channels) {
    values = load_vector(input + first);
  } else {
#pragma unroll
    for (int element = 0; element < kElements; ++element)
      values.elements[element] = first + element < gather.channels
                                     ? __ldg(input + (first + element) * gather.channel_stride)
                                     : from_float<T>(0.0f);
  }
  store_vector(static_cast<T*>(gather.output) + int64_t{index.pixel} * gather.output_pitch + first,
               values);
}

constexpr int kGatherThreads = 256;
constexpr int kGatherPixels = 32;

// Words of 4 bytes that a pixel takes in shared memory, the last one unused: a row's length being
// odd, threads of neighbouring pixels meet no bank conflicts.
constexpr int kGatherWords = 33;

template <typename T>
constexpr int kGatherChannels = (kGatherWords - 1) * 4 / static_cast<int>(sizeof(T));

// The elements of a word.
template <typename T>
struct alignas(4) Word {
  T elements[4 / sizeof(T)];
};

// A block transposes the channels of kGatherPixels pixels: read with the threads of a warp along
// pixels, written with them along channels.
template <typename T>
__global__ void __launch_bounds__(kGatherThreads)
    gather_pixels_kernel(const __grid_constant__ GatherPixelsParameters p) {
  constexpr int kElements = Vector<T>::kElements;
  constexpr int kVectors = kGatherChannels<T> / kElements;
  constexpr int kWarps = kGatherThreads / 32;
  static_assert(kGatherPixels == 32 && kGatherPixels * kVectors == kGatherThreads,
                "a lane reads a pixel, a thread writes a vector");
  DYNAMIC_SHARED(memory);
  const Gather& gather = p.gather;
  const int thread = static_cast<int>(threadIdx.x);
  const int first_pixel = static_cast<int>(blockIdx.x) * kGatherPixels;
  const int first_channel = static_cast<int>(blockIdx.y) * kGatherChannels<T>;

  const int lane = thread % 32;
  const int warp = thread / 32;
  if (first_pixel + lane < p.pixels) {
    const T* input = input_pixel<T>(gather, first_pixel + lane);
    T* row = reinterpret_cast<T*>(memory) + lane * (kGatherWords * 4 / static_cast<int>(sizeof(T)));
#pragma unroll
    for (int step = 0; step < kGatherChannels<T> / kWarps; ++step) {
      const int channel = step * kWarps + warp;
      row[channel] = first_channel + channel < gather.channels
                         ? __ldg(input + (first_channel + channel) * gather.channel_stride)
                         : from_float<T>(0.0f);
    }
  }
  __syncthreads();

  const int pixel = thread / kVectors;
  const int vector = thread % kVectors;
  const int channel = first_channel + vector * kElements;
  if (first_pixel + pixel >= p.pixels || channel >= gather.output_channels) return;
  const Word<T>* words =
      reinterpret_cast<const Word<T>*>(memory) + pixel * kGatherWords + vector * 4;
  Vector<T> values;
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    const Word<T> two = words[word];
#pragma unroll
    for (int element = 0; element < kElements / 4; ++element)
      values.elements[word * (kElements / 4) + element] = two.elements[element];
  }
  store_vector(
      static_cast<T*>(gather.output) + int64_t{first_pixel + pixel} * gather.output_pitch + channel,
      values);
}

}  // namespace threshnet_fast::cuda
