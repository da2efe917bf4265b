// The kernels of implicit_gemm.cuh in one dtype: a file each, so that they are compiled side by
// side.
#include "implicit_gemm.cuh"

namespace threshnet_fast::cuda {

GemmKernels bfloat16_kernels() { return tensor_core_kernels<__nv_bfloat16>(); }

}  // namespace threshnet_fast::cuda
