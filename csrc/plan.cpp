#include "plan.h"

#include <cmath>
#include <cstring>
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

// The most rows or columns of padding on one side.
constexpr int64_t kMostPadding = 1 << 20;

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
    plan_.input_count = next();
    const int64_t output_count = next();
    plan_.weight_count = next();
    plan_.arena_size = next();
    const int64_t buffer_count = next();
    step_count_ = next();
    require_plan(plan_.input_count >= 0 && plan_.input_count < 1 << 20, "external inputs");
    require_plan(output_count >= 0 && output_count < 1 << 20, "external outputs");
    plan_.external_count = plan_.input_count + output_count;
    require_plan(plan_.arena_size >= 0 && plan_.arena_size < int64_t{1} << 48,
                 "the arena's size is not between 0 and 2^48 floats");
    require_plan(plan_.arena_size % kGroupChannels == 0,
                 "the arena is not a multiple of 16 floats");
    require_plan(buffer_count > 0 && buffer_count < 1 << 20, "number of buffers");
    require_plan(step_count_ > 0 && step_count_ < 1 << 20, "number of steps");
    for (int64_t i = 0; i < buffer_count; ++i) read_buffer();
    check_externals();
  }

  // A caller's map is checked against the one buffer that it is.
  void check_externals() const {
    std::vector<int64_t> buffers(plan_.external_count);
    for (const Buffer& buffer : plan_.buffers) {
      if (buffer.offset <= kFirstExternal) ++buffers[kFirstExternal - buffer.offset];
    }
    for (const int64_t count : buffers)
      require_plan(count == 1, "an external map is not that of one buffer");
  }

  void read_buffer() {
    Buffer buffer{};
    buffer.height = dimension();
    buffer.width = dimension();
    buffer.channels = dimension();
    buffer.pitch = dimension();
    buffer.offset = next();
    require_plan(buffer.channels <= buffer.pitch, "a buffer has more channels than its pitch");
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
                   "a buffer names an external map that does not exist");
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
    if (is_external_output(buffer)) {
      require_plan(buffer.pitch == buffer.channels, "an external output is not dense");
    }
    plan_.buffers.push_back(buffer);
  }

  bool is_external_output(const Buffer& buffer) const {
    return buffer.offset <= kFirstExternal - plan_.input_count;
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
    require_plan(segment.channel >= 0 && segment.channel <= of.channels &&
                     segment.channels <= of.channels - segment.channel,
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
    const Buffer& to = buffer(step.output.buffer);
    require_plan(to.offset >= 0 || to.offset == kNetworkOutput || is_external_output(to),
                 "a step writes to an input");
    if (step.output.channels > kMostChannels)
      fail_plan(name_of_step() + " writes over 2^24 channels");
  }

  int64_t padding() {
    const int64_t value = next();
    require_plan(value >= 0 && value < kMostPadding, "padding");
    return value;
  }

  void read_window(PlanStep& step) {
    PlanWindow& window = step.window;
    window.kernel_height = dimension();
    window.kernel_width = dimension();
    window.stride_height = dimension();
    window.stride_width = dimension();
    window.padding_top = padding();
    window.padding_left = padding();
    window.dilation_height = dimension();
    window.dilation_width = dimension();
    const Buffer& from = buffer(step.inputs[0].buffer);
    const Buffer& to = buffer(step.output.buffer);
    const OutputLattice& lattice = step.lattice;
    check_windows(from.height, lattice.height(to), window.height(), window.stride_height,
                  window.padding_top, lattice.is_whole());
    check_windows(from.width, lattice.width(to), window.width(), window.stride_width,
                  window.padding_left, lattice.is_whole());
  }

  // In one direction: `output` windows, of which one reaches over `extent` pixels, are no more than
  // fit with the most padding behind the map, and, where they are `all`, no fewer than those that
  // fit without any.
  static void check_windows(int64_t input, int64_t output, int64_t extent, int64_t stride,
                            int64_t padding, bool all) {
    require_plan(extent <= std::numeric_limits<int32_t>::max(),
                 "a window reaches over more than 2^31 - 1 pixels");
    const int64_t room = input + padding - extent;
    const int64_t last = (output - 1) * stride;
    require_plan(last < room + kMostPadding && (!all || room < 0 || output >= room / stride + 1),
                 "an output map has the wrong size");
  }

  void read_lattice(PlanStep& step) {
    OutputLattice& lattice = step.lattice;
    lattice.stride_height = dimension();
    lattice.stride_width = dimension();
    lattice.first_row = next();
    lattice.first_column = next();
    const Buffer& to = buffer(step.output.buffer);
    require_plan(lattice.first_row >= 0 && lattice.first_row < to.height &&
                     lattice.first_column >= 0 && lattice.first_column < to.width,
                 "a convolution writes pixels beside its output");
    require_plan(!lattice.is_whole() || (lattice.first_row == 0 && lattice.first_column == 0),
                 "a convolution leaves out the first pixels of its output");
  }

  // Of a pool: no window lies beside the map.
  static void check_pooled(int64_t input, int64_t output, int64_t kernel, int64_t stride,
                           int64_t padding) {
    require_plan(2 * padding <= kernel, "a pool's padding is over half its window");
    require_plan((output - 1) * stride - padding < input, "a pool's window begins behind the map");
  }

  // Two segments of one buffer that have channels in common.
  static bool overlap(const BufferSegment& a, const BufferSegment& b) {
    return a.buffer == b.buffer && a.channel < b.channel + b.channels &&
           b.channel < a.channel + a.channels;
  }

  void read_step() {
    const int64_t start = position_;
    PlanStep step{};
    const int64_t kind = next();
    const int64_t length = next();
    require_plan(kind >= 0 && kind <= static_cast<int64_t>(PlanStepKind::kResize),
                 "unknown kind of step");
    step.kind = static_cast<PlanStepKind>(kind);
    step.window = {1, 1, 1, 1, 0, 0, 1, 1};
    step.lattice = {1, 1, 0, 0};
    step.weight_index = step.bias_index = step.scale_index = step.shift_index = -1;
    switch (step.kind) {
      case PlanStepKind::kConvolution:
        read_convolution(step);
        break;
      case PlanStepKind::kPool:
        read_pool(step);
        break;
      case PlanStepKind::kDepthwise:
        read_depthwise(step);
        break;
      case PlanStepKind::kPointwise:
        read_pointwise(step);
        break;
      case PlanStepKind::kResize:
        read_resize(step);
        break;
    }
    require_plan(position_ - start == length, "a step has the wrong length");
    check_sizes(step);
    plan_.steps.push_back(std::move(step));
  }

  // Of the step that is being read, counted from 0 as in errors about weights.
  std::string name_of_step() const { return "step " + std::to_string(plan_.steps.size()); }

  void check_sizes(const PlanStep& step) const {
    product_of_sizes({step.window.kernel_height, step.window.kernel_width},
                     "the window of " + name_of_step());
    if (step.weight_index < 0) return;
    const int64_t inputs =
        step.kind == PlanStepKind::kConvolution ? step.input_channels : int64_t{1};
    product_of_sizes(
        {step.output.channels, inputs, step.window.kernel_height, step.window.kernel_width},
        "the weight of " + name_of_step());
  }

  void read_convolution(PlanStep& step) {
    const int64_t count = dimension();
    for (int64_t i = 0; i < count; ++i) read_input(step);
    read_output(step);
    read_lattice(step);
    read_window(step);
    read_epilogue(step);
    read_affine(step);
    step.prologue_activation = activation(kRelu6);
    for (const BufferSegment& segment : step.inputs) {
      const Buffer& other = buffer(segment.buffer);
      require_same_size(other, buffer(step.inputs[0].buffer));
      require_plan(!overlap(segment, step.output), "a convolution writes over its own input");
      if (other.offset != kNetworkInput) continue;
      step.reads_network_input = true;
      require_plan(step.inputs.size() == 1 && segment.channel == 0 && step.scale_index < 0 &&
                       segment.channels == plan_.input_channels,
                   "the network's input is read as part of a concatenation or through a prologue");
      require_plan(step.lattice.is_whole(),
                   "what reads the network's input writes some of the pixels");
    }
  }

  static void require_same_size(const Buffer& a, const Buffer& b) {
    require_plan(a.height == b.height && a.width == b.width, "segments of different sizes");
  }

  Activation activation(Activation last) {
    const int64_t code = next();
    require_plan(code >= 0 && code <= last, "unknown activation");
    return static_cast<Activation>(code);
  }

  // A float32 by its bits.
  float number() {
    const int64_t bits = next();
    require_plan(bits >= 0 && bits <= std::numeric_limits<uint32_t>::max(),
                 "a number is not the bits of a float32");
    const uint32_t word = static_cast<uint32_t>(bits);
    float value = 0;
    std::memcpy(&value, &word, sizeof value);
    require_plan(std::isfinite(value), "a number is not finite");
    return value;
  }

  void read_affine(PlanStep& step) {
    step.scale_index = weight_index(true);
    step.shift_index = weight_index(true);
    require_plan((step.scale_index < 0) == (step.shift_index < 0), "a scale without a shift");
  }

  void read_epilogue(PlanStep& step) {
    step.activation = activation(kRelu6);
    step.weight_index = weight_index(false);
    step.bias_index = weight_index(true);
  }

  void require_map(const BufferSegment& segment) const {
    require_plan(buffer(segment.buffer).offset != kNetworkInput,
                 "a step that is no convolution reads the network's input");
  }

  // What every channel of the output is made of is the same channel of the input alone.
  void read_channelwise(PlanStep& step) {
    read_input(step);
    read_output(step);
    require_map(step.inputs[0]);
    require_plan(step.inputs[0].channels == step.output.channels,
                 "a step that is no convolution changes the number of channels");
    require_plan(!overlap(step.inputs[0], step.output),
                 "a step writes to the channels of the buffer that it reads");
  }

  void read_depthwise(PlanStep& step) {
    read_channelwise(step);
    read_window(step);
    read_epilogue(step);
  }

  void read_pool(PlanStep& step) {
    read_channelwise(step);
    read_window(step);
    const int64_t average = next();
    require_plan(average == 0 || average == 1, "a pool is neither a maximum nor an average");
    step.average = average == 1;
    step.divisor = next();
    require_plan(step.divisor >= kPixelsOfMap && step.divisor < int64_t{1} << 31, "divisor");
    read_affine(step);
    step.prologue_activation = activation(kRelu6);
    require_plan(step.average || step.scale_index < 0, "a maximum with a prologue");
    const PlanWindow& window = step.window;
    const Buffer& from = buffer(step.inputs[0].buffer);
    const Buffer& to = buffer(step.output.buffer);
    require_plan(window.dilation_height == 1 && window.dilation_width == 1, "a dilated pool");
    check_pooled(from.height, to.height, window.kernel_height, window.stride_height,
                 window.padding_top);
    check_pooled(from.width, to.width, window.kernel_width, window.stride_width,
                 window.padding_left);
  }

  void read_pointwise(PlanStep& step) {
    const int64_t count = dimension();
    for (int64_t i = 0; i < count; ++i) read_input(step);
    read_output(step);
    read_affine(step);
    step.activation = activation(kSigmoid);
    step.slope = number();
    for (const BufferSegment& segment : step.inputs) {
      require_map(segment);
      require_same_size(buffer(segment.buffer), buffer(step.output.buffer));
      require_plan(segment.channels == step.output.channels,
                   "a sum of maps with different numbers of channels");
      require_plan(!overlap(segment, step.output) || segment.channel == step.output.channel,
                   "a sum is written over a part of what it reads");
    }
  }

  void read_resize(PlanStep& step) {
    read_channelwise(step);
    const int64_t mode = next();
    require_plan(mode >= kNearest && mode <= kBilinear, "unknown interpolation");
    const int64_t aligned = next();
    require_plan(aligned == 0 || aligned == 1, "align_corners");
    step.resizing = {static_cast<ResizeMode>(mode), aligned == 1, number(), number()};
    require_plan(step.resizing.scale_height >= 0 && step.resizing.scale_width >= 0,
                 "a map is resized by a negative scale");
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
