#include <cstdlib>

#include "checks.h"
#include "dispatch.cuh"
#include "gather.cuh"
#include "launch.cuh"

namespace threshnet_fast::cuda {

namespace {

// Between neighbouring pixels, along the innermost axis that has more than one.
int64_t pixel_stride(const Gather& gather) {
  if (gather.width > 1) return gather.width_stride;
  if (gather.height > 1) return gather.height_stride;
  return gather.batch_stride;
}

bool has_aligned_vectors(const Gather& gather) {
  const int64_t elements = 16 / bytes_of(gather.dtype);
  return gather.channel_stride == 1 && reinterpret_cast<uintptr_t>(gather.input) % 16 == 0 &&
         gather.batch_stride % elements == 0 && gather.height_stride % elements == 0 &&
         gather.width_stride % elements == 0;
}

}  // namespace

void gather(const Gather& gather, Stream stream) {
  const Checker check("gather");
  check.pixels(gather.batch, gather.height, gather.width, "input");
  check.positive(gather.channels, "channels");
  check.pointer(gather.input, bytes_of(gather.dtype), "input");
  check.pointer(gather.output, 16, "output");
  check.at_least(gather.output_channels, gather.channels, "output_channels");
  check.multiple(gather.output_channels, kGroup, "output_channels");
  check.at_least(gather.output_pitch, gather.output_channels, "output_pitch");
  check.multiple(gather.output_pitch, 8, "output_pitch");

  const int64_t pixels = int64_t{gather.batch} * gather.height * gather.width;
  with_type(gather.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int kElements = Vector<T>::kElements;
    if (gather.channels <= kElements ||
        std::abs(gather.channel_stride) <= std::abs(pixel_stride(gather))) {
      GatherChannelsParameters parameters;
      parameters.gather = gather;
      parameters.grid = ElementwiseGrid(gather.output_channels / kElements, pixels);
      parameters.aligned = has_aligned_vectors(gather);
      launch(gather_channels_kernel<T>, parameters.grid.blocks(), parameters.grid.parts(),
             kElementwiseThreads, 0, stream, parameters);
    } else {
      GatherPixelsParameters parameters;
      parameters.gather = gather;
      parameters.pixels = static_cast<int32_t>(pixels);
      launch(
          gather_pixels_kernel<T>, divide_up(pixels, int64_t{kGatherPixels}),
          static_cast<int>(divide_up(int64_t{gather.output_channels}, int64_t{kGatherChannels<T>})),
          kGatherThreads, kGatherPixels * kGatherWords * 4, stream, parameters);
    }
  });
}

}  // namespace threshnet_fast::cuda
