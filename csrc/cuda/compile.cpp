#include <algorithm>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>

#include "program.h"
#include "seal.h"

namespace threshnet_fast::cuda {
namespace {

constexpr int64_t kMagic = 0x4752504354544e;  // "NTTCPRG"
constexpr int64_t kVersion = 2;
constexpr int64_t kAlignment = 256;

class Compiler {
 public:
  Compiler(const Plan& plan, DType dtype, const Device& device)
      : plan_(plan), dtype_(dtype), device_(device) {
    if (const char* reason = objection(dtype, device.architecture))
      throw std::invalid_argument(std::string("threshnet_fast: ") + reason);
    require_plan(plan.external_count == 0, "external maps are not supported");
    header_.magic = kMagic;
    header_.version = kVersion;
    header_.dtype = static_cast<int64_t>(dtype);
    header_.batch = plan.batch;
    header_.input_channels = plan.input_channels;
    header_.input_height = plan.input_height;
    header_.input_width = plan.input_width;
    header_.output_channels = plan.output_channels;
    header_.output_height = plan.output_height;
    header_.output_width = plan.output_width;
    header_.weight_count = plan.weight_count;
    header_.arena_bytes = round_up(plan.arena_size * bytes_of(dtype), kAlignment);
  }

  std::vector<std::byte> compile() {
    count_readers();
    for (size_t i = 0; i < plan_.steps.size(); ++i) {
      const PlanStep& planned = plan_.steps[i];
      if (i + 1 < plan_.steps.size() && is_head(planned, plan_.steps[i + 1])) {
        add_head(planned, plan_.steps[++i]);
      } else if (planned.kind == PlanStepKind::kPool) {
        add_pool(planned);
      } else if (planned.reads_network_input) {
        add_stem(planned);
      } else {
        add_convolution(planned);
      }
    }
    return write();
  }

 private:
  void count_readers() {
    for (const PlanStep& step : plan_.steps) {
      for (const BufferSegment& segment : step.inputs) ++readers_[segment.buffer];
    }
  }

  Step begin(StepKind kind, const PlanStep& planned) {
    const Buffer& from = plan_.buffer_of(planned.inputs[0]);
    const Buffer& to = plan_.buffer_of(planned.output);
    require_plan(std::max(plan_.batch * from.height * from.width,
                          plan_.batch * to.height * to.width) <= kMostPixels,
                 "a feature map has more than 2^31 - 1024 pixels");
    Step step{};
    step.kind = kind;
    step.first_segment = static_cast<int64_t>(segments_.size());
    step.segment_count = static_cast<int64_t>(planned.inputs.size());
    segments_.insert(segments_.end(), planned.inputs.begin(), planned.inputs.end());
    for (const BufferSegment& input : planned.inputs) {
      if (planned.reads_network_input) continue;
      require_plan(input.channel % group() == 0,
                   "a segment does not begin at a multiple of 16 channels");
      check_room(input);
    }
    step.output = planned.output;
    step.window = {static_cast<int32_t>(plan_.batch),
                   static_cast<int32_t>(from.height),
                   static_cast<int32_t>(from.width),
                   static_cast<int32_t>(to.height),
                   static_cast<int32_t>(to.width),
                   static_cast<int32_t>(planned.window.kernel_height),
                   static_cast<int32_t>(planned.window.kernel_width),
                   static_cast<int32_t>(planned.window.stride_height),
                   static_cast<int32_t>(planned.window.padding_top)};
    require_window(planned, from, to);
    require_plan(planned.kind != PlanStepKind::kPointwise && planned.kind != PlanStepKind::kResize,
                 "a step is a sum or resizes a map, for which no GPU has a kernel");
    require_plan(planned.lattice.is_whole(),
                 "a convolution writes some of the pixels, for which no GPU has a kernel");
    require_plan(planned.scale_index < 0 || planned.prologue_activation == kRelu,
                 "an input is normalised without ReLU, for which no GPU has a kernel");
    require_plan(
        !planned.average || planned.divisor == kPixelsOfMap || planned.divisor == kPixelsOfPadded,
        "an average has a divisor of its own, for which no GPU has a kernel");
    require_plan(planned.activation != kRelu6,
                 "an activation is ReLU6, which no kernel for a GPU has");
    require_plan(planned.kind != PlanStepKind::kDepthwise,
                 "a convolution is depthwise, for which no GPU has a kernel");
    require_plan(planned.kind != PlanStepKind::kPool || planned.scale_index < 0,
                 "a pool normalises its input, for which no GPU has a kernel");
    step.relu = planned.activation == kRelu;
    step.average = planned.average;
    step.stored_channels = static_cast<int32_t>(planned.output.channels);
    if (to.offset != kNetworkOutput) {
      check_room(planned.output);
      step.stored_channels =
          static_cast<int32_t>(round_up(planned.output.channel + planned.output.channels, group()) -
                               planned.output.channel);
    }
    step.weight_index = planned.weight_index;
    step.bias_index = planned.bias_index;
    step.scale_index = planned.scale_index;
    step.shift_index = planned.shift_index;
    return step;
  }

  // Windows that move, and are padded, alike in both directions and on all sides.
  static void require_window(const PlanStep& planned, const Buffer& from, const Buffer& to) {
    const PlanWindow& window = planned.window;
    const int64_t stride = window.stride_height, padding = window.padding_top;
    const auto windows = [&](int64_t size, int64_t kernel) {
      return (size + 2 * padding - kernel) / stride + 1;
    };
    require_plan(window.stride_width == stride && window.padding_left == padding &&
                     window.dilation_height == 1 && window.dilation_width == 1 &&
                     to.height == windows(from.height, window.kernel_height) &&
                     to.width == windows(from.width, window.kernel_width),
                 "a window is dilated, or not the same in both directions, for which no GPU has a "
                 "kernel");
    require_plan(!(planned.average && padding > 0),
                 "an average is padded, for which no GPU has a kernel");
  }

  static constexpr int64_t group() { return kGroup; }

  // Whole groups can be read and written, up to the end of the segment's last one.
  void check_room(const BufferSegment& segment) const {
    const Buffer& buffer = plan_.buffer_of(segment);
    require_plan(buffer.pitch % group() == 0 &&
                     round_up(segment.channel + segment.channels, group()) <= buffer.pitch,
                 "a buffer has no room for whole groups of 16 channels");
  }

  int64_t padded_channels(const PlanStep& planned) const {
    int64_t channels = 0;
    for (const BufferSegment& segment : planned.inputs)
      channels += round_up(segment.channels, group());
    return channels;
  }

  int64_t reserve_packed(int64_t elements, int64_t size) {
    const int64_t offset = header_.packed_bytes;
    header_.packed_bytes = round_up(offset + elements * size, kAlignment);
    return offset;
  }

  // Kernels count a weight's elements in 32 bits.
  int64_t reserve_weight(std::initializer_list<int64_t> sizes) {
    const std::string what =
        "the weight of a convolution, channels in groups of 16, or of the classifier";
    const int64_t elements = product_of_sizes(sizes, what);
    if (elements > kMostPixels) fail_plan(what + " has over 2^31 - 1024 elements");
    return reserve_packed(elements, bytes_of(dtype_));
  }

  void reserve_weights(Step& step, int64_t rows) {
    step.weight_columns = static_cast<int32_t>(round_up(int64_t{step.stored_channels}, group()));
    step.weight = reserve_weight(
        {step.window.kernel_height, step.window.kernel_width, rows, step.weight_columns});
    step.bias = reserve_packed(step.bias_index < 0 ? 0 : step.weight_columns, sizeof(float));
    step.scale = reserve_packed(step.scale_index < 0 ? 0 : rows, sizeof(float));
    step.shift = reserve_packed(step.shift_index < 0 ? 0 : rows, sizeof(float));
  }

  void add_stem(const PlanStep& planned) {
    Step step = begin(StepKind::kStem, planned);
    reserve_weights(step, planned.input_channels);
    steps_.push_back(step);
  }

  void add_convolution(const PlanStep& planned) {
    require_plan(planned.inputs.size() <= kMaxSegments,
                 "a convolution reads more than 16 segments");
    Step step = begin(StepKind::kConvolution, planned);
    reserve_weights(step, padded_channels(planned));
    Convolution problem{};
    problem.dtype = dtype_;
    problem.segment_count = static_cast<int32_t>(planned.inputs.size());
    for (int32_t i = 0; i < problem.segment_count; ++i) {
      problem.segments[i].channels =
          static_cast<int32_t>(round_up(planned.inputs[i].channels, group()));
    }
    problem.window = step.window;
    problem.weight_columns = step.weight_columns;
    problem.out_channels = step.stored_channels;
    step.configuration = choose(problem, device_);
    const int64_t floats = partial_floats(problem, step.configuration);
    require_size(floats, "the partial sums of a convolution");
    header_.partial_bytes =
        std::max(header_.partial_bytes, floats * static_cast<int64_t>(sizeof(float)));
    steps_.push_back(step);
  }

  void add_pool(const PlanStep& planned) { steps_.push_back(begin(StepKind::kPool, planned)); }

  // The average of whole maps that only a classifier reads, which ends the network.
  bool is_head(const PlanStep& pool, const PlanStep& linear) const {
    if (pool.kind != PlanStepKind::kPool || linear.kind != PlanStepKind::kConvolution) return false;
    const Buffer& from = plan_.buffer_of(pool.inputs[0]);
    const Buffer& pooled = plan_.buffer_of(pool.output);
    const Buffer& to = plan_.buffer_of(linear.output);
    const BufferSegment& input = linear.inputs[0];
    return pool.average && pool.window.kernel_height == from.height &&
           pool.window.kernel_width == from.width && pooled.height == 1 && pooled.width == 1 &&
           linear.inputs.size() == 1 && input.buffer == pool.output.buffer &&
           input.channel == pool.output.channel && input.channels == pool.output.channels &&
           readers_.at(input.buffer) == 1 && linear.scale_index < 0 &&
           linear.activation == kIdentity && linear.window.taps() == 1 &&
           linear.window.padding_top == 0 && to.offset == kNetworkOutput &&
           linear.output.channel == 0 && to.pitch == linear.output.channels &&
           round_up(input.channels, group()) <= kMaxHeadChannels;
  }

  void add_head(const PlanStep& pool, const PlanStep& linear) {
    Step step = begin(StepKind::kHead, pool);
    step.output = linear.output;
    step.stored_channels = static_cast<int32_t>(linear.output.channels);
    step.weight_index = linear.weight_index;
    step.bias_index = linear.bias_index;
    const int64_t channels = round_up(pool.inputs[0].channels, group());
    step.weight_columns = static_cast<int32_t>(channels);
    step.weight = reserve_weight({linear.output.channels, channels});
    step.bias = reserve_packed(step.bias_index < 0 ? 0 : linear.output.channels, sizeof(float));
    steps_.push_back(step);
  }

  template <typename T>
  void append(std::vector<std::byte>& bytes, const std::vector<T>& items, int64_t& offset,
              int64_t& count) const {
    offset = round_up(static_cast<int64_t>(bytes.size()), int64_t{64});
    count = static_cast<int64_t>(items.size());
    bytes.resize(offset + items.size() * sizeof(T));
    if (!items.empty()) std::memcpy(bytes.data() + offset, items.data(), items.size() * sizeof(T));
  }

  std::vector<std::byte> write() {
    std::vector<std::byte> bytes(sizeof(ProgramHeader));
    append(bytes, plan_.buffers, header_.buffers, header_.buffer_count);
    append(bytes, segments_, header_.segments, header_.segment_count);
    append(bytes, steps_, header_.steps, header_.step_count);
    header_.bytes = static_cast<int64_t>(bytes.size());
    std::memcpy(bytes.data(), &header_, sizeof header_);
    seal_program<ProgramHeader>(bytes.data(), header_.bytes);
    return bytes;
  }

  const Plan& plan_;
  DType dtype_;
  Device device_;
  ProgramHeader header_{};
  std::vector<BufferSegment> segments_;
  std::vector<Step> steps_;
  std::map<int64_t, int64_t> readers_;
};

}  // namespace

std::vector<std::byte> compile(const int64_t* description, int64_t length, DType dtype,
                               const Device& device) {
  const Plan plan = read_plan(description, length);
  return Compiler(plan, dtype, device).compile();
}

std::vector<Algorithm> algorithms_of(const Program& program) {
  std::vector<Algorithm> algorithms;
  for (int64_t i = 0; i < program.header().step_count; ++i) {
    const Step& step = program.step(i);
    Algorithm algorithm{step.kind, 0, 0, 0, 1};
    if (step.kind == StepKind::kConvolution) {
      const Tile tile = tile_of(program.dtype(), step.configuration.tile);
      algorithm = {step.kind, tile.pixels, tile.columns, tile.depth, step.configuration.parts};
    }
    algorithms.push_back(algorithm);
    if (step.kind == StepKind::kHead) algorithms.push_back(algorithm);
  }
  return algorithms;
}

Program::Program(const void* bytes, int64_t size) : bytes_(static_cast<const std::byte*>(bytes)) {
  if (!is_sealed<ProgramHeader>(bytes, size, kMagic, kVersion))
    throw std::invalid_argument(
        "threshnet_fast: program is not one that this process compiled, or was changed");
}

}  // namespace threshnet_fast::cuda
