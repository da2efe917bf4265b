// Launches a kernel. Every kernel takes one struct, so that one function checks and starts all.
#pragma once

#include <stdexcept>
#include <string>

#include "operands.h"
#include "primitives.cuh"

namespace threshnet_fast::cuda {

// Throws std::runtime_error with CUDA's own text.
inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("threshnet_fast: ") + what + ": " +
                           cudaGetErrorString(error));
}

// Throws std::invalid_argument.
inline void require(bool condition, const char* what) {
  if (!condition) throw std::invalid_argument(std::string("threshnet_fast: ") + what);
}

// Starts `blocks` blocks along x and `parts` along y. A kernel is declared as
// __global__ void __launch_bounds__(threads) name(const __grid_constant__ Parameters p).
template <typename Parameters>
void launch(void (*kernel)(Parameters), int64_t blocks, int parts, int threads, int shared_bytes,
            Stream stream, const Parameters& parameters) {
  require(blocks > 0 && blocks < int64_t{1} << 31 && parts > 0 && parts < 65536,
          "the grid of a kernel is empty or too large");
#if defined(THRESHNET_FAST_EMULATION)
  emulation::launch(kernel, static_cast<unsigned>(blocks), static_cast<unsigned>(parts),
                    static_cast<unsigned>(threads), static_cast<size_t>(shared_bytes), stream,
                    parameters);
#else
  constexpr int kSharedWithoutAsking = 48 * 1024;
  const void* function = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > kSharedWithoutAsking)
    check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
          "a kernel needs more shared memory than the device has");
  void* arguments[] = {const_cast<Parameters*>(&parameters)};
  check(
      cudaLaunchKernel(function, dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(parts)),
                       dim3(static_cast<unsigned>(threads)), arguments,
                       static_cast<size_t>(shared_bytes), static_cast<cudaStream_t>(stream)),
      "a kernel cannot be launched");
#endif
}

}  // namespace threshnet_fast::cuda
