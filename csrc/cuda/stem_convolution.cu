#include "checks.h"
#include "dispatch.cuh"
#include "launch.cuh"
#include "stem_convolution.cuh"

namespace threshnet_fast::cuda {

void convolve_stem(const StemConvolution& convolution, Stream stream) {
  const Checker check("convolve_stem");
  const int64_t size = bytes_of(convolution.dtype);
  check.window(convolution.window);
  check.pointer(convolution.input, size, "input");
  check.positive(convolution.in_channels, "in_channels");
  check.pointer(convolution.weight, 16, "weight");
  check.positive(convolution.weight_columns, "weight_columns");
  check.multiple(convolution.weight_columns, kGroup, "weight_columns");
  check.positive(convolution.out_channels, "out_channels");
  check.at_most(convolution.out_channels, convolution.weight_columns, "out_channels");
  check.optional(convolution.bias, alignof(float), "bias");
  check.pointer(convolution.output, size, "output");
  check.at_least(convolution.output_pitch, convolution.out_channels, "output_pitch");

  StemParameters parameters;
  parameters.convolution = convolution;
  parameters.grid =
      ElementwiseGrid(divide_up(int64_t{convolution.out_channels}, int64_t{kStemColumns}),
                      convolution.window.out_pixels());
  parameters.aligned =
      has_aligned_pixels(convolution.output, convolution.output_pitch, convolution.dtype);
  with_type(convolution.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const Window& window = convolution.window;
    const bool usual =
        convolution.in_channels == 3 && window.kernel_height == 3 && window.kernel_width == 3;
    launch(usual ? stem_convolution_kernel<T, 3, 3> : stem_convolution_kernel<T, 0, 0>,
           parameters.grid.blocks(), parameters.grid.parts(), kElementwiseThreads, 0, stream,
           parameters);
  });
}

}  // namespace threshnet_fast::cuda
