#include <algorithm>

#include "checks.h"
#include "dispatch.cuh"
#include "head.cuh"
#include "launch.cuh"

namespace threshnet_fast::cuda {

namespace {

// Few enough that no index of a class behind the last one needs more than 32 bits.
constexpr int kMaxClasses = 1 << 30;

// Few enough that no index of a pixel behind the last one needs more than 32 bits.
constexpr int kMaxParts = 64;
static_assert(kMostPixels + kHeadPixels * kMaxParts < int64_t{1} << 31);

// Blocks that keep the largest devices busy. Fewer slices of classes average a map less often.
constexpr int kEnoughBlocks = 512;

}  // namespace

void head(const Head& head, Stream stream) {
  const Checker check("head");
  const int64_t size = bytes_of(head.dtype);
  check.pixels(head.batch, head.pixels, 1, "input");
  check.segment(head.input);
  check.at_most(head.input.channels, kMaxHeadChannels, "channels of the input");
  check.pointer(head.weight, 16, "weight");
  check.positive(head.classes, "classes");
  check.at_most(head.classes, kMaxClasses, "classes");
  check.optional(head.bias, alignof(float), "bias");
  check.pointer(head.output, size, "output");

  HeadParameters parameters;
  parameters.head = head;
  parameters.reciprocal = static_cast<float>(1.0 / head.pixels);
  const int slices =
      std::min(divide_up(head.classes, kHeadWarps), divide_up(kEnoughBlocks, head.batch));
  parameters.classes_of_block = round_up(divide_up(head.classes, slices), kHeadWarps);
  with_type(head.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const int vectors = head.input.channels / Vector<T>::kElements;
    parameters.parts =
        std::min({kHeadThreads / std::min(vectors, kHeadThreads), kMaxParts, head.pixels});
    // Every device has that much without being asked for more.
    static_assert(kHeadThreads * sizeof(Vector<float>) * 2 <= 48 * 1024 &&
                  kMaxHeadChannels * sizeof(float) <= 48 * 1024);
    const int shared_bytes =
        parameters.parts * head.input.channels * static_cast<int>(sizeof(float));
    launch(head_kernel<T>, head.batch, divide_up(head.classes, parameters.classes_of_block),
           kHeadThreads, shared_bytes, stream, parameters);
  });
}

}  // namespace threshnet_fast::cuda
