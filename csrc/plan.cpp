#include "plan.h"

#include <limits>

namespace threshnet_fast {

void fail_plan(const std::string& what) {
  throw std::invalid_argument("threshnet_fast: invalid plan: " + what);
}

void require_plan(bool condition, const char* what) {
  if (!condition) fail_plan(what);
}

void require_size(int64_t elements, const std::string& what) {
  if (elements < 0 || elements > kMostElements) fail_plan(what + " has over 2^48 elements");
}

int64_t product_of_sizes(std::initializer_list<int64_t> sizes, const std::string& what) {
  int64_t product = 1;
  for (const int64_t size : sizes) {
    int64_t next = 0;
    if (__builtin_mul_overflow(product, size, &next)) next = -1;
    require_size(next, what);
    product = next;
  }
  return product;
}

namespace {

class Reader {
 public:
  Reader(const int64_t* data, int64_t length) : data_(data), length_(length) {}

  Plan read() {
    read_header();
    for (int64_t i = 0; i < step_count_; ++i) read_step();
    require_plan(position_ == length_, "the description is longer than its steps");
    return plan_;
  }

 private:
  int64_t next() {
    require_plan(position_ < length_, "the description ends too early");
    return data_[position_++];
  }

  int64_t dimension() {
    const int64_t value = next();
    require_plan(value > 0 && value <= std::numeric_limits<int32_t>::max(),
                 "a dimension is not between 1 and 2^31 - 1");
    return value;
  }

  int64_t weight_index(bool optional) {
    const int64_t index = next();
    require_plan(index >= (optional ? -1 : 0) && index < plan_.weight_count, "no such weight");
    return index;
  }

  void read_header() {
    require_plan(next() == kDescriptionMagic, "this is not a plan's description");
    require_plan(next() == kDescriptionVersion,
                 "the description is of another version of threshnet_fast");
    plan_.batch = dimension();
    plan_.input_channels = dimension();
    plan_.input_height = dimension();
    plan_.input_width = dimension();
    plan_.output_channels = dimension();
    plan_.output_height = dimension();
    plan_.output_width = dimension();
    plan_.external_count = next();
    plan_.weight_count = next();
    plan_.arena_size = next();
    const int64_t buffer_count = next();
    step_count_ = next();
    require_plan(plan_.external_count >= 0 && plan_.external_count < 1 << 20, "external inputs");
    require_plan(plan_.arena_size >= 0 && plan_.arena_size < int64_t{1} << 48,
                 "the arena's size is not between 0 and 2^48 floats");
    require_plan(plan_.arena_size % kGroupChannels == 0,
                 "the arena is not a multiple of 16 floats");
    require_plan(buffer_count > 0 && buffer_count < 1 << 20, "number of buffers");
    require_plan(step_count_ > 0 && step_count_ < 1 << 20, "number of steps");
    for (int64_t i = 0; i < buffer_count; ++i) read_buffer();
  }

  void read_buffer() {
    Buffer buffer{};
    buffer.height = dimension();
    buffer.width = dimension();
    buffer.pitch = dimension();
    buffer.offset = next();
    const std::string name = "buffer " + std::to_string(plan_.buffers.size());
    const int64_t pixels = product_of_sizes({plan_.batch, buffer.height, buffer.width}, name);
    require_plan(pixels <= std::numeric_limits<int32_t>::max(), "a buffer has over 2^31 pixels");
    const int64_t elements = product_of_sizes({pixels, buffer.pitch}, name);
    if (buffer.offset >= 0) {
      require_plan(buffer.offset % kGroupChannels == 0,
                   "a buffer does not start at a multiple of 16 floats");
      require_plan(
          buffer.offset <= plan_.arena_size && elements <= plan_.arena_size - buffer.offset,
          "a buffer does not fit in the arena");
    } else {
      require_plan(buffer.offset > kFirstExternal - plan_.external_count,
                   "a buffer names an external input that does not exist");
    }
    if (buffer.offset == kNetworkInput) {
      require_plan(buffer.height == plan_.input_height && buffer.width == plan_.input_width,
                   "the network's input has another size than its buffer");
    }
    if (buffer.offset == kNetworkOutput) {
      require_plan(buffer.height == plan_.output_height && buffer.width == plan_.output_width &&
                       buffer.pitch == plan_.output_channels,
                   "the network's output has another size than its buffer");
    }
    plan_.buffers.push_back(buffer);
  }

  const Buffer& buffer(int64_t index) const {
    require_plan(index >= 0 && index < static_cast<int64_t>(plan_.buffers.size()),
                 "no such buffer");
    return plan_.buffers[index];
  }

  BufferSegment read_segment(const char* leaves) {
    BufferSegment segment{};
    segment.buffer = next();
    segment.channel = next();
    segment.channels = dimension();
    const Buffer& of = buffer(segment.buffer);
    // Compared without adding, as the sum need not fit in 64 bits.
    require_plan(segment.channel >= 0 && segment.channel <= of.pitch &&
                     segment.channels <= of.pitch - segment.channel,
                 leaves);
    return segment;
  }

  void read_input(PlanStep& step) {
    const BufferSegment segment = read_segment("a segment leaves its buffer");
    require_plan(buffer(segment.buffer).offset != kNetworkOutput,
                 "a step reads the network's output");
    step.input_channels += segment.channels;
    if (step.input_channels > kMostChannels)
      fail_plan(name_of_step() + " reads over 2^24 channels");
    step.inputs.push_back(segment);
  }

  void read_output(PlanStep& step) {
    step.output = read_segment("an output leaves its buffer");
    const int64_t offset = buffer(step.output.buffer).offset;
    require_plan(offset >= 0 || offset == kNetworkOutput, "a step writes to an input");
    if (step.output.channels > kMostChannels)
      fail_plan(name_of_step() + " writes over 2^24 channels");
  }

  void read_window(PlanStep& step) {
    step.kernel_height = dimension();
    step.kernel_width = dimension();
    step.stride = dimension();
    step.padding = next();
    require_plan(step.padding >= 0 && step.padding < 1 << 20, "padding");
    const Buffer& from = buffer(step.inputs[0].buffer);
    const Buffer& to = buffer(step.output.buffer);
    const int64_t height = from.height + 2 * step.padding - step.kernel_height;
    const int64_t width = from.width + 2 * step.padding - step.kernel_width;
    require_plan(height >= 0 && width >= 0, "a window is larger than its padded input");
    require_plan(to.height == height / step.stride + 1 && to.width == width / step.stride + 1,
                 "an output map has the wrong size");
  }

  void read_step() {
    const int64_t start = position_;
    PlanStep step{};
    const int64_t kind = next();
    const int64_t length = next();
    require_plan(kind >= 0 && kind <= static_cast<int64_t>(PlanStepKind::kDepthwise),
                 "unknown kind of step");
    step.kind = static_cast<PlanStepKind>(kind);
    switch (step.kind) {
      case PlanStepKind::kConvolution:
        read_convolution(step);
        break;
      case PlanStepKind::kPool:
        read_pool(step, start + length);
        break;
      case PlanStepKind::kDepthwise:
        read_depthwise(step);
        break;
    }
    require_plan(position_ - start == length, "a step has the wrong length");
    check_sizes(step);
    plan_.steps.push_back(std::move(step));
  }

  // Of the step that is being read, counted from 0 as in errors about weights.
  std::string name_of_step() const { return "step " + std::to_string(plan_.steps.size()); }

  void check_sizes(const PlanStep& step) const {
    product_of_sizes({step.kernel_height, step.kernel_width}, "the window of " + name_of_step());
    if (step.kind == PlanStepKind::kPool) return;
    const int64_t inputs =
        step.kind == PlanStepKind::kConvolution ? step.input_channels : int64_t{1};
    product_of_sizes({step.output.channels, inputs, step.kernel_height, step.kernel_width},
                     "the weight of " + name_of_step());
  }

  void read_convolution(PlanStep& step) {
    const int64_t count = dimension();
    for (int64_t i = 0; i < count; ++i) read_input(step);
    read_output(step);
    read_window(step);
    read_epilogue(step);
    step.scale_index = weight_index(true);
    step.shift_index = weight_index(true);
    require_plan((step.scale_index < 0) == (step.shift_index < 0), "a scale without a shift");
    const Buffer& from = buffer(step.inputs[0].buffer);
    for (const BufferSegment& segment : step.inputs) {
      const Buffer& other = buffer(segment.buffer);
      require_plan(other.height == from.height && other.width == from.width,
                   "segments of different sizes");
      require_plan(!(segment.buffer == step.output.buffer &&
                     segment.channel < step.output.channel + step.output.channels &&
                     step.output.channel < segment.channel + segment.channels),
                   "a convolution writes over its own input");
      if (other.offset != kNetworkInput) continue;
      step.reads_network_input = true;
      require_plan(step.inputs.size() == 1 && segment.channel == 0 && step.scale_index < 0 &&
                       segment.channels == plan_.input_channels,
                   "the network's input is read as part of a concatenation or through a prologue");
    }
  }

  void read_epilogue(PlanStep& step) {
    const int64_t activation = next();
    require_plan(activation >= 0 && activation <= kRelu6, "unknown activation");
    step.activation = static_cast<Activation>(activation);
    step.weight_index = weight_index(false);
    step.bias_index = weight_index(true);
  }

  // What every channel of the output is made of is the same channel of the input alone.
  void read_channelwise(PlanStep& step) {
    read_input(step);
    read_output(step);
    read_window(step);
    require_plan(buffer(step.inputs[0].buffer).offset != kNetworkInput,
                 "a pool or a depthwise convolution reads the network's input");
    require_plan(step.inputs[0].channels == step.output.channels,
                 "a pool or a depthwise convolution changes the number of channels");
    step.weight_index = step.bias_index = step.scale_index = step.shift_index = -1;
  }

  void read_depthwise(PlanStep& step) {
    read_channelwise(step);
    read_epilogue(step);
    require_plan(step.inputs[0].buffer != step.output.buffer,
                 "a depthwise convolution writes to the buffer that it reads");
  }

  // Scale and shift are there if the step does not end without them.
  void read_pool(PlanStep& step, int64_t end) {
    read_channelwise(step);
    step.average = next() != 0;
    if (position_ != end) {
      step.scale_index = weight_index(false);
      step.shift_index = weight_index(false);
      require_plan(step.average, "a maximum with a prologue");
    }
    require_plan(!(step.average && step.padding > 0), "an average pool with padding");
    require_plan(2 * step.padding <= step.kernel_height && 2 * step.padding <= step.kernel_width,
                 "a pool's padding is over half its window");
  }

  const int64_t* data_;
  int64_t length_;
  int64_t position_ = 0;
  int64_t step_count_ = 0;
  Plan plan_{};
};

}  // namespace

Plan read_plan(const int64_t* description, int64_t length) {
  return Reader(description, length).read();
}

}  // namespace threshnet_fast
