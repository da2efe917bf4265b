// Operators for torch, registered through the LibTorch stable ABI. Checks of tensors and
// registration, nothing else: the engine in cpu/ knows nothing of torch.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/machine.h"
#include "cpu/ukernels/kinds.h"
#include "profile.h"
#include "program.h"
#include "tensors.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace threshnet_fast {
namespace {

void check_float(const Tensor& tensor, const std::string& name) {
  check(tensor.is_cpu(), name + " is not on the CPU");
  check(tensor.scalar_type() == ScalarType::Float, name + " has the wrong dtype, expected float32");
  check_memory(tensor, name);
}

// Weights and workspace are read from end to end on every call: huge pages spare most of the
// address translations. A hint only, so a kernel that declines it costs nothing but speed.
void advise_huge_pages(const Tensor& tensor, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 4096;
  const uintptr_t start =
      (reinterpret_cast<uintptr_t>(tensor.data_ptr()) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(tensor.data_ptr()) + bytes) / kPage * kPage;
  if (end > start) madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);
#else
  (void)tensor;
  (void)bytes;
#endif
}

Tensor empty_floats(int64_t count) {
  Tensor result = torch::stable::empty({count}, ScalarType::Float);
  advise_huge_pages(result, count * static_cast<int64_t>(sizeof(float)));
  return result;
}

cpu::Program program_of(const Tensor& program) {
  check_host(program, "program", ScalarType::Byte, "uint8");
  return cpu::Program(program.data_ptr(), program.numel());
}

// Whether no element is an infinity or NaN: those have all bits of the exponent. Of a tensor whose
// storage was freed there is none; whoever is given it next says its name.
bool all_finite(const std::vector<Tensor>& tensors) {
  constexpr uint32_t kExponent = 0x7f800000;
  uint32_t found = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    check(tensors[i].is_cpu() && tensors[i].scalar_type() == ScalarType::Float,
          "tensors[" + std::to_string(i) + "] is not one of float32 on the CPU");
    if (!has_memory(tensors[i])) continue;
    const Tensor dense = torch::stable::contiguous(tensors[i]);
    const float* const data = static_cast<const float*>(dense.data_ptr());
    for (int64_t element = 0; element < dense.numel(); ++element) {
      uint32_t bits;
      std::memcpy(&bits, data + element, sizeof bits);
      found |= static_cast<uint32_t>((bits & kExponent) == kExponent);
    }
  }
  return found == 0;
}

int64_t best_isa() { return cpu::best_isa(); }

// Those that this processor has for a dtype, the best last.
Tensor isas(bool bfloat16) {
  const std::vector<int64_t> found =
      cpu::isas_of(bfloat16 ? cpu::DType::kBfloat16 : cpu::DType::kFloat32);
  Tensor codes = torch::stable::empty({static_cast<int64_t>(found.size())}, ScalarType::Long);
  std::copy(found.begin(), found.end(), static_cast<int64_t*>(codes.data_ptr()));
  return codes;
}

Tensor compile_plan(const Tensor& description, int64_t isa, int64_t threads, int64_t winograd) {
  check_host(description, "description", ScalarType::Long, "int64");
  const std::vector<std::byte> bytes =
      cpu::compile(static_cast<const int64_t*>(description.data_ptr()), description.numel(), isa,
                   threads, winograd);
  Tensor program = torch::stable::empty({static_cast<int64_t>(bytes.size())}, ScalarType::Byte);
  std::copy(bytes.begin(), bytes.end(), static_cast<std::byte*>(program.data_ptr()));
  return program;
}

int64_t program_layout(const Tensor& program) { return program_of(program).header().layout; }

Tensor program_algorithms(const Tensor& program) {
  const cpu::Program view = program_of(program);
  std::vector<int64_t> algorithms;
  for (int64_t i = 0; i < view.header().step_count; ++i) {
    const cpu::Step& step = view.step(i);
    if (cpu::is_planned(step)) algorithms.push_back(cpu::algorithm_of(step));
  }
  Tensor result = torch::stable::empty({static_cast<int64_t>(algorithms.size())}, ScalarType::Long);
  std::copy(algorithms.begin(), algorithms.end(), static_cast<int64_t*>(result.data_ptr()));
  return result;
}

Tensor pack_weights(const Tensor& program, const std::vector<Tensor>& weights) {
  const cpu::Program view = program_of(program);
  std::vector<cpu::Weight> list;
  for (size_t i = 0; i < weights.size(); ++i) {
    const std::string name = "weights[" + std::to_string(i) + "]";
    check_float(weights[i], name);
    check_dense(weights[i], name);
    list.push_back({static_cast<const float*>(weights[i].data_ptr()), weights[i].numel()});
  }
  Tensor packed = empty_floats(view.header().packed_floats);
  cpu::pack(view, list, static_cast<float*>(packed.data_ptr()), torch::stable::get_num_threads(),
            parallel_for);
  return packed;
}

Tensor create_workspace(const Tensor& program, int64_t threads) {
  return empty_floats(program_of(program).workspace_floats(threads));
}

// What every run of a program needs beside its maps.
void check_operands(const cpu::Program& program, const Tensor& packed, const Tensor& workspace,
                    int64_t threads) {
  check_float(packed, "packed");
  check_dense(packed, "packed");
  check(packed.numel() >= program.header().packed_floats, "packed does not belong to program");
  check_float(workspace, "workspace");
  check_dense(workspace, "workspace");
  check(workspace.numel() >= program.workspace_floats(threads),
        "workspace is too small for " + std::to_string(threads) + " threads");
  check(reinterpret_cast<uintptr_t>(workspace.data_ptr()) % 64 == 0,
        "workspace is not aligned to 64 bytes");
}

ScalarType dtype_of(const cpu::Program& program) {
  return cpu::kind_of(program.header().isa)->dtype == cpu::DType::kBfloat16 ? ScalarType::BFloat16
                                                                            : ScalarType::Float;
}

// An input of a program.
void check_map(const Tensor& x, const std::string& name, ScalarType dtype) {
  check(x.is_cpu(), name + " is not on the CPU");
  check(x.scalar_type() == dtype, name + " has the wrong dtype, expected " +
                                      (dtype == ScalarType::BFloat16 ? "bfloat16" : "float32"));
  check(x.dim() == 4,
        name + " has shape " + shape_of(x) + ", expected four dimensions [N, C, H, W]");
}

void check_shape(const Tensor& x, const std::string& name, int64_t channels, int64_t height,
                 int64_t width, int64_t batch) {
  check(x.size(1) == channels && x.size(2) == height && x.size(3) == width && x.size(0) >= batch,
        name + " has shape " + shape_of(x) + ", which is not what the program was compiled for");
}

Tensor empty_map(int64_t batch, int64_t channels, int64_t height, int64_t width, ScalarType dtype) {
  return torch::stable::empty({batch, channels, height, width}, dtype, std::nullopt, std::nullopt,
                              std::nullopt, MemoryFormat::ChannelsLast);
}

// Calls part(first image) for one part of a batch after another. The last part of one that is no
// multiple of the program's overlaps the part before it.
template <typename Part>
void for_parts(int64_t batch, int64_t at_once, const Part& part) {
  for (int64_t start = 0; start < batch; start += at_once) part(std::min(start, batch - at_once));
}

// Calls run(program, packed, workspace, binding, threads) for one part of the batch after another.
template <typename Run>
Tensor run_parts(const Tensor& x, const Tensor& program, const Tensor& packed,
                 const Tensor& workspace, const Run& run) {
  const cpu::Program view = program_of(program);
  const cpu::ProgramHeader& header = view.header();
  const ScalarType dtype = dtype_of(view);
  check_map(x, "x", dtype);
  check_shape(x, "x", header.input_channels, header.input_height, header.input_width, header.batch);
  check_memory(x, "x");
  check(header.external_count == 0, "program is one with external maps");
  const int64_t threads = torch::stable::get_num_threads();
  check_operands(view, packed, workspace, threads);

  const int64_t batch = x.size(0);
  Tensor output =
      empty_map(batch, header.output_channels, header.output_height, header.output_width, dtype);
  const int64_t image_elements =
      header.output_channels * header.output_height * header.output_width;
  for_parts(batch, header.batch, [&](int64_t first) {
    cpu::Binding binding;
    const int64_t bytes = cpu::element_bytes(header.isa);
    binding.input = {static_cast<const std::byte*>(x.data_ptr()) + first * x.stride(0) * bytes,
                     x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
    binding.output = static_cast<std::byte*>(output.data_ptr()) + first * image_elements * bytes;
    run(view, static_cast<const float*>(packed.data_ptr()),
        static_cast<float*>(workspace.data_ptr()), binding, threads);
  });
  return output;
}

// Whether a tensor's pixels lie so many elements apart, wherever it has several.
bool has_pitch(const Tensor& x, int64_t pitch) {
  int64_t stride = pitch;
  for (const int64_t dimension : {3, 2, 0}) {
    if (x.size(dimension) > 1 && x.stride(dimension) != stride) return false;
    stride *= x.size(dimension);
  }
  return x.size(1) == 1 || x.stride(1) == 1;
}

// The maps that a program of several inputs and outputs returns, [N, C, H, W] in channels_last.
// `xs` are the network's input, where it reads one in any strides, and the external inputs.
std::vector<Tensor> run_island(const std::vector<Tensor>& xs, const Tensor& program,
                               const Tensor& packed, Tensor workspace) {
  const cpu::Program view = program_of(program);
  const cpu::ProgramHeader& header = view.header();
  const ScalarType dtype = dtype_of(view);
  const int64_t bytes = cpu::element_bytes(header.isa);
  const int64_t images = static_cast<int64_t>(xs.size()) - header.input_count;
  check(!xs.empty() && (images == 1 || (images == 0 && !header.reads_network_input)),
        "xs has " + std::to_string(xs.size()) + " maps, which is not what the program reads");
  check(!header.writes_network_output, "program is one of a single output");
  // What a run reads or writes of a map, and the bytes from one image to the next.
  struct Map {
    std::byte* data;
    int64_t image_bytes;
  };
  std::vector<Map> maps;
  const int64_t batch = xs[0].dim() > 0 ? xs[0].size(0) : 0;
  for (size_t i = 0; i < xs.size(); ++i) {
    const Tensor& x = xs[i];
    const std::string name = "xs[" + std::to_string(i) + "]";
    check_map(x, name, dtype);
    const int64_t external = static_cast<int64_t>(i) - images;
    if (external < 0) {
      check_shape(x, name, header.input_channels, header.input_height, header.input_width,
                  header.batch);
    } else {
      const Buffer& buffer = view.external(external);
      check_shape(x, name, buffer.channels, buffer.height, buffer.width, header.batch);
      check(has_pitch(x, buffer.pitch),
            name + " is not in NHWC with pixels " + std::to_string(buffer.pitch) +
                " elements apart, which is what the program was compiled for");
    }
    check(x.size(0) == batch, name + " has " + std::to_string(x.size(0)) + " images, expected " +
                                  std::to_string(batch) + " as xs[0] has");
    check_memory(x, name);
    // The stride of a single image is any number.
    const int64_t stride =
        external < 0 ? x.stride(0) : x.size(2) * x.size(3) * view.external(external).pitch;
    maps.push_back({static_cast<std::byte*>(x.data_ptr()), stride * bytes});
  }
  const int64_t threads = torch::stable::get_num_threads();
  check_operands(view, packed, workspace, threads);

  std::vector<Tensor> outputs;
  for (int64_t i = header.input_count; i < header.external_count; ++i) {
    const Buffer& buffer = view.external(i);
    outputs.push_back(empty_map(batch, buffer.channels, buffer.height, buffer.width, dtype));
    advise_huge_pages(outputs.back(), outputs.back().numel() * bytes);
    maps.push_back({static_cast<std::byte*>(outputs.back().data_ptr()),
                    buffer.height * buffer.width * buffer.pitch * bytes});
  }
  cpu::Binding binding;
  binding.externals.resize(header.external_count);
  for_parts(batch, header.batch, [&](int64_t first) {
    const auto at = [&](const Map& map) { return map.data + first * map.image_bytes; };
    if (images == 1) {
      const Tensor& x = xs[0];
      binding.input = {at(maps[0]), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
    }
    for (int64_t i = 0; i < header.external_count; ++i) binding.externals[i] = at(maps[i + images]);
    cpu::run(view, static_cast<const float*>(packed.data_ptr()),
             static_cast<float*>(workspace.data_ptr()), binding, threads, parallel_for);
  });
  return outputs;
}

Tensor run_plan(const Tensor& x, const Tensor& program, const Tensor& packed, Tensor workspace) {
  return run_parts(
      x, program, packed, workspace,
      [](const cpu::Program& view, const float* weights, float* memory, const cpu::Binding& binding,
         int64_t threads) { cpu::run(view, weights, memory, binding, threads, parallel_for); });
}

// The output, and for each step of the description the nanoseconds of its parts, of all images.
std::tuple<Tensor, Tensor> profile_plan(const Tensor& x, const Tensor& program,
                                        const Tensor& packed, Tensor workspace) {
  std::vector<cpu::StepTime> sums;
  const auto run = [&](const cpu::Program& view, const float* weights, float* memory,
                       const cpu::Binding& binding, int64_t threads) {
    const std::vector<cpu::StepTime> times =
        cpu::profile(view, weights, memory, binding, threads, parallel_for);
    sums.resize(times.size());
    for (size_t i = 0; i < times.size(); ++i) {
      for (int64_t part = 0; part < cpu::kStepParts; ++part) sums[i][part] += times[i][part];
    }
  };
  Tensor output = run_parts(x, program, packed, workspace, run);
  Tensor times =
      torch::stable::empty({static_cast<int64_t>(sums.size()), cpu::kStepParts}, ScalarType::Long);
  int64_t* to = static_cast<int64_t*>(times.data_ptr());
  for (const cpu::StepTime& time : sums) to = std::copy(time.begin(), time.end(), to);
  return {output, times};
}

void check_threads(int64_t threads) {
  const int64_t most = torch::stable::get_num_threads();
  check(threads >= 1 && threads <= most, "threads is " + std::to_string(threads) +
                                             ", expected 1 to " + std::to_string(most) +
                                             ", the number of torch's threads");
}

double peak_flops(int64_t isa, int64_t threads) {
  check(cpu::tiling_of(isa) != nullptr,
        "isa is " + std::to_string(isa) + ", expected one that this processor has");
  check_threads(threads);
  return cpu::measure_peak(isa, threads, parallel_for);
}

double read_bandwidth(const Tensor& memory, int64_t threads) {
  check_float(memory, "memory");
  check_dense(memory, "memory");
  check(memory.numel() > 0, "memory is empty");
  check_threads(threads);
  return cpu::measure_bandwidth(static_cast<const float*>(memory.data_ptr()), memory.numel(),
                                threads, parallel_for);
}

// One fused convolution over segments, as a plan of a single step.
Tensor run_convolution(const std::vector<Tensor>& xs, const Tensor& weight,
                       const std::vector<cpu::Weight>& weights, bool has_prologue, bool relu,
                       int64_t stride, int64_t padding, int64_t isa) {
  check_convolution(xs, weight, stride, padding);
  check(cpu::element_bytes(isa) == sizeof(float),
        "isa is " + std::to_string(isa) + ", expected one that computes in float32");
  std::vector<Tensor> segments;
  for (size_t i = 0; i < xs.size(); ++i) {
    check_float(xs[i], "xs[" + std::to_string(i) + "]");
    Tensor segment = xs[i];
    // A slice of few pixels may lie further apart than a description can say.
    const int64_t pitch = pixel_pitch(segment);
    if (pitch == 0 || pitch > std::numeric_limits<int32_t>::max())
      segment = torch::stable::contiguous(segment, MemoryFormat::ChannelsLast);
    segments.push_back(segment);
  }
  const int64_t channels = weight.size(1);
  const int64_t batch = xs[0].size(0), height = xs[0].size(2), width = xs[0].size(3);
  const int64_t kernel_height = weight.size(2), kernel_width = weight.size(3);
  const int64_t output_height = output_extent(height, kernel_height, stride, padding);
  const int64_t output_width = output_extent(width, kernel_width, stride, padding);
  const int64_t output_channels = weight.size(0);
  const int64_t count = static_cast<int64_t>(segments.size());

  std::vector<int64_t> description = {kDescriptionMagic,
                                      kDescriptionVersion,
                                      batch,
                                      channels,
                                      height,
                                      width,
                                      output_channels,
                                      output_height,
                                      output_width,
                                      count,
                                      0,
                                      static_cast<int64_t>(weights.size()),
                                      0,
                                      count + 1,
                                      1};
  cpu::Binding binding;
  for (int64_t i = 0; i < count; ++i) {
    description.insert(description.end(), {height, width, segments[i].size(1),
                                           pixel_pitch(segments[i]), kFirstExternal - i});
    binding.externals.push_back(segments[i].data_ptr());
  }
  description.insert(description.end(), {output_height, output_width, output_channels,
                                         output_channels, kNetworkOutput});
  description.insert(description.end(),
                     {static_cast<int64_t>(PlanStepKind::kConvolution), 3 * count + 24, count});
  for (int64_t i = 0; i < count; ++i)
    description.insert(description.end(), {i, 0, segments[i].size(1)});
  description.insert(description.end(), {count, 0, output_channels, 1, 1, 0, 0});
  description.insert(description.end(),
                     {kernel_height, kernel_width, stride, stride, padding, padding, 1, 1, relu});
  description.insert(description.end(), {0, has_prologue ? -1 : 1});
  description.insert(description.end(), {has_prologue ? 1 : -1, has_prologue ? 2 : -1,
                                         has_prologue ? kRelu : kIdentity});

  const int64_t threads = torch::stable::get_num_threads();
  const std::vector<std::byte> bytes =
      cpu::compile(description.data(), static_cast<int64_t>(description.size()), isa, threads, 0);
  const cpu::Program program(bytes.data(), static_cast<int64_t>(bytes.size()));
  Tensor packed = torch::stable::empty({program.header().packed_floats}, ScalarType::Float);
  cpu::pack(program, weights, static_cast<float*>(packed.data_ptr()), threads, parallel_for);
  Tensor workspace = torch::stable::empty({program.workspace_floats(threads)}, ScalarType::Float);
  Tensor output =
      torch::stable::empty({batch, output_channels, output_height, output_width}, ScalarType::Float,
                           std::nullopt, std::nullopt, std::nullopt, MemoryFormat::ChannelsLast);
  binding.output = static_cast<float*>(output.data_ptr());
  cpu::run(program, static_cast<const float*>(packed.data_ptr()),
           static_cast<float*>(workspace.data_ptr()), binding, threads, parallel_for);
  return output;
}

Tensor checked_vector(const Tensor& tensor, const std::string& name, int64_t length) {
  check_float(tensor, name);
  check_length(tensor, name, length);
  return torch::stable::contiguous(tensor);
}

cpu::Weight weight_of(const Tensor& tensor) {
  return {static_cast<const float*>(tensor.data_ptr()), tensor.numel()};
}

Tensor cat_bn_relu_conv(const std::vector<Tensor>& xs, const Tensor& scale, const Tensor& shift,
                        const Tensor& weight, int64_t stride, int64_t padding, int64_t isa) {
  check_float(weight, "weight");
  check(weight.dim() == 4, "weight has shape " + shape_of(weight) + ", expected four dimensions");
  const Tensor dense = torch::stable::contiguous(weight);
  const Tensor dense_scale = checked_vector(scale, "scale", weight.size(1));
  const Tensor dense_shift = checked_vector(shift, "shift", weight.size(1));
  return run_convolution(xs, weight,
                         {weight_of(dense), weight_of(dense_scale), weight_of(dense_shift)}, true,
                         false, stride, padding, isa);
}

Tensor cat_conv_bn_relu(const std::vector<Tensor>& xs, const Tensor& weight, const Tensor& scale,
                        const Tensor& shift, int64_t stride, int64_t padding, bool relu,
                        int64_t isa) {
  check_float(weight, "weight");
  check(weight.dim() == 4, "weight has shape " + shape_of(weight) + ", expected four dimensions");
  const Tensor dense = torch::stable::contiguous(weight);
  const Tensor dense_scale = checked_vector(scale, "scale", weight.size(0));
  const Tensor dense_shift = checked_vector(shift, "shift", weight.size(0));
  std::vector<float> folded(dense.numel());
  const int64_t row = weight.size(0) > 0 ? dense.numel() / weight.size(0) : 0;
  const float* from = static_cast<const float*>(dense.data_ptr());
  const float* factor = static_cast<const float*>(dense_scale.data_ptr());
  for (int64_t channel = 0; channel < weight.size(0); ++channel) {
    for (int64_t i = channel * row; i < (channel + 1) * row; ++i)
      folded[i] = from[i] * factor[channel];
  }
  return run_convolution(xs, weight, {{folded.data(), dense.numel()}, weight_of(dense_shift)},
                         false, relu, stride, padding, isa);
}

}  // namespace
}  // namespace threshnet_fast

using namespace threshnet_fast;

STABLE_TORCH_LIBRARY_IMPL(threshnet_fast_cpu, CompositeExplicitAutograd, m) {
  m.impl("best_isa", TORCH_BOX(&best_isa));
  m.impl("isas", TORCH_BOX(&isas));
  m.impl("peak_flops", TORCH_BOX(&peak_flops));
}

STABLE_TORCH_LIBRARY_IMPL(threshnet_fast_cpu, CPU, m) {
  m.impl("all_finite", TORCH_BOX(&all_finite));
  m.impl("compile_plan", TORCH_BOX(&compile_plan));
  m.impl("program_layout", TORCH_BOX(&program_layout));
  m.impl("program_algorithms", TORCH_BOX(&program_algorithms));
  m.impl("pack_weights", TORCH_BOX(&pack_weights));
  m.impl("create_workspace", TORCH_BOX(&create_workspace));
  m.impl("run_plan", TORCH_BOX(&run_plan));
  m.impl("run_island", TORCH_BOX(&run_island));
  m.impl("profile_plan", TORCH_BOX(&profile_plan));
  m.impl("read_bandwidth", TORCH_BOX(&read_bandwidth));
  m.impl("cat_bn_relu_conv", TORCH_BOX(&cat_bn_relu_conv));
  m.impl("cat_conv_bn_relu", TORCH_BOX(&cat_conv_bn_relu));
}
