// What the bindings of all engines ask of torch's tensors, through the stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <sstream>
#include <string>
#include <vector>

namespace threshnet_fast {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Torch's own threads, as the engines on the CPU ask for them.
inline void parallel_for(int64_t count, void (*body)(void*, int64_t, int64_t), void* context) {
  torch::stable::parallel_for(0, count, 1,
                              [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

inline std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i > 0 ? ", " : "") << tensor.size(i);
  text << "]";
  return text.str();
}

inline void check(bool condition, const std::string& message) {
  STD_TORCH_CHECK(condition, "threshnet_fast: " + message);
}

// What a function of torch's C interface returned. Torch's own macro for it has another name before
// version 2.13.
inline void check_code(AOTITorchError code, const char* function) {
  check(code == 0, std::string(function) + " of torch failed");
}

inline int64_t storage_bytes(const Tensor& tensor) {
  int64_t bytes = 0;
  check_code(aoti_torch_get_storage_size(tensor.get(), &bytes), "aoti_torch_get_storage_size");
  return bytes;
}

// Whether the elements of a tensor are there. Sizes and strides outlive a storage that was freed or
// shrunk, as those that share parameters between processes or move them elsewhere do.
inline bool has_memory(const Tensor& tensor) {
  if (tensor.numel() == 0) return true;
  int64_t last = tensor.storage_offset();
  for (int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
  return tensor.data_ptr() != nullptr &&
         last < storage_bytes(tensor) / static_cast<int64_t>(tensor.element_size());
}

// Every tensor whose memory an operator reads or writes is checked, on the CPU or not.
inline void check_memory(const Tensor& tensor, const std::string& name) {
  if (has_memory(tensor)) return;
  check(false, name + " has " + std::to_string(tensor.numel()) + " elements, but its storage of " +
                   std::to_string(storage_bytes(tensor)) +
                   " bytes does not hold them: it was freed or resized");
}

inline void check_dense(const Tensor& tensor, const std::string& name) {
  check(tensor.is_contiguous(), name + " is not contiguous");
}

// A tensor of plain data in the CPU's memory, such as a program or a description.
inline void check_host(const Tensor& tensor, const std::string& name, ScalarType dtype,
                       const char* dtype_name) {
  check(tensor.is_cpu(), name + " is not on the CPU");
  check(tensor.scalar_type() == dtype, name + " has the wrong dtype, expected " + dtype_name);
  check_dense(tensor, name);
  check_memory(tensor, name);
}

// The elements between neighbouring pixels of an NHWC map, or 0 where the tensor is not one.
inline int64_t pixel_pitch(const Tensor& x) {
  if (x.size(1) > 1 && x.stride(1) != 1) return 0;
  int64_t pitch = 0;
  int64_t pixels = 1;
  for (const int64_t dimension : {3, 2, 0}) {
    if (x.size(dimension) == 1) continue;
    if (pitch == 0) pitch = x.stride(dimension);
    // A pitch of 0 is an expanded dimension: its pixels share their memory.
    if (pitch == 0 || x.stride(dimension) != pitch * pixels) return 0;
    pixels *= x.size(dimension);
  }
  if (pitch == 0) pitch = x.size(1);
  return pitch >= x.size(1) ? pitch : 0;
}

// The size of an output along one direction.
inline int64_t output_extent(int64_t input, int64_t kernel, int64_t stride, int64_t padding) {
  return (input + 2 * padding - kernel) / stride + 1;
}

// Checks the segments and the weight of a fused convolution: shapes that fit each other, a window
// that fits the maps. Dtypes and devices are the engine's own business.
inline void check_convolution(const std::vector<Tensor>& xs, const Tensor& weight, int64_t stride,
                              int64_t padding) {
  constexpr int64_t kLimit = int64_t{1} << 31;
  check(!xs.empty(), "xs is empty, expected at least one segment");
  check(weight.dim() == 4, "weight has shape " + shape_of(weight) + ", expected four dimensions");
  check(stride >= 1 && stride < kLimit && padding >= 0 && padding < kLimit,
        "stride or padding is out of range");
  int64_t channels = 0;
  for (size_t i = 0; i < xs.size(); ++i) {
    const std::string name = "xs[" + std::to_string(i) + "]";
    check(xs[i].dim() == 4, name + " has shape " + shape_of(xs[i]) + ", expected four dimensions");
    check(xs[i].numel() > 0, name + " is empty");
    check_memory(xs[i], name);
    check(xs[i].size(0) == xs[0].size(0) && xs[i].size(2) == xs[0].size(2) &&
              xs[i].size(3) == xs[0].size(3),
          name + " has shape " + shape_of(xs[i]) + ", which does not match xs[0]'s " +
              shape_of(xs[0]));
    channels += xs[i].size(1);
  }
  check(weight.size(1) == channels && weight.numel() > 0,
        "weight has shape " + shape_of(weight) + ", expected [Co, " + std::to_string(channels) +
            ", kh, kw]");
  check_memory(weight, "weight");
  check(xs[0].size(2) + 2 * padding >= weight.size(2) &&
            xs[0].size(3) + 2 * padding >= weight.size(3),
        "weight has shape " + shape_of(weight) + ", larger than the padded input");
}

inline void check_length(const Tensor& tensor, const std::string& name, int64_t length) {
  check(tensor.dim() == 1 && tensor.size(0) == length,
        name + " has shape " + shape_of(tensor) + ", expected [" + std::to_string(length) + "]");
}

}  // namespace threshnet_fast
