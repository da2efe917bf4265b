// The CUDA kernels as operators for torch, registered through the LibTorch stable ABI for the
// schemas of csrc/schemas.cpp. Checks of tensors and registration, nothing else.
#include <algorithm>
#include <limits>

#include "device.h"
#include "program.h"
#include "tensors.h"

#if !defined(THRESHNET_FAST_EMULATION)
#include <dlfcn.h>
#endif

namespace threshnet_fast::cuda {
namespace {

#if defined(THRESHNET_FAST_EMULATION)

// The emulated device computes on the CPU's memory, in order.
class Context {
 public:
  explicit Context(const Tensor& tensor) { check(tensor.is_cpu(), "a tensor is not on the CPU"); }
  Stream stream() const { return nullptr; }
  Device properties() const { return properties_of(0); }
};

#else

// torch's current stream on a device. Looked up when it is needed, so that this library also loads
// beside a torch that knows no CUDA; and in the library that has it, as Python loads torch's
// libraries for themselves alone.
Stream current_stream(int32_t device) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const auto function = [] {
    void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Function>(
        dlsym(library != nullptr ? library : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
  }();
  check(function != nullptr, "this torch is built without CUDA");
  void* stream = nullptr;
  check_code(function(device, &stream), "aoti_torch_get_current_cuda_stream");
  return stream;
}

// The device of a tensor, current for the length of a call, and torch's current stream there.
class Context {
 public:
  explicit Context(const Tensor& tensor)
      : index_(tensor.get_device_index()), guard_(index_), stream_(current_stream(index_)) {}
  Stream stream() const { return stream_; }
  Device properties() const { return properties_of(index_); }

 private:
  int32_t index_;
  DeviceGuard guard_;
  Stream stream_;
};

#endif

DType dtype_of(const Tensor& tensor, const std::string& name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      check(false, name + " has the wrong dtype, expected float32, float16 or bfloat16");
      return DType::kFloat32;
  }
}

void check_same_device(const Tensor& tensor, const Tensor& as, const std::string& name) {
  check(tensor.device() == as.device(), name + " is on another device than the input");
}

int32_t narrow(int64_t value, const char* name) {
  check(value <= std::numeric_limits<int32_t>::max(),
        std::string(name) + " is " + std::to_string(value) + ", expected less than 2^31");
  return static_cast<int32_t>(value);
}

Tensor empty_bytes(int64_t bytes, const Tensor& on) {
  return torch::stable::empty({bytes}, ScalarType::Byte, std::nullopt, on.device());
}

Program program_of(const Tensor& program) {
  check_host(program, "program", ScalarType::Byte, "uint8");
  return Program(program.data_ptr(), program.numel());
}

Tensor compile_plan(const Tensor& description, int64_t dtype, int64_t architecture,
                    int64_t multiprocessors, int64_t shared_bytes) {
  check_host(description, "description", ScalarType::Long, "int64");
  check(dtype >= 0 && dtype <= 2, "dtype is " + std::to_string(dtype) +
                                      ", expected 0 (float32), 1 (float16) or 2 (bfloat16)");
  const Device device{narrow(architecture, "architecture"),
                      narrow(multiprocessors, "multiprocessors"),
                      narrow(shared_bytes, "shared_bytes")};
  const std::vector<std::byte> bytes =
      compile(static_cast<const int64_t*>(description.data_ptr()), description.numel(),
              static_cast<DType>(dtype), device);
  Tensor program = torch::stable::empty({static_cast<int64_t>(bytes.size())}, ScalarType::Byte);
  std::copy(bytes.begin(), bytes.end(), static_cast<std::byte*>(program.data_ptr()));
  return program;
}

Tensor program_algorithms(const Tensor& program) {
  const std::vector<Algorithm> algorithms = algorithms_of(program_of(program));
  Tensor result =
      torch::stable::empty({static_cast<int64_t>(algorithms.size()), 5}, ScalarType::Long);
  int64_t* row = static_cast<int64_t*>(result.data_ptr());
  for (const Algorithm& a : algorithms) {
    const int64_t entries[] = {static_cast<int64_t>(a.kind), a.pixels, a.columns, a.depth, a.parts};
    row = std::copy(std::begin(entries), std::end(entries), row);
  }
  return result;
}

int64_t workspace_bytes(const Tensor& program) { return program_of(program).workspace_bytes(); }

int64_t packed_bytes(const Tensor& program) { return program_of(program).header().packed_bytes; }

Tensor pack_weights(const Tensor& program, const std::vector<Tensor>& weights) {
  const Program view = program_of(program);
  check(!weights.empty(), "weights is empty");
  std::vector<Weight> list;
  for (size_t i = 0; i < weights.size(); ++i) {
    const std::string name = "weights[" + std::to_string(i) + "]";
    check_same_device(weights[i], weights[0], name);
    check_dense(weights[i], name);
    check_memory(weights[i], name);
    list.push_back({weights[i].data_ptr(), weights[i].numel(), dtype_of(weights[i], name)});
  }
  const Context context(weights[0]);
  Tensor packed = empty_bytes(view.header().packed_bytes, weights[0]);
  pack(view, list, packed.data_ptr(), context.stream());
  return packed;
}

Tensor run_plan(const Tensor& x, const Tensor& program, const Tensor& packed, Tensor workspace) {
  const Program view = program_of(program);
  const ProgramHeader& header = view.header();
  check(dtype_of(x, "x") == view.dtype(), "x has another dtype than the program");
  check(x.dim() == 4, "x has shape " + shape_of(x) + ", expected four dimensions [N, C, H, W]");
  check(x.size(0) == header.batch && x.size(1) == header.input_channels &&
            x.size(2) == header.input_height && x.size(3) == header.input_width,
        "x has shape " + shape_of(x) + ", which is not what the program was compiled for");
  check_memory(x, "x");
  const std::pair<const Tensor*, const char*> memory[] = {{&packed, "packed"},
                                                          {&workspace, "workspace"}};
  for (const auto& [tensor, name] : memory) {
    check_same_device(*tensor, x, name);
    check_dense(*tensor, name);
    check_memory(*tensor, name);
    check(tensor->scalar_type() == ScalarType::Byte,
          std::string(name) + " has the wrong dtype, expected uint8");
  }
  check(packed.numel() >= header.packed_bytes, "packed does not belong to program");
  check(workspace.numel() >= view.workspace_bytes(), "workspace is too small for program");
  const Context context(x);
  Tensor output = torch::stable::empty(
      {header.batch, header.output_channels, header.output_height, header.output_width},
      x.scalar_type(), std::nullopt, x.device(), std::nullopt, MemoryFormat::ChannelsLast);
  const StridedInput input{x.data_ptr(), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
  run(view, packed.data_ptr(), workspace.data_ptr(), input, output.data_ptr(), context.stream());
  return output;
}

// The memory of one call of an operator, which torch takes back in the order of the stream.
class Operator {
 public:
  Operator(const std::vector<Tensor>& xs, const Tensor& weight, int64_t stride, int64_t padding)
      : context_(xs.empty() ? weight : xs[0]) {
    check_convolution(xs, weight, stride, padding);
    check(xs.size() <= kMaxSegments, "xs has " + std::to_string(xs.size()) +
                                         " segments, expected at most " +
                                         std::to_string(kMaxSegments));
    dtype_ = dtype_of(xs[0], "xs[0]");
    const Device device = context_.properties();
    if (const char* reason = objection(dtype_, device.architecture)) check(false, reason);
    for (size_t i = 0; i < xs.size(); ++i) {
      const std::string name = "xs[" + std::to_string(i) + "]";
      check_same_device(xs[i], xs[0], name);
      check(xs[i].scalar_type() == xs[0].scalar_type(), name + " has another dtype than xs[0]");
    }
    check_same_device(weight, xs[0], "weight");
    check(weight.scalar_type() == xs[0].scalar_type(), "weight has another dtype than xs");

    Window& window = convolution_.window;
    window.batch = narrow(xs[0].size(0), "the batch");
    window.in_height = narrow(xs[0].size(2), "the height of xs");
    window.in_width = narrow(xs[0].size(3), "the width of xs");
    window.kernel_height = narrow(weight.size(2), "the height of weight");
    window.kernel_width = narrow(weight.size(3), "the width of weight");
    window.stride = narrow(stride, "stride");
    window.padding = narrow(padding, "padding");
    window.out_height = narrow(output_extent(xs[0].size(2), weight.size(2), stride, padding),
                               "the output's height");
    window.out_width =
        narrow(output_extent(xs[0].size(3), weight.size(3), stride, padding), "the output's width");
    const int64_t out_channels = weight.size(0);
    output_ = torch::stable::empty(
        {xs[0].size(0), out_channels, int64_t{window.out_height}, int64_t{window.out_width}},
        xs[0].scalar_type(), std::nullopt, xs[0].device(), std::nullopt,
        MemoryFormat::ChannelsLast);
    convolution_.dtype = dtype_;
    convolution_.segment_count = static_cast<int32_t>(xs.size());
    for (size_t i = 0; i < xs.size(); ++i) convolution_.segments[i] = segment_of(xs[i]);
    convolution_.out_channels = narrow(out_channels, "the output channels of weight");
    convolution_.weight_columns = round_up(convolution_.out_channels, kGroup);
    convolution_.output = output_.data_ptr();
    convolution_.output_pitch = out_channels;
    set_weight(xs, weight);
  }

  void set_prologue(const std::vector<Tensor>& xs, const Tensor& scale, const Tensor& shift) {
    VectorPacking packing = segments_of(xs);
    convolution_.scale = packed_vector(scale, "scale", packing);
    convolution_.shift = packed_vector(shift, "shift", packing);
  }

  void set_epilogue(const Tensor& scale, const Tensor& shift, bool relu) {
    VectorPacking packing{};
    packing.segment_count = 1;
    packing.channels[0] = convolution_.out_channels;
    packing.length = convolution_.weight_columns;
    convolution_.output_scale = packed_vector(scale, "scale", packing);
    convolution_.bias = packed_vector(shift, "shift", packing);
    convolution_.relu = relu;
  }

  Tensor run() {
    const Configuration configuration = choose(convolution_, context_.properties());
    const int64_t floats = partial_floats(convolution_, configuration);
    if (floats > 0) convolution_.partials = static_cast<float*>(allocate(4 * floats));
    convolve(convolution_, configuration, context_.stream());
    return output_;
  }

 private:
  void* allocate(int64_t bytes) {
    owned_.push_back(empty_bytes(bytes, output_));
    return owned_.back().data_ptr();
  }

  // A segment where it lies, if its pixels begin at multiples of 16 bytes and hold whole groups;
  // else a copy.
  Segment segment_of(const Tensor& x) {
    const int32_t channels = narrow(x.size(1), "the channels of a segment");
    const int64_t pitch = pixel_pitch(x);
    const bool fits = pitch > 0 && pitch <= std::numeric_limits<int32_t>::max() && pitch % 8 == 0 &&
                      channels % kGroup == 0 && reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0;
    if (fits) return {x.data_ptr(), static_cast<int32_t>(pitch), channels};
    Gather copy{};
    copy.dtype = dtype_;
    copy.batch = convolution_.window.batch;
    copy.channels = channels;
    copy.height = convolution_.window.in_height;
    copy.width = convolution_.window.in_width;
    copy.input = x.data_ptr();
    copy.batch_stride = x.stride(0);
    copy.channel_stride = x.stride(1);
    copy.height_stride = x.stride(2);
    copy.width_stride = x.stride(3);
    copy.output_channels = copy.output_pitch = round_up(channels, kGroup);
    copy.output = allocate(convolution_.window.in_pixels() * copy.output_pitch * bytes_of(dtype_));
    gather(copy, context_.stream());
    return {copy.output, copy.output_pitch, copy.output_channels};
  }

  static VectorPacking segments_of(const std::vector<Tensor>& xs) {
    VectorPacking packing{};
    packing.segment_count = static_cast<int32_t>(xs.size());
    for (size_t i = 0; i < xs.size(); ++i) {
      packing.channels[i] = static_cast<int32_t>(xs[i].size(1));
      packing.length += round_up(packing.channels[i], kGroup);
    }
    return packing;
  }

  void set_weight(const std::vector<Tensor>& xs, const Tensor& weight) {
    const Tensor dense = torch::stable::contiguous(weight);
    owned_.push_back(dense);
    const VectorPacking segments = segments_of(xs);
    Packing packing{};
    packing.source_dtype = packing.dtype = dtype_;
    packing.segment_count = segments.segment_count;
    std::copy_n(segments.channels, segments.segment_count, packing.channels);
    packing.padded_in = kGroup;
    packing.taps = narrow(weight.size(2) * weight.size(3), "the taps of weight");
    packing.out_channels = convolution_.out_channels;
    packing.columns = convolution_.weight_columns;
    packing.source = dense.data_ptr();
    packing.output =
        allocate(int64_t{packing.taps} * segments.length * packing.columns * bytes_of(dtype_));
    pack_weight(packing, context_.stream());
    convolution_.weight = packing.output;
  }

  const float* packed_vector(const Tensor& vector, const char* name, VectorPacking packing) {
    int64_t length = 0;
    for (int32_t i = 0; i < packing.segment_count; ++i) length += packing.channels[i];
    check_length(vector, name, length);
    check_same_device(vector, output_, name);
    check_memory(vector, name);
    packing.source_dtype = dtype_of(vector, name);
    const Tensor dense = torch::stable::contiguous(vector);
    owned_.push_back(dense);
    packing.source = dense.data_ptr();
    packing.output = static_cast<float*>(allocate(4 * int64_t{packing.length}));
    pack_vector(packing, context_.stream());
    return packing.output;
  }

  Context context_;
  DType dtype_ = DType::kFloat32;
  Tensor output_;
  Convolution convolution_{};
  std::vector<Tensor> owned_;
};

Tensor cat_bn_relu_conv(const std::vector<Tensor>& xs, const Tensor& scale, const Tensor& shift,
                        const Tensor& weight, int64_t stride, int64_t padding) {
  Operator call(xs, weight, stride, padding);
  call.set_prologue(xs, scale, shift);
  return call.run();
}

Tensor cat_conv_bn_relu(const std::vector<Tensor>& xs, const Tensor& weight, const Tensor& scale,
                        const Tensor& shift, int64_t stride, int64_t padding, bool relu) {
  Operator call(xs, weight, stride, padding);
  call.set_epilogue(scale, shift, relu);
  return call.run();
}

}  // namespace
}  // namespace threshnet_fast::cuda

using namespace threshnet_fast::cuda;

STABLE_TORCH_LIBRARY_IMPL(threshnet_fast_cuda, CompositeExplicitAutograd, m) {
  m.impl("compile_plan", TORCH_BOX(&compile_plan));
  m.impl("program_algorithms", TORCH_BOX(&program_algorithms));
  m.impl("workspace_bytes", TORCH_BOX(&workspace_bytes));
  m.impl("packed_bytes", TORCH_BOX(&packed_bytes));
}

#if defined(THRESHNET_FAST_EMULATION)
STABLE_TORCH_LIBRARY_IMPL(threshnet_fast_cuda, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(threshnet_fast_cuda, CUDA, m) {
#endif
  m.impl("pack_weights", TORCH_BOX(&pack_weights));
  m.impl("run_plan", TORCH_BOX(&run_plan));
  m.impl("cat_bn_relu_conv", TORCH_BOX(&cat_bn_relu_conv));
  m.impl("cat_conv_bn_relu", TORCH_BOX(&cat_conv_bn_relu));
}
