// Kernels for the emulation's own tests, in the style of csrc/cuda.
#include "cuda/launch.cuh"
#include "testing.h"

namespace examples {

using namespace threshnet_fast::cuda;

// y[i] = x[i] with each block's elements in reverse.
struct Reverse {
  const float* x;
  float* y;
  int32_t count;
};

constexpr int kReverseThreads = 96;

__global__ void __launch_bounds__(kReverseThreads)
    reverse_kernel(const __grid_constant__ Reverse p) {
  DYNAMIC_SHARED(memory);
  float* tile = reinterpret_cast<float*>(memory);
  const int first = static_cast<int>(blockIdx.x * blockDim.x);
  const int length = min(static_cast<int>(blockDim.x), p.count - first);
  const int mine = static_cast<int>(threadIdx.x);
  if (mine < length) tile[mine] = p.x[first + mine];
  __syncthreads();
  if (mine < length) p.y[first + mine] = tile[length - 1 - mine];
}

void reverse(const Reverse& reverse) {
  launch(reverse_kernel, divide_up(reverse.count, kReverseThreads), 1, kReverseThreads,
         kReverseThreads * static_cast<int>(sizeof(float)), nullptr, reverse);
}

// y[row] = sum(x[row, :]), a block a row.
struct RowSums {
  const float* x;
  float* y;
  int32_t rows, columns;
};

constexpr int kRowThreads = 128;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

__global__ void __launch_bounds__(kRowThreads) row_sums_kernel(const __grid_constant__ RowSums p) {
  DYNAMIC_SHARED(memory);
  float* partial = reinterpret_cast<float*>(memory);
  const int lane = static_cast<int>(threadIdx.x) % warpSize;
  const int warp = static_cast<int>(threadIdx.x) / warpSize;
  const float* row = p.x + int64_t{blockIdx.x} * p.columns;
  float sum = 0.0f;
  for (int i = static_cast<int>(threadIdx.x); i < p.columns; i += kRowThreads)
    sum += __ldg(row + i);
  for (int step = warpSize / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  if (lane == 0) partial[warp] = sum;
  __syncthreads();
  if (warp > 0) return;
  constexpr int kWarps = kRowThreads / 32;
  constexpr unsigned kFirstLanes = (1u << kWarps) - 1;
  if (lane >= kWarps) return;
  sum = partial[lane];
  for (int step = kWarps / 2; step > 0; step /= 2)
    sum += __shfl_down_sync(kFirstLanes, sum, static_cast<unsigned>(step), kWarps);
  sum = __shfl_sync(kFirstLanes, sum, 0);
  if (lane == 0) p.y[blockIdx.x] = sum;
}

void row_sums(const RowSums& sums) {
  launch(row_sums_kernel, sums.rows, 1, kRowThreads, 64, nullptr, sums);
}

// partials[part] = a b over a part's rows of b, then c = the sum of all parts. a [rows][depth], b
// [depth][columns], c [rows][columns]; depth and columns are multiples of 8.
struct Product {
  DType dtype;
  const void* a;
  const void* b;
  float* partials;  // [parts][rows][columns]
  float* c;
  int32_t rows, depth, columns, parts;
};

constexpr int kTile = 32, kStages = 3, kProductThreads = 64;
constexpr int kChunk = 8;                     // elements of a copy
constexpr int kChunks = kTile / kChunk;       // of a row of a tile
constexpr int kTileElements = kTile * kTile;  // of a or b, in one stage

// Where a chunk of a row lies in a tile: eight rows that one matrix is loaded from are in different
// banks.
__device__ __forceinline__ int place(int row, int chunk) {
  return (row * kChunks + (chunk ^ (row / 2 % kChunks))) * kChunk;
}

template <typename T>
__device__ __forceinline__ void fetch(const Product& p, T* stage, int row, int column, int k,
                                      int end) {
  for (int i = static_cast<int>(threadIdx.x); i < kTile * kChunks; i += kProductThreads) {
    const int tile_row = i / kChunks, chunk = i % kChunks;
    const int a_row = row + tile_row, a_column = k + chunk * kChunk;
    const bool a_exists = a_row < p.rows && a_column < end;
    const T* a = static_cast<const T*>(p.a);
    copy_async_16(stage + place(tile_row, chunk),
                  a + (a_exists ? int64_t{a_row} * p.depth + a_column : 0), a_exists);
    const int b_row = k + tile_row, b_column = column + chunk * kChunk;
    const bool b_exists = b_row < end && b_column < p.columns;
    const T* b = static_cast<const T*>(p.b);
    copy_async_16(stage + kTileElements + place(tile_row, chunk),
                  b + (b_exists ? int64_t{b_row} * p.columns + b_column : 0), b_exists);
  }
}

template <typename T>
__global__ void __launch_bounds__(kProductThreads)
    product_kernel(const __grid_constant__ Product p) {
  DYNAMIC_SHARED(memory);
  T* stages = reinterpret_cast<T*>(memory);
  const int lane = static_cast<int>(threadIdx.x) % warpSize;
  const int warp = static_cast<int>(threadIdx.x) / warpSize;
  const int column_tiles = (p.columns + kTile - 1) / kTile;
  const int row = static_cast<int>(blockIdx.x) / column_tiles * kTile;
  const int column = static_cast<int>(blockIdx.x) % column_tiles * kTile;
  const int part_depth = round_up(divide_up(p.depth, p.parts), kTile);
  const int begin = static_cast<int>(blockIdx.y) * part_depth;
  const int end = min(begin + part_depth, p.depth);
  const int steps = max(0, (end - begin + kTile - 1) / kTile);

  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps)
      fetch(p, stages + step * 2 * kTileElements, row, column, begin + step * kTile, end);
    copy_async_commit();
  }
  float sums[kTile / 8][4] = {};
  for (int step = 0; step < steps; ++step) {
    copy_async_wait<kStages - 2>();
    __syncthreads();
    const int next = step + kStages - 1;
    if (next < steps)
      fetch(p, stages + next % kStages * 2 * kTileElements, row, column, begin + next * kTile, end);
    copy_async_commit();
    const T* a_tile = stages + step % kStages * 2 * kTileElements;
    const T* b_tile = a_tile + kTileElements;
    for (int k = 0; k < kTile; k += 16) {
      uint32_t a[4];
      load_matrices(a, a_tile + place(warp * 16 + lane % 16, k / kChunk + lane / 16));
      for (int n = 0; n < kTile; n += 16) {
        uint32_t b[4];
        load_matrices_transposed(b, b_tile + place(k + lane % 16, n / kChunk + lane / 16));
        multiply_add<T>(sums[n / 8], a, b[0], b[1]);
        multiply_add<T>(sums[n / 8 + 1], a, b[2], b[3]);
      }
    }
  }
  float* partial = p.partials + int64_t{blockIdx.y} * p.rows * p.columns;
  for (int n = 0; n < kTile / 8; ++n)
    for (int i = 0; i < 4; ++i) {
      const int c_row = row + warp * 16 + lane / 4 + i / 2 * 8;
      const int c_column = column + n * 8 + lane % 4 * 2 + i % 2;
      if (c_row < p.rows && c_column < p.columns)
        partial[int64_t{c_row} * p.columns + c_column] = sums[n][i];
    }
}

constexpr int kSumThreads = 64;

__global__ void __launch_bounds__(kSumThreads) sum_parts_kernel(const __grid_constant__ Product p) {
  const int count = p.rows * p.columns;
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= count) return;
  float sum = 0.0f;
  for (int part = 0; part < p.parts; ++part) sum += p.partials[part * count + i];
  p.c[i] = sum;
}

void product(const Product& product) {
  const int64_t blocks =
      int64_t{divide_up(product.rows, kTile)} * divide_up(product.columns, kTile);
  const int shared_bytes = kStages * 2 * kTileElements * 2;
  launch(product.dtype == DType::kFloat16 ? product_kernel<__half> : product_kernel<__nv_bfloat16>,
         blocks, product.parts, kProductThreads, shared_bytes, nullptr, product);
  launch(sum_parts_kernel, divide_up(product.rows * product.columns, kSumThreads), 1, kSumThreads,
         0, nullptr, product);
}

// y[i] = 2 x[i], by vectors of 16 bytes.
struct Doubling {
  const float* x;
  float* y;
  int32_t vectors;
};

__global__ void doubling_kernel(const __grid_constant__ Doubling p) {
  const int i = static_cast<int>(threadIdx.x);
  if (i >= p.vectors) return;
  Vector<float> vector = reinterpret_cast<const Vector<float>*>(p.x)[i];
  for (float& element : vector.elements) element *= 2.0f;
  reinterpret_cast<Vector<float>*>(p.y)[i] = vector;
}

void doubling(const Doubling& doubling) { launch(doubling_kernel, 1, 1, 32, 0, nullptr, doubling); }

// The same in memory of the device's own.
void doubling_there(const Doubling& given) {
  const size_t bytes = static_cast<size_t>(given.vectors) * sizeof(Vector<float>);
  void *x = nullptr, *y = nullptr;
  check(cudaMalloc(&x, bytes), "no memory");
  check(cudaMalloc(&y, bytes), "no memory");
  check(cudaMemcpyAsync(x, given.x, bytes, cudaMemcpyHostToDevice, nullptr), "no copy");
  doubling({static_cast<const float*>(x), static_cast<float*>(y), given.vectors});
  check(cudaMemcpyAsync(given.y, y, bytes, cudaMemcpyDeviceToHost, nullptr), "no copy");
  check(cudaStreamSynchronize(nullptr), "not done");
  check(cudaFree(x), "not freed");
  check(cudaFree(y), "not freed");
}

// Selects a device and asks for its properties.
struct Query {
  int32_t device;
};

struct Answer {
  int32_t devices, selected, architecture, multiprocessors, shared_bytes;
};

Answer query(const Query& query) {
  Answer answer;
  int major, minor;
  check(cudaGetDeviceCount(&answer.devices), "no devices");
  check(cudaSetDevice(query.device), "no such device");
  check(cudaGetDevice(&answer.selected), "no device");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, query.device), "");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, query.device), "");
  answer.architecture = 10 * major + minor;
  check(
      cudaDeviceGetAttribute(&answer.multiprocessors, cudaDevAttrMultiProcessorCount, query.device),
      "");
  check(cudaDeviceGetAttribute(&answer.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                               query.device),
        "");
  check(cudaSetDevice(0), "");
  return answer;
}

// y[i] = x[i ^ 1], where the lanes of a warp meet at __syncwarp alone.
struct Swap {
  const float* x;
  float* y;
};

__global__ void swap_kernel(const __grid_constant__ Swap p) {
  DYNAMIC_SHARED(memory);
  float* tile = reinterpret_cast<float*>(memory);
  tile[threadIdx.x] = p.x[threadIdx.x];
  __syncwarp();
  p.y[threadIdx.x] = tile[threadIdx.x ^ 1];
}

void swap(const Swap& swap) { launch(swap_kernel, 1, 1, 64, 256, nullptr, swap); }

// Throws in the middle of a block.
__global__ void throwing_kernel(const Swap p) {
  __syncthreads();
  if (threadIdx.x == 40) throw std::out_of_range("thrown by a thread");
  __syncthreads();
  p.y[threadIdx.x] = p.x[threadIdx.x];
}

void throwing(const Swap& swap) { launch(throwing_kernel, 2, 1, 64, 0, nullptr, swap); }

// Launches what a device refuses.
struct Sizes {
  int32_t threads, shared_bytes;
};

__global__ void empty_kernel(const __grid_constant__ Sizes) {}

void empty(const Sizes& sizes) {
  launch(empty_kernel, 1, 1, sizes.threads, sizes.shared_bytes, nullptr, sizes);
}

#define EXPORTED(function) const emulation::Exported function##_("example_" #function, function)
EXPORTED(reverse);
EXPORTED(row_sums);
EXPORTED(product);
EXPORTED(doubling);
EXPORTED(doubling_there);
EXPORTED(query);
EXPORTED(swap);
EXPORTED(throwing);
EXPORTED(empty);

}  // namespace examples
