// The instructions that CUDA C++ has no expression for, behind functions that hold the inline
// assembly. Under THRESHNET_FAST_EMULATION, where a C++ compiler for the CPU reads these files, the
// functions are those of the emulation.
#pragma once

#if defined(THRESHNET_FAST_EMULATION)
#include "host_cuda.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// Shared memory of a block, as much as its launch asks for.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#endif

#include <cstdint>
#include <cstring>

namespace threshnet_fast::cuda {

#if defined(THRESHNET_FAST_EMULATION)

using emulation::copy_async_16;
using emulation::copy_async_commit;
using emulation::copy_async_wait;
using emulation::load_matrices;
using emulation::load_matrices_transposed;
using emulation::multiply_add;

#else

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies 16 bytes from global to shared memory, or writes 16 zeros where they do not exist: then
// nothing is read. Complete for the thread that asked for it after copy_async_wait, for others
// after a barrier too. Both addresses are aligned to 16 bytes.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, bool exists) {
#if __CUDA_ARCH__ >= 800
  const int bytes = exists ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(bytes)
               : "memory");
#else
  *static_cast<uint4*>(shared) =
      exists ? __ldg(static_cast<const uint4*>(global)) : make_uint4(0, 0, 0, 0);
#endif
}

// Ends a group of copies, perhaps an empty one.
__device__ __forceinline__ void copy_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most the `pending` latest groups of this thread are not complete.
template <int pending>
__device__ __forceinline__ void copy_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

// Loads four 8 x 8 matrices of 16-bit elements, collectively for a warp: lane l gives the address
// of row l % 8 of matrix l / 8, and gets the elements 2 * (l % 4) and the next of row l / 4 of
// each.
__device__ __forceinline__ void load_matrices(uint32_t (&fragment)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same with each matrix transposed: lane l gets the elements 2 * (l % 4) and the next of column
// l / 4.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&fragment)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(row))
               : "memory");
}

// sums += a b, where a is 16 x 16, b 16 x 8 and sums 16 x 8 in float32, collectively for a warp.
// Lane l holds of sums the elements 2 * (l % 4) and the next of the rows l / 4 and l / 4 + 8.
template <typename T>
__device__ __forceinline__ void multiply_add(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1);

template <>
__device__ __forceinline__ void multiply_add<__half>(float (&sums)[4], const uint32_t (&a)[4],
                                                     uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(b0));
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}

template <>
__device__ __forceinline__ void multiply_add<__nv_bfloat16>(float (&sums)[4],
                                                            const uint32_t (&a)[4], uint32_t b0,
                                                            uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  // The launchers refuse: these tensor cores have no bfloat16.
  __trap();
#endif
}

#endif

template <typename T>
__device__ __forceinline__ float to_float(T value) {
  return static_cast<float>(value);
}

// Rounds to nearest.
template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// max(value, 0), which keeps a NaN as PyTorch does and fmaxf does not.
__device__ __forceinline__ float rectify(float value) {
#if __CUDA_ARCH__ >= 800
  float result;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(result) : "f"(value));
  return result;
#else
  return value < 0.0f ? 0.0f : value;
#endif
}

// Neighbouring elements.
template <typename T>
struct alignas(2 * sizeof(T)) Pair {
  T elements[2];
};

// Rectifies and rounds.
template <typename T>
__device__ __forceinline__ Pair<T> rectified_pair(float first, float second) {
  return {from_float<T>(rectify(first)), from_float<T>(rectify(second))};
}

#if __CUDA_ARCH__ >= 800
template <>
__device__ __forceinline__ Pair<__half> rectified_pair<__half>(float first, float second) {
  uint32_t bits;
  asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
  Pair<__half> pair;
  memcpy(&pair, &bits, sizeof(bits));
  return pair;
}
template <>
__device__ __forceinline__ Pair<__nv_bfloat16> rectified_pair<__nv_bfloat16>(float first,
                                                                             float second) {
  uint32_t bits;
  asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
  Pair<__nv_bfloat16> pair;
  memcpy(&pair, &bits, sizeof(bits));
  return pair;
}
#endif

// Elements of 16 bytes, read and written at once.
template <typename T>
struct alignas(16) Vector {
  static constexpr int kElements = 16 / sizeof(T);
  T elements[kElements];
};

}  // namespace threshnet_fast::cuda
