#include <algorithm>

#include "checks.h"
#include "dispatch.cuh"
#include "launch.cuh"
#include "pool.cuh"

namespace threshnet_fast::cuda {

namespace {

template <typename T, bool kAverage>
auto kernel_for(const Window& window) {
  if (window.kernel_height == window.kernel_width) {
    if (window.kernel_height == 2) return pool_kernel<T, kAverage, 2>;
    if (window.kernel_height == 3) return pool_kernel<T, kAverage, 3>;
  }
  return pool_kernel<T, kAverage, 0>;
}

}  // namespace

void pool(const Pool& pool, Stream stream) {
  const Checker check("pool");
  const Window& window = pool.window;
  check.window(window);
  // More, and a window could lie in padding alone.
  check.at_most(window.padding,
                pool.average ? 0 : std::min(window.kernel_height, window.kernel_width) / 2,
                "padding");
  check.segment(pool.input);
  check.positive(pool.out_channels, "out_channels");
  check.at_most(pool.out_channels, pool.input.channels, "out_channels");
  check.pointer(pool.output, bytes_of(pool.dtype), "output");
  check.at_least(pool.output_pitch, pool.out_channels, "output_pitch");

  PoolParameters parameters;
  parameters.pool = pool;
  parameters.aligned = has_aligned_pixels(pool.output, pool.output_pitch, pool.dtype);
  parameters.reciprocal =
      static_cast<float>(1.0 / (int64_t{window.kernel_height} * window.kernel_width));
  with_type(pool.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    parameters.grid = ElementwiseGrid(
        divide_up(int64_t{pool.out_channels}, int64_t{Vector<T>::kElements}), window.out_pixels());
    launch(pool.average ? kernel_for<T, true>(window) : kernel_for<T, false>(window),
           parameters.grid.blocks(), parameters.grid.parts(), kElementwiseThreads, 0, stream,
           parameters);
  });
}

}  // namespace threshnet_fast::cuda
