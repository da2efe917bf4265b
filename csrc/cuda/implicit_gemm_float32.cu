// The kernels of implicit_gemm.cuh in one dtype: a file each, so that they are compiled side by
// side.
#include "implicit_gemm.cuh"

namespace threshnet_fast::cuda {

GemmKernels float32_kernels() {
  return gemm_kernels<float, GemmTile<float, 64, 64, 1, 3, FloatUnits<64, 64>>,
                      GemmTile<float, 64, 32, 2, 3, FloatUnits<64, 32>>,
                      GemmTile<float, 32, 32, 2, 3, FloatUnits<32, 32>>,
                      GemmTile<float, 16, 32, 2, 4, FloatUnits<16, 32>>>();
}

}  // namespace threshnet_fast::cuda
