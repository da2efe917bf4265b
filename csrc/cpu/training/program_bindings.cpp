// The operators of whole passes of training for torch: a raw plan is compiled, and then run in one
// call forward and one back. Checks of tensors and registration, nothing else.
//
// Parameters are the weights of the convolutions in the order of the nodes, then gamma and beta of
// each norm; running statistics are mean, variance and number of batches of each norm. A tensor
// without elements stands for none; one of which the storage was freed does not. `settings` is
// float64 [norms, 3]: whether the batch's statistics are taken, eps, and by how much the running
// statistics follow the batch's (NaN: not at all).
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "checks.h"
#include "program.h"

namespace threshnet_fast {
namespace {

cpu::TrainingProgram program_of(const Tensor& program) {
  check_host(program, "program", ScalarType::Byte, "uint8");
  return cpu::TrainingProgram(program.data_ptr(), program.numel());
}

Tensor training_compile(const Tensor& description, int64_t batch, int64_t height, int64_t width,
                        bool backward, bool checkpoint, bool repeatable, bool input_gradient,
                        int64_t threads, int64_t winograd, int64_t isa) {
  check_host(description, "description", ScalarType::Long, "int64");
  workers_of(isa);
  const std::vector<std::byte> bytes = cpu::compile_training(
      static_cast<const int64_t*>(description.data_ptr()), description.numel(),
      {batch, height, width, winograd_of(winograd), threads, isa, backward, checkpoint, repeatable,
       input_gradient});
  Tensor program = torch::stable::empty({static_cast<int64_t>(bytes.size())}, ScalarType::Byte);
  std::copy(bytes.begin(), bytes.end(), static_cast<std::byte*>(program.data_ptr()));
  return program;
}

// Floats of kept memory, scratch memory and workspace; where the input's statistics are in the kept
// memory, and each norm's own; for tests, of each buffer where its map and gradient are: 0 to 6, in
// the order of Memory, and an offset.
Tensor training_layout(const Tensor& program) {
  const cpu::TrainingProgram view = program_of(program);
  const cpu::TrainingHeader& header = view.header();
  std::vector<int64_t> numbers = {header.kept_floats, header.scratch_floats,
                                  header.workspace_floats, view.buffer(0).statistics};
  for (int64_t i = 0; i < header.norm_count; ++i) numbers.push_back(view.norm(i).fixed);
  for (int64_t i = 0; i < header.buffer_count; ++i) {
    const cpu::TrainingBuffer& buffer = view.buffer(i);
    for (const cpu::Place* place : {&buffer.map, &buffer.map_back, &buffer.gradient}) {
      numbers.push_back(static_cast<int64_t>(place->memory));
      numbers.push_back(place->offset);
    }
  }
  Tensor result = torch::stable::empty({static_cast<int64_t>(numbers.size())}, ScalarType::Long);
  std::copy(numbers.begin(), numbers.end(), static_cast<int64_t*>(result.data_ptr()));
  return result;
}

std::string numbered(const char* name, int64_t index) {
  return std::string(name) + "[" + std::to_string(index) + "]";
}

float* memory_of(const Tensor& tensor, const char* name, int64_t floats) {
  if (floats == 0) return nullptr;
  check(tensor.dim() == 1 && tensor.numel() >= floats, std::string(name) + " has shape " +
                                                           shape_of(tensor) + ", expected [" +
                                                           std::to_string(floats) + "] or more");
  return floats_of(tensor, name);
}

// The tensors that both passes are given.
cpu::TrainingPass pass_of(const cpu::TrainingProgram& program, const Tensor& x,
                          const Tensor& output, const std::vector<Tensor>& parameters,
                          const Tensor& settings, const Tensor& kept, const Tensor& workspace) {
  const cpu::TrainingHeader& header = program.header();
  cpu::TrainingPass pass = {};
  check(static_cast<int64_t>(parameters.size()) == header.parameter_count,
        "parameters has " + std::to_string(parameters.size()) + " tensors, expected " +
            std::to_string(header.parameter_count));
  check(settings.dim() == 2 && settings.size(0) == header.norm_count && settings.size(1) == 3,
        "settings has shape " + shape_of(settings) + ", expected [" +
            std::to_string(header.norm_count) + ", 3]");
  check_host(settings, "settings", ScalarType::Double, "float64");
  for (int64_t i = 0; i < header.node_count; ++i) {
    const cpu::TrainingNode& node = program.node(i);
    if (node.weight < 0) continue;
    const Tensor& weight = parameters[node.weight];
    const std::string name = numbered("parameters", node.weight);
    const bool depthwise = node.kind == cpu::RawKind::kDepthwise;
    const cpu::WeightStrides strides =
        check_weight(weight, name, node.window, depthwise ? 1 : node.input_channels);
    check(weight.size(0) == node.channels, name + " has shape " + shape_of(weight) + ", expected " +
                                               std::to_string(node.channels) + " output channels");
    pass.weights.push_back({static_cast<const float*>(weight.data_ptr()), strides, nullptr, {}});
  }
  const double* setting = static_cast<const double*>(settings.data_ptr());
  for (int64_t i = 0; i < header.norm_count; ++i, setting += 3) {
    const int64_t channels = program.norm(i).channels;
    const int64_t index = header.weight_count + 2 * i;
    cpu::TrainingNormParameters norm = {};
    norm.gamma = vector_or_null(parameters[index], numbered("parameters", index), channels);
    norm.beta = vector_or_null(parameters[index + 1], numbered("parameters", index + 1), channels);
    norm.from_batch = setting[0] != 0;
    norm.eps = setting[1];
    norm.momentum = setting[2];
    pass.norms.push_back(norm);
  }
  const cpu::TrainingBuffer& in = program.buffer(0);
  const cpu::TrainingBuffer& out = program.buffer(header.output);
  pass.input = floats_of(x, "x", in.pixels, in.channels);
  pass.output = floats_of(output, "output", out.pixels, out.channels);
  pass.kept = memory_of(kept, "kept", header.kept_floats);
  pass.workspace = workspace_of(workspace, header.workspace_floats);
  return pass;
}

// A vector in any strides, or null for none.
cpu::RunningVector running_vector(const Tensor& tensor, const std::string& name, int64_t channels) {
  if (tensor.numel() == 0) return {nullptr, 0};
  check(tensor.is_cpu() && tensor.scalar_type() == ScalarType::Float,
        name + " is not one of float32 on the CPU");
  check_length(tensor, name, channels);
  check_memory(tensor, name);
  return {static_cast<float*>(tensor.data_ptr()), tensor.stride(0)};
}

// Adds one to the number of batches of each norm whose statistics follow the batch's.
void count_batches(const std::vector<Tensor>& running) {
  for (size_t i = 2; i < running.size(); i += 3) {
    if (running[i].numel() > 0) ++*static_cast<int64_t*>(running[i].data_ptr());
  }
}

void training_forward(const Tensor& program, const Tensor& x, const std::vector<Tensor>& parameters,
                      const std::vector<Tensor>& running, const Tensor& settings, Tensor kept,
                      Tensor output, Tensor workspace) {
  const cpu::TrainingProgram view = program_of(program);
  cpu::TrainingPass pass = pass_of(view, x, output, parameters, settings, kept, workspace);
  check(running.size() == 3 * pass.norms.size(), "running has " + std::to_string(running.size()) +
                                                     " tensors, expected " +
                                                     std::to_string(3 * pass.norms.size()));
  for (size_t i = 0; i < pass.norms.size(); ++i) {
    cpu::TrainingNormParameters& norm = pass.norms[i];
    const int64_t first = static_cast<int64_t>(3 * i);
    const int64_t channels = view.norm(static_cast<int64_t>(i)).channels;
    norm.running_mean = running_vector(running[first], numbered("running", first), channels);
    norm.running_variance =
        running_vector(running[first + 1], numbered("running", first + 1), channels);
    check((norm.running_mean.data == nullptr) == (norm.running_variance.data == nullptr) &&
              (norm.from_batch || norm.running_mean.data != nullptr),
          numbered("running", first) + " is empty, expected [" + std::to_string(channels) + "]");
    const Tensor& count = running[first + 2];
    if (count.numel() == 0) continue;
    check(count.numel() == 1, numbered("running", first + 2) + " has shape " + shape_of(count) +
                                  ", expected one element");
    check_host(count, numbered("running", first + 2), ScalarType::Long, "int64");
  }
  cpu::run_forward(view, pass, parallel_for);
  count_batches(running);
}

// A tensor for the gradient of a parameter, of its strides where those leave no gaps.
Tensor gradient_of(const Tensor& parameter) {
  if (!parameter.is_contiguous()) return torch::stable::empty_like(parameter);
  std::vector<int64_t> sizes, strides;
  for (int64_t i = 0; i < parameter.dim(); ++i) {
    sizes.push_back(parameter.size(i));
    strides.push_back(parameter.stride(i));
  }
  AtenTensorHandle handle = nullptr;
  check_code(aoti_torch_empty_strided(parameter.dim(), sizes.data(), strides.data(),
                                      aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), 0,
                                      &handle),
             "aoti_torch_empty_strided");
  return Tensor(handle);
}

// Of a repeatable program `scratch` is memory of its own, else what follows in `kept`, which is
// written to. Returns the gradients of the parameters that `needs` marks, and, last, of x where the
// program has it.
std::vector<Tensor> training_backward(const Tensor& program, const Tensor& x, const Tensor& output,
                                      Tensor gradient, const std::vector<Tensor>& parameters,
                                      const Tensor& settings, const Tensor& needs, Tensor kept,
                                      Tensor scratch, Tensor workspace) {
  const cpu::TrainingProgram view = program_of(program);
  const cpu::TrainingHeader& header = view.header();
  check(header.backward != 0, "program is one of a pass forward alone");
  cpu::TrainingPass pass = pass_of(view, x, output, parameters, settings, kept, workspace);
  const cpu::TrainingBuffer& out = view.buffer(header.output);
  pass.gradient = floats_of(gradient, "gradient", out.pixels, out.channels);
  if (header.repeatable) {
    pass.scratch = memory_of(scratch, "scratch", header.scratch_floats);
  } else {
    memory_of(kept, "kept", header.kept_floats + header.scratch_floats);
    pass.scratch = pass.kept + header.kept_floats;
  }
  check_length(needs, "needs", header.parameter_count);
  check_host(needs, "needs", ScalarType::Bool, "bool");
  const bool* const needed = static_cast<const bool*>(needs.data_ptr());
  std::vector<Tensor> gradients;
  const auto wanted = [&](int64_t index) {
    if (!needed[index]) return static_cast<float*>(nullptr);
    check(parameters[index].numel() > 0, numbered("parameters", index) + " is empty");
    gradients.push_back(gradient_of(parameters[index]));
    return static_cast<float*>(gradients.back().data_ptr());
  };
  for (int64_t i = 0; i < header.weight_count; ++i) {
    pass.weights[i].gradient = wanted(i);
    if (pass.weights[i].gradient == nullptr) continue;
    const Tensor& to = gradients.back();
    pass.weights[i].gradient_strides = {to.stride(0), to.stride(1), to.stride(2), to.stride(3)};
  }
  for (int64_t i = 0; i < header.norm_count; ++i) {
    pass.norms[i].gamma_gradient = wanted(header.weight_count + 2 * i);
    pass.norms[i].beta_gradient = wanted(header.weight_count + 2 * i + 1);
  }
  if (header.input_gradient) {
    gradients.push_back(torch::stable::empty({x.size(0), x.size(1)}, ScalarType::Float));
    pass.input_gradient = static_cast<float*>(gradients.back().data_ptr());
  }
  cpu::run_backward(view, pass, parallel_for);
  return gradients;
}

}  // namespace
}  // namespace threshnet_fast

using namespace threshnet_fast;

STABLE_TORCH_LIBRARY_IMPL(threshnet_fast_cpu, CPU, m) {
  m.impl("training_compile", TORCH_BOX(&training_compile));
  m.impl("training_layout", TORCH_BOX(&training_layout));
  m.impl("training_forward", TORCH_BOX(&training_forward));
  m.impl("training_backward", TORCH_BOX(&training_backward));
}
