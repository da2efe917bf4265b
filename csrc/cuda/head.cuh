// The average of a whole map and the linear classifier behind it. A block takes one image and a
// slice of the classes, and averages the map anew for it, from the cache: that costs less than
// another kernel as long as the map is small.
#pragma once

#include "elementwise.cuh"

namespace threshnet_fast::cuda {

constexpr int kHeadThreads = 512;
constexpr int kHeadWarps = kHeadThreads / 32;
// Vectors that a thread loads at a time, so that their latencies overlap: of the map, along its
// pixels, and of the weight. What is beyond the last one is loaded from there, and not used.
constexpr int kHeadPixels = 8;
constexpr int kHeadVectors = 4;

struct HeadParameters {
  Head head;
  int32_t classes_of_block;
  // Threads that add up the same channels, each every `parts`-th pixel.
  int32_t parts;
  float reciprocal;  // of the pixels of an image
};

// Sums are kept in shared memory as [part][plane][vector][4], the four neighbouring channels of a
// plane being a half of a vector in half precision and all of it in float32: threads that read
// neighbouring vectors then meet no bank conflicts.
template <typename T>
__global__ void __launch_bounds__(kHeadThreads)
    head_kernel(const __grid_constant__ HeadParameters p) {
  constexpr int kElements = Vector<T>::kElements;
  constexpr int kPlanes = kElements / 4;
  DYNAMIC_SHARED(memory);
  float4* sums = reinterpret_cast<float4*>(memory);
  const Head& head = p.head;
  const int channels = head.input.channels;
  const int vectors = channels / kElements;
  const int thread = static_cast<int>(threadIdx.x);
  const int image = static_cast<int>(blockIdx.x);

  const int threads_of_part = min(vectors, kHeadThreads);
  const int part = thread / threads_of_part;
  if (part < p.parts) {
    for (int v = thread - part * threads_of_part; v < vectors; v += threads_of_part) {
      const T* input = static_cast<const T*>(head.input.data) +
                       int64_t{image} * head.pixels * head.input.pitch + v * kElements;
      float sum[kElements] = {};
      for (int first = part; first < head.pixels; first += kHeadPixels * p.parts) {
        Vector<T> values[kHeadPixels];
#pragma unroll
        for (int i = 0; i < kHeadPixels; ++i) {
          const int pixel = min(first + i * p.parts, head.pixels - 1);
          values[i] = load_vector(input + int64_t{pixel} * head.input.pitch);
        }
#pragma unroll
        for (int i = 0; i < kHeadPixels; ++i)
          if (first + i * p.parts < head.pixels) {
#pragma unroll
            for (int element = 0; element < kElements; ++element)
              sum[element] += to_float(values[i].elements[element]);
          }
      }
#pragma unroll
      for (int plane = 0; plane < kPlanes; ++plane)
        sums[(part * kPlanes + plane) * vectors + v] =
            make_float4(sum[plane * 4], sum[plane * 4 + 1], sum[plane * 4 + 2], sum[plane * 4 + 3]);
    }
  }
  __syncthreads();
  // Always in the same order, and in place: no other thread reads what one writes here.
  for (int i = thread; i < kPlanes * vectors; i += kHeadThreads) {
    float4 total = sums[i];
#pragma unroll 4
    for (int other = 1; other < p.parts; ++other) {
      const float4 sum = sums[other * kPlanes * vectors + i];
      total.x += sum.x;
      total.y += sum.y;
      total.z += sum.z;
      total.w += sum.w;
    }
    sums[i] = make_float4(total.x * p.reciprocal, total.y * p.reciprocal, total.z * p.reciprocal,
                          total.w * p.reciprocal);
  }
  __syncthreads();

  const int lane = thread % 32;
  const int first_class = static_cast<int>(blockIdx.y) * p.classes_of_block;
  const int last_class = min(first_class + p.classes_of_block, head.classes);
  for (int k = first_class + thread / 32; k < last_class; k += kHeadWarps) {
    const T* weight = static_cast<const T*>(head.weight) + int64_t{k} * channels;
    float product = 0.0f;
    for (int first = lane; first < vectors; first += 32 * kHeadVectors) {
      Vector<T> factors[kHeadVectors];
#pragma unroll
      for (int i = 0; i < kHeadVectors; ++i)
        factors[i] = load_vector(weight + min(first + 32 * i, vectors - 1) * kElements);
#pragma unroll
      for (int i = 0; i < kHeadVectors; ++i)
        if (first + 32 * i < vectors) {
#pragma unroll
          for (int plane = 0; plane < kPlanes; ++plane) {
            const float4 mean = sums[plane * vectors + first + 32 * i];
            const T* factor = factors[i].elements + plane * 4;
            product = fmaf(mean.x, to_float(factor[0]), product);
            product = fmaf(mean.y, to_float(factor[1]), product);
            product = fmaf(mean.z, to_float(factor[2]), product);
            product = fmaf(mean.w, to_float(factor[3]), product);
          }
        }
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2)
      product += __shfl_xor_sync(0xffffffffu, product, distance);
    if (lane == 0) {
      if (head.bias != nullptr) product += __ldg(head.bias + k);
      static_cast<T*>(head.output)[int64_t{image} * head.classes + k] = from_float<T>(product);
    }
  }
}

}  // namespace threshnet_fast::cuda
