#include <stdexcept>
#include <string>

#include "program.h"

namespace threshnet_fast::cuda {
namespace {

void check(bool condition, const std::string& what) {
  if (!condition) throw std::invalid_argument("threshnet_fast: " + what);
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

class Packer {
 public:
  Packer(const Program& program, const std::vector<Weight>& weights, void* packed, Stream stream)
      : program_(program),
        weights_(weights),
        packed_(static_cast<std::byte*>(packed)),
        stream_(stream) {}

  void pack(const Step& step) const {
    switch (step.kind) {
      case StepKind::kPool:
        return;
      case StepKind::kStem:
        return pack_convolution(step, 1);
      case StepKind::kConvolution:
        return pack_convolution(step, kGroup);
      case StepKind::kHead:
        return pack_head(step);
    }
  }

 private:
  const Weight& weight(int64_t index, int64_t count) const {
    const Weight& weight = weights_[index];
    check(weight.count == count, "weights[" + std::to_string(index) + "] has " +
                                     std::to_string(weight.count) + " elements, expected " +
                                     std::to_string(count));
    check(weight.dtype == DType::kFloat32 || weight.dtype == program_.dtype(),
          "weights[" + std::to_string(index) +
              "] has the wrong dtype, expected float32 or that of the program");
    return weight;
  }

  void pack_convolution(const Step& step, int padded_in) const {
    Packing packing{};
    packing.dtype = program_.dtype();
    packing.segment_count = static_cast<int32_t>(step.segment_count);
    int64_t channels = 0;
    for (int32_t i = 0; i < packing.segment_count; ++i) {
      const int64_t count = program_.segment(step.first_segment + i).channels;
      packing.channels[i] = static_cast<int32_t>(count);
      channels += count;
    }
    packing.padded_in = padded_in;
    packing.taps = step.window.kernel_height * step.window.kernel_width;
    packing.out_channels = static_cast<int32_t>(step.output.channels);
    packing.columns = step.weight_columns;
    const Weight& source =
        weight(step.weight_index, channels * packing.taps * packing.out_channels);
    packing.source_dtype = source.dtype;
    packing.source = source.data;
    packing.output = packed_ + step.weight;
    pack_weight(packing, stream_);
    if (step.bias_index >= 0) pack_outputs(step.bias_index, step, step.weight_columns);
    if (step.scale_index < 0) return;
    VectorPacking vector{};
    vector.segment_count = packing.segment_count;
    for (int32_t i = 0; i < packing.segment_count; ++i) {
      vector.channels[i] = packing.channels[i];
      vector.length += round_up(packing.channels[i], kGroup);
    }
    pack_vector_from(weight(step.scale_index, channels), vector, step.scale);
    pack_vector_from(weight(step.shift_index, channels), vector, step.shift);
  }

  void pack_head(const Step& step) const {
    Packing packing{};
    packing.dtype = program_.dtype();
    packing.segment_count = 1;
    packing.channels[0] = static_cast<int32_t>(program_.segment(step.first_segment).channels);
    packing.padded_in = kGroup;
    packing.taps = 1;
    packing.out_channels = packing.columns = static_cast<int32_t>(step.output.channels);
    packing.rows_are_outputs = 1;
    const Weight& source =
        weight(step.weight_index, int64_t{packing.channels[0]} * packing.out_channels);
    packing.source_dtype = source.dtype;
    packing.source = source.data;
    packing.output = packed_ + step.weight;
    pack_weight(packing, stream_);
    if (step.bias_index >= 0) pack_outputs(step.bias_index, step, packing.out_channels);
  }

  // A vector over the output channels, with zeros up to `length`.
  void pack_outputs(int64_t index, const Step& step, int32_t length) const {
    VectorPacking vector{};
    vector.segment_count = 1;
    vector.channels[0] = static_cast<int32_t>(step.output.channels);
    vector.length = length;
    pack_vector_from(weight(index, step.output.channels), vector, step.bias);
  }

  void pack_vector_from(const Weight& source, VectorPacking vector, int64_t offset) const {
    vector.source_dtype = source.dtype;
    vector.source = source.data;
    vector.output = reinterpret_cast<float*>(packed_ + offset);
    pack_vector(vector, stream_);
  }

  const Program& program_;
  const std::vector<Weight>& weights_;
  std::byte* packed_;
  Stream stream_;
};

class Runner {
 public:
  Runner(const Program& program, const void* packed, void* workspace, const StridedInput& input,
         void* output, Stream stream)
      : program_(program),
        packed_(static_cast<const std::byte*>(packed)),
        workspace_(static_cast<std::byte*>(workspace)),
        input_(input),
        output_(static_cast<std::byte*>(output)),
        size_(bytes_of(program.dtype())),
        stream_(stream) {}

  void run(const Step& step) const {
    switch (step.kind) {
      case StepKind::kStem:
        return run_stem(step);
      case StepKind::kConvolution:
        return run_convolution(step);
      case StepKind::kPool:
        return run_pool(step);
      case StepKind::kHead:
        return run_head(step);
    }
  }

 private:
  Segment input_of(const BufferSegment& segment) const {
    const Buffer& buffer = program_.buffer(segment.buffer);
    return {workspace_ + (buffer.offset + segment.channel) * size_,
            static_cast<int32_t>(buffer.pitch),
            round_up(static_cast<int32_t>(segment.channels), kGroup)};
  }

  void* output_of(const Step& step) const {
    const Buffer& buffer = program_.buffer(step.output.buffer);
    std::byte* base =
        buffer.offset == kNetworkOutput ? output_ : workspace_ + buffer.offset * size_;
    return base + step.output.channel * size_;
  }

  int64_t pitch_of(const Step& step) const { return program_.buffer(step.output.buffer).pitch; }

  const float* vector(int64_t index, int64_t offset) const {
    return index < 0 ? nullptr : reinterpret_cast<const float*>(packed_ + offset);
  }

  void run_stem(const Step& step) const {
    StemConvolution stem{};
    stem.dtype = program_.dtype();
    stem.window = step.window;
    stem.input = input_.data;
    stem.batch_stride = input_.batch_stride;
    stem.channel_stride = input_.channel_stride;
    stem.height_stride = input_.height_stride;
    stem.width_stride = input_.width_stride;
    stem.in_channels = static_cast<int32_t>(program_.header().input_channels);
    stem.weight = packed_ + step.weight;
    stem.weight_columns = step.weight_columns;
    stem.out_channels = step.stored_channels;
    stem.bias = vector(step.bias_index, step.bias);
    stem.output = output_of(step);
    stem.output_pitch = pitch_of(step);
    stem.relu = step.relu;
    convolve_stem(stem, stream_);
  }

  void run_convolution(const Step& step) const {
    Convolution convolution{};
    convolution.dtype = program_.dtype();
    convolution.segment_count = static_cast<int32_t>(step.segment_count);
    for (int64_t i = 0; i < step.segment_count; ++i)
      convolution.segments[i] = input_of(program_.segment(step.first_segment + i));
    convolution.window = step.window;
    convolution.weight = packed_ + step.weight;
    convolution.weight_columns = step.weight_columns;
    convolution.out_channels = step.stored_channels;
    convolution.scale = vector(step.scale_index, step.scale);
    convolution.shift = vector(step.shift_index, step.shift);
    convolution.bias = vector(step.bias_index, step.bias);
    convolution.output = output_of(step);
    convolution.output_pitch = pitch_of(step);
    convolution.partials = reinterpret_cast<float*>(workspace_ + program_.header().arena_bytes);
    convolution.relu = step.relu;
    convolve(convolution, step.configuration, stream_);
  }

  void run_pool(const Step& step) const {
    Pool description{};
    description.dtype = program_.dtype();
    description.window = step.window;
    description.input = input_of(program_.segment(step.first_segment));
    description.output = output_of(step);
    description.output_pitch = pitch_of(step);
    description.out_channels = step.stored_channels;
    description.average = step.average;
    pool(description, stream_);
  }

  void run_head(const Step& step) const {
    Head description{};
    description.dtype = program_.dtype();
    description.batch = step.window.batch;
    description.pixels = step.window.in_height * step.window.in_width;
    description.input = input_of(program_.segment(step.first_segment));
    description.weight = packed_ + step.weight;
    description.classes = step.stored_channels;
    description.bias = vector(step.bias_index, step.bias);
    description.output = output_of(step);
    head(description, stream_);
  }

  const Program& program_;
  const std::byte* packed_;
  std::byte* workspace_;
  StridedInput input_;
  std::byte* output_;
  int64_t size_;
  Stream stream_;
};

}  // namespace

void pack(const Program& program, const std::vector<Weight>& weights, void* packed, Stream stream) {
  check(static_cast<int64_t>(weights.size()) == program.header().weight_count,
        "weights has " + std::to_string(weights.size()) + " tensors, expected " +
            std::to_string(program.header().weight_count));
  check(aligned(packed), "packed is not aligned to 16 bytes");
  const Packer packer(program, weights, packed, stream);
  for (int64_t i = 0; i < program.header().step_count; ++i) packer.pack(program.step(i));
}

void run(const Program& program, const void* packed, void* workspace, const StridedInput& input,
         void* output, Stream stream) {
  check(aligned(packed), "packed is not aligned to 16 bytes");
  check(aligned(workspace), "workspace is not aligned to 16 bytes");
  const Runner runner(program, packed, workspace, input, output, stream);
  for (int64_t i = 0; i < program.header().step_count; ++i) runner.run(program.step(i));
}

}  // namespace threshnet_fast::cuda
