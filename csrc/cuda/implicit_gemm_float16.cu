// The kernels of implicit_gemm.cuh in one dtype: a file each, so that they are compiled side by
// side.
#include "implicit_gemm.cuh"

namespace threshnet_fast::cuda {

GemmKernels float16_kernels() { return tensor_core_kernels<__half>(); }

}  // namespace threshnet_fast::cuda
