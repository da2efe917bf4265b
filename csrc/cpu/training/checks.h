// What the operators of training ask of tensors.
#pragma once

#include <cstdint>
#include <string>

#include "steps.h"
#include "tensors.h"

namespace threshnet_fast {

inline float* floats_of(const Tensor& tensor, const std::string& name) {
  check_host(tensor, name, ScalarType::Float, "float32");
  return static_cast<float*>(tensor.data_ptr());
}

// Floats of a tensor of a given shape, or null for none.
inline float* floats_or_null(const Tensor& tensor, const std::string& name, int64_t rows,
                             int64_t columns) {
  if (tensor.numel() == 0) return nullptr;
  check(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns,
        name + " has shape " + shape_of(tensor) + ", expected [" + std::to_string(rows) + ", " +
            std::to_string(columns) + "]");
  return floats_of(tensor, name);
}

inline float* floats_of(const Tensor& tensor, const std::string& name, int64_t rows,
                        int64_t columns) {
  float* const data = floats_or_null(tensor, name, rows, columns);
  check(data != nullptr, name + " is empty");
  return data;
}

inline cpu::Workers workers_of(int64_t isa) {
  check(cpu::tiling_of(isa) != nullptr && cpu::element_bytes(isa) == sizeof(float),
        "isa is " + std::to_string(isa) +
            ", expected one that this processor has and that computes in float32");
  return {isa, torch::stable::get_num_threads(), parallel_for};
}

inline int64_t winograd_of(int64_t winograd) {
  check(winograd == -1 || winograd == 0 || winograd == 2 || winograd == 4,
        "winograd is " + std::to_string(winograd) + ", expected -1, 0, 2 or 4");
  return winograd;
}

// What workspaces are calculated from: more channels than any weight in memory, of few enough
// products that those fit in 64 bits. A weight may have strides of 0.
inline void check_channels(int64_t inputs, int64_t outputs) {
  constexpr int64_t kMostPairs = int64_t{1} << 40;
  check(inputs >= 1 && outputs >= 1 && inputs <= kMostPairs / outputs,
        std::to_string(inputs) + " input channels and " + std::to_string(outputs) +
            " output channels, expected at least one of each and at most 2^40 pairs");
}

inline cpu::WeightStrides check_weight(const Tensor& weight, const std::string& name,
                                       const cpu::Window& window, int64_t channels) {
  check(weight.is_cpu(), name + " is not on the CPU");
  check(weight.scalar_type() == ScalarType::Float, name + " has the wrong dtype, expected float32");
  check(weight.dim() == 4 && weight.size(0) >= 1 && weight.size(1) == channels &&
            weight.size(2) == window.kernel_height && weight.size(3) == window.kernel_width,
        name + " has shape " + shape_of(weight) + ", expected [Co, " + std::to_string(channels) +
            ", " + std::to_string(window.kernel_height) + ", " +
            std::to_string(window.kernel_width) + "]");
  check_channels(channels, weight.size(0));
  check_memory(weight, name);
  return {weight.stride(0), weight.stride(1), weight.stride(2), weight.stride(3)};
}

// A weight of a depthwise convolution.
inline cpu::WeightStrides check_depthwise_weight(const Tensor& weight, const std::string& name,
                                                 const cpu::Window& window, int64_t channels) {
  const cpu::WeightStrides strides = check_weight(weight, name, window, 1);
  check(weight.size(0) == channels, name + " has shape " + shape_of(weight) + ", expected [" +
                                        std::to_string(channels) + ", 1, kh, kw]");
  return strides;
}

// A vector of channels, or null for none.
inline float* vector_or_null(const Tensor& tensor, const std::string& name, int64_t channels) {
  if (tensor.numel() == 0) return nullptr;
  check_length(tensor, name, channels);
  return floats_of(tensor, name);
}

inline float* workspace_of(const Tensor& workspace, int64_t floats) {
  float* const memory = floats_of(workspace, "workspace");
  check(workspace.numel() >= floats, "workspace has " + std::to_string(workspace.numel()) +
                                         " floats, expected " + std::to_string(floats));
  check(reinterpret_cast<uintptr_t>(memory) % 64 == 0, "workspace is not aligned to 64 bytes");
  return memory;
}

}  // namespace threshnet_fast
