// CUDA C++ for a C++ compiler of the CPU, for tests. Kernels that include this instead of CUDA's
// device headers are plain functions; emulation::launch() runs every thread of a block as a fiber,
// one block after the other. ../README.md says what that proves and what it does not.
//
// A kernel takes one struct, only dynamic shared memory, threads along x. What it must not do is an
// error that names the kernel, the block, the thread and the line: see launch().
#pragma once

// CUDA's own types, and what __half and __nv_bfloat16 are on the host.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
// They would be a thread's own, silently.
#define __shared__ _Pragma("GCC error \"only DYNAMIC_SHARED memory is emulated\"")
#define __constant__ _Pragma("GCC error \"__constant__ memory is not emulated\"")

// Of the thread that runs.
extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;
constexpr int warpSize = 32;

// The block's shared memory: of exactly the bytes that the launch asked for, all 0xFF (NaN in every
// dtype) until they are written.
#define DYNAMIC_SHARED(name) unsigned char* const name = emulation::shared_memory()

namespace emulation {

constexpr unsigned kWarp = 32;
constexpr unsigned kWholeWarp = 0xFFFFFFFFu;
constexpr unsigned kMaxThreads = 1024;
constexpr size_t kMaxParameterBytes = 4096;

// Thrown by launch(): what a kernel did that it must not do, and where.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

unsigned char* shared_memory();
// Whether it is a thread of a launch that asks.
bool in_kernel();

// In what follows `file` and `line` are those of the caller, for error messages, and to see that
// all threads are at the same place.

// Ends the launch with an error.
[[noreturn]] void fail(const char* what, const char* file = __builtin_FILE(),
                       int line = __builtin_LINE());
void synchronize_block(const char* file, int line);
void synchronize_warp(unsigned mask, const char* file, int line);
// The value that the lane `source` of the warp gives, which has to be one of `mask`.
uint64_t exchange(unsigned mask, uint64_t value, unsigned source, const char* file, int line);

template <typename T>
T shuffle(unsigned mask, T value, unsigned source, const char* file, int line) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(uint64_t),
                "a shuffle moves at most 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(mask, bits, source, file, line);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline unsigned lane() { return threadIdx.x % kWarp; }

// The primitives of csrc/cuda/primitives.cuh, which says what they do.

// The copy arrives when copy_async_wait says so; until then its place holds NaN, and
// AddressSanitizer reports every access to it.
void copy_async_16(void* shared, const void* global, bool exists,
                   const char* file = __builtin_FILE(), int line = __builtin_LINE());
void copy_async_commit();
void complete_copies(unsigned pending);

template <int pending>
void copy_async_wait() {
  static_assert(pending >= 0);
  complete_copies(pending);
}

void load_matrices(uint32_t (&fragment)[4], const void* row, const char* file = __builtin_FILE(),
                   int line = __builtin_LINE());
void load_matrices_transposed(uint32_t (&fragment)[4], const void* row,
                              const char* file = __builtin_FILE(), int line = __builtin_LINE());
void multiply_add_float16(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                          const char* file, int line);
void multiply_add_bfloat16(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                           const char* file, int line);

template <typename T>
void multiply_add(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                  const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
  if constexpr (std::is_same_v<T, __half>)
    multiply_add_float16(sums, a, b0, b1, file, line);
  else
    multiply_add_bfloat16(sums, a, b0, b1, file, line);
}

struct Kernel {
  void (*function)();
  void (*call)(void (*function)(), const void* parameters);
};

void launch(const Kernel& kernel, unsigned blocks, unsigned parts, unsigned threads,
            size_t shared_bytes, const void* parameters, size_t parameter_bytes);

// Runs a kernel by `blocks` x `parts` blocks of `threads` threads. Throws Error, whose text names
// the kernel, block, thread and line, where
// - the launch asks for more threads or shared memory than a device has;
// - threads of a block wait for each other for ever, or at different barriers, or for a thread that
//   has exited;
// - lanes of a warp are at different warp-wide functions, or one of them is not in the mask;
// - a shuffle reads a lane that does not take part;
// - asynchronous copies and matrices are misaligned or outside of shared memory;
// - anything else is misaligned: there AddressSanitizer's and ThreadSanitizer's builds do not look;
// - something was written behind the shared memory.
// What a kernel throws comes out of launch() too.
template <typename Parameters>
void launch(void (*kernel)(Parameters), unsigned blocks, unsigned parts, unsigned threads,
            size_t shared_bytes, [[maybe_unused]] void* stream, const Parameters& parameters) {
  static_assert(std::is_trivially_copyable_v<Parameters>);
  static_assert(sizeof(Parameters) <= kMaxParameterBytes);
  const auto call = [](void (*function)(), const void* argument) {
    reinterpret_cast<void (*)(Parameters)>(function)(*static_cast<const Parameters*>(argument));
  };
  launch(Kernel{reinterpret_cast<void (*)()>(kernel), call}, blocks, parts, threads, shared_bytes,
         &parameters, sizeof(Parameters));
}

}  // namespace emulation

// How the tests steer the emulation.
extern "C" {

// The order in which threads and blocks run: 0 forward, 1 reverse, 2 shuffled, different for every
// seed. All of them are allowed on a device.
void emulation_set_schedule(int order, uint64_t seed);

// Where `recorder` is not null, launches are told to it and do not run. `kernel` is the mangled
// name, the same as in nvcc's PTX.
using EmulationRecorder = void (*)(const char* kernel, unsigned blocks, unsigned parts,
                                   unsigned threads, size_t shared_bytes, const void* parameters,
                                   size_t parameter_bytes);
void emulation_set_recorder(EmulationRecorder recorder);

// The device that launches are checked against and cudaDeviceGetAttribute tells of.
void emulation_set_device(int architecture, int multiprocessors, int shared_bytes);

}  // extern "C"

// CUDA's functions for device code.

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulation::synchronize_block(file, line);
}

inline void __syncwarp(unsigned mask = emulation::kWholeWarp, const char* file = __builtin_FILE(),
                       int line = __builtin_LINE()) {
  emulation::synchronize_warp(mask, file, line);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize,
              const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  const unsigned segment = emulation::lane() & ~(static_cast<unsigned>(width) - 1);
  const unsigned within = static_cast<unsigned>(source) & (static_cast<unsigned>(width) - 1);
  return emulation::shuffle(mask, value, segment | within, file, line);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize,
                  const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  const unsigned lane = emulation::lane();
  const unsigned source = lane ^ static_cast<unsigned>(lane_mask);
  const unsigned end = (lane & ~(static_cast<unsigned>(width) - 1)) + static_cast<unsigned>(width);
  return emulation::shuffle(mask, value, source < end ? source : lane, file, line);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                   const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  const unsigned lane = emulation::lane();
  const unsigned source = lane + delta;
  const unsigned end = (lane & ~(static_cast<unsigned>(width) - 1)) + static_cast<unsigned>(width);
  return emulation::shuffle(mask, value, source < end ? source : lane, file, line);
}

template <typename T>
T __ldg(const T* address) {
  return *address;
}

[[noreturn]] inline void __trap(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulation::fail("__trap()", file, line);
}

inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }

inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(uint64_t{a} * b >> 32);
}

namespace emulation {

template <typename To, typename From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

}  // namespace emulation

inline float __int_as_float(int bits) { return emulation::bit_cast<float>(bits); }
inline float __uint_as_float(unsigned bits) { return emulation::bit_cast<float>(bits); }
inline int __float_as_int(float value) { return emulation::bit_cast<int>(value); }
inline unsigned __float_as_uint(float value) { return emulation::bit_cast<unsigned>(value); }

using std::max;
using std::min;
