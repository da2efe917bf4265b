// The schemas of all operators; the bindings of csrc/cpu and csrc/cuda implement them.
#include "tensors.h"

STABLE_TORCH_LIBRARY(threshnet_fast_cpu, m) {
  m.def("best_isa() -> int");
  m.def("isas(bool bfloat16) -> Tensor");
  m.def("all_finite(Tensor[] tensors) -> bool");
  m.def("compile_plan(Tensor description, int isa, int threads, int winograd) -> Tensor");
  m.def("program_layout(Tensor program) -> int");
  m.def("program_algorithms(Tensor program) -> Tensor");
  m.def("pack_weights(Tensor program, Tensor[] weights) -> Tensor");
  m.def("create_workspace(Tensor program, int threads) -> Tensor");
  m.def("run_plan(Tensor x, Tensor program, Tensor packed, Tensor(a!) workspace) -> Tensor");
  m.def("run_island(Tensor[] xs, Tensor program, Tensor packed, Tensor(a!) workspace) -> Tensor[]");
  m.def(
      "profile_plan(Tensor x, Tensor program, Tensor packed, Tensor(a!) workspace) "
      "-> (Tensor, Tensor)");
  m.def("peak_flops(int isa, int threads) -> float");
  m.def("read_bandwidth(Tensor memory, int threads) -> float");
  m.def(
      "cat_bn_relu_conv(Tensor[] xs, Tensor scale, Tensor shift, Tensor weight, int stride, "
      "int padding, int isa) -> Tensor");
  m.def(
      "cat_conv_bn_relu(Tensor[] xs, Tensor weight, Tensor scale, Tensor shift, int stride, "
      "int padding, bool relu, int isa) -> Tensor");

  m.def(
      "training_compile(Tensor description, int batch, int height, int width, bool backward, "
      "bool checkpoint, bool repeatable, bool input_gradient, int threads, int winograd, int isa) "
      "-> Tensor");
  m.def("training_layout(Tensor program) -> Tensor");
  m.def(
      "training_forward(Tensor program, Tensor x, Tensor[] parameters, Tensor(a!)[] running, "
      "Tensor settings, Tensor(b!) kept, Tensor(c!) output, Tensor(d!) workspace) -> ()");
  m.def(
      "training_backward(Tensor program, Tensor x, Tensor output, Tensor(a!) gradient, "
      "Tensor[] parameters, Tensor settings, Tensor needs, Tensor(b!) kept, Tensor(c!) scratch, "
      "Tensor(d!) workspace) -> Tensor[]");
  m.def(
      "training_convolution_forward(Tensor[] maps, int[] segments, Tensor prologue, "
      "int activation, Tensor weight, int[] window, Tensor(a!) output, int output_channel, "
      "Tensor(b!) statistics, Tensor(c!) workspace, int winograd, int isa) -> ()");
  m.def(
      "training_convolution_backward(Tensor[] maps, int[] segments, Tensor prologue, "
      "int activation, Tensor weight, int[] window, Tensor output, Tensor gradient, "
      "int output_channel, Tensor correction, Tensor(a!)[] input_gradients, int[] accumulate, "
      "Tensor(b!) sums, Tensor(c!) weight_gradient, Tensor(d!) workspace, int winograd, "
      "int isa) -> ()");
  m.def(
      "training_convolution_workspace(int[] window, int input_channels, int output_channels, "
      "bool input_gradients, int winograd, int isa) -> int");
  m.def(
      "training_depthwise_forward(Tensor map, int[] segment, Tensor prologue, int activation, "
      "Tensor weight, int[] window, Tensor(a!) output, int output_channel, "
      "Tensor(b!) statistics, Tensor(c!) workspace, int isa) -> ()");
  m.def(
      "training_depthwise_backward(Tensor map, int[] segment, Tensor prologue, int activation, "
      "Tensor weight, int[] window, Tensor output, Tensor gradient, int output_channel, "
      "Tensor correction, Tensor(a!) input_gradient, int accumulate, Tensor(b!) sums, "
      "Tensor(c!) weight_gradient, Tensor(d!) workspace, int isa) -> ()");
  m.def("training_depthwise_workspace(int[] window, int channels, int isa) -> int");
  m.def(
      "training_pool_forward(Tensor map, int[] segment, Tensor prologue, int activation, "
      "int[] window, Tensor(a!) output, int output_channel, Tensor(b!) statistics, "
      "Tensor(c!) workspace, int isa) -> ()");
  m.def(
      "training_pool_backward(Tensor map, int[] segment, Tensor prologue, "
      "int activation, int[] window, Tensor output, Tensor gradient, int output_channel, "
      "Tensor correction, Tensor(a!) input_gradient, int accumulate, Tensor(b!) sums, "
      "Tensor(c!) workspace, int isa) -> ()");
  m.def("training_pool_workspace(int[] window, int channels, int isa) -> int");
  m.def(
      "normalization_prologue(Tensor statistics, int first, int channels, Tensor gamma, "
      "Tensor beta, float eps, Tensor(a!) prologue, int to) -> ()");
  m.def(
      "normalization_backward(Tensor statistics, int first, int channels, Tensor gamma, "
      "float eps, Tensor sums, int start, int count, Tensor(a!) gamma_gradient, "
      "Tensor(b!) beta_gradient, Tensor(c!) correction) -> ()");
}

// Implemented by the library of csrc/cuda, which is loaded only where CUDA is.
STABLE_TORCH_LIBRARY(threshnet_fast_cuda, m) {
  m.def(
      "compile_plan(Tensor description, int dtype, int architecture, int multiprocessors, "
      "int shared_bytes) -> Tensor");
  m.def("program_algorithms(Tensor program) -> Tensor");
  m.def("workspace_bytes(Tensor program) -> int");
  m.def("packed_bytes(Tensor program) -> int");
  m.def("pack_weights(Tensor program, Tensor[] weights) -> Tensor");
  m.def("run_plan(Tensor x, Tensor program, Tensor packed, Tensor(a!) workspace) -> Tensor");
  m.def(
      "cat_bn_relu_conv(Tensor[] xs, Tensor scale, Tensor shift, Tensor weight, int stride, "
      "int padding) -> Tensor");
  m.def(
      "cat_conv_bn_relu(Tensor[] xs, Tensor weight, Tensor scale, Tensor shift, int stride, "
      "int padding, bool relu) -> Tensor");
}
