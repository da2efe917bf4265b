#include "program.h"

#include <algorithm>
#include <limits>
#include <string>

#include "cpu/tiles.h"
#include "seal.h"

namespace threshnet_fast::cpu {
namespace {

constexpr int64_t kForever = std::numeric_limits<int64_t>::max();

// Floats that are needed from one step to another, both included.
struct Lifetime {
  int64_t floats, first, last;

  bool meets(const Lifetime& other) const { return first <= other.last && other.first <= last; }
};

// Places of floats in one piece of memory.
class Layout {
 public:
  // Reserves floats at the lowest offset that is free all the while; not before `from`.
  int64_t place(const Lifetime& life, int64_t from = 0) {
    int64_t offset = from;
    // In the order of their offsets.
    for (const Placed& other : placed_) {
      if (!other.life.meets(life)) continue;
      if (other.offset >= offset + life.floats) break;
      offset = std::max(offset, other.offset + other.life.floats);
    }
    const Placed placed = {life, offset};
    placed_.insert(
        std::upper_bound(placed_.begin(), placed_.end(), placed,
                         [](const Placed& a, const Placed& b) { return a.offset < b.offset; }),
        placed);
    size_ = std::max(size_, offset + life.floats);
    require_size(size_, "the memory of a pass");
    return offset;
  }

  int64_t size() const { return size_; }

 private:
  struct Placed {
    Lifetime life;
    int64_t offset;
  };
  std::vector<Placed> placed_;
  int64_t size_ = 0;
};

class Compiler {
 public:
  Compiler(RawPlan plan, const TrainingTarget& target)
      : plan_(std::move(plan)), target_(target), count_(size_of(plan_.nodes)) {
    header_.magic = kTrainingMagic;
    header_.version = kTrainingVersion;
    header_.isa = target.isa;
    header_.threads = target.threads;
    header_.winograd = target.winograd;
    header_.batch = target.batch;
    header_.height = target.height;
    header_.width = target.width;
    header_.input_channels = plan_.buffers[0].channels;
    header_.output = plan_.output;
    header_.backward = target.backward;
    header_.repeatable = target.repeatable;
    header_.input_gradient = target.input_gradient;
  }

  std::vector<std::byte> compile() {
    find_shapes();
    number_parameters();
    place_kept();
    find_gradients();
    place_scratch();
    reserve_workspace();
    return write();
  }

 private:
  template <typename T>
  static int64_t size_of(const std::vector<T>& items) {
    return static_cast<int64_t>(items.size());
  }

  // The step at which a node goes back: steps before are those forward.
  int64_t back(int64_t node) const { return 2 * count_ - 1 - node; }

  void find_shapes() {
    struct Shape {
      int64_t height, width;
    };
    std::vector<Shape> shapes(plan_.buffers.size(), Shape{0, 0});
    shapes[0] = {target_.height, target_.width};
    for (const RawNode& raw : plan_.nodes) {
      const Shape shape = shapes[raw.reads[0].buffer];
      for (const RawRead& read : raw.reads)
        require_plan(
            shapes[read.buffer].height == shape.height && shapes[read.buffer].width == shape.width,
            "a node reads maps of several sizes");
      TrainingNode node{};
      node.kind = raw.kind;
      node.activation = raw.activation;
      node.buffer = raw.buffer;
      node.channel = raw.channel;
      node.channels = raw.channels;
      node.input_channels = raw.input_channels;
      node.window = {target_.batch, shape.height, shape.width, raw.kernel,
                     raw.kernel,    raw.stride,   raw.padding};
      require_plan(shape.height + 2 * raw.padding >= raw.kernel &&
                       shape.width + 2 * raw.padding >= raw.kernel,
                   "a window is larger than the padded map");
      Shape& after = shapes[raw.buffer];
      const Shape output = {node.window.output_height(), node.window.output_width()};
      require_plan(
          after.height == 0 || (after.height == output.height && after.width == output.width),
          "maps of several sizes are written to a buffer");
      after = output;
      nodes_.push_back(node);
    }
    for (size_t i = 0; i < plan_.buffers.size(); ++i) {
      TrainingBuffer buffer{};
      buffer.channels = plan_.buffers[i].channels;
      const std::string name = "buffer " + std::to_string(i);
      buffer.pixels = product_of_sizes({target_.batch, shapes[i].height, shapes[i].width}, name);
      product_of_sizes({buffer.pixels, buffer.channels}, name);
      buffers_.push_back(buffer);
    }
    header_.output_height = shapes[plan_.output].height;
    header_.output_width = shapes[plan_.output].width;
  }

  // Weights of the convolutions, then gamma and beta of the norms.
  void number_parameters() {
    for (TrainingNode& node : nodes_) {
      const bool pool = node.kind == RawKind::kMaxPool || node.kind == RawKind::kAveragePool;
      node.weight = pool ? -1 : header_.weight_count++;
      if (!pool)
        product_of_sizes({node.input_channels, node.channels, node.window.taps()}, "a weight");
    }
    header_.parameter_count = header_.weight_count + 2 * size_of(plan_.norms);
  }

  int64_t keep(int64_t floats) { return memory_.place({round_up(floats, 16), 0, kForever}); }
  int64_t floats_of(int64_t buffer) const {
    return round_up(buffers_[buffer].pixels * buffers_[buffer].channels, 16);
  }
  bool is_recalculated(int64_t buffer) const {
    return target_.backward && target_.checkpoint && plan_.buffers[buffer].temporary;
  }

  // Statistics, prologues and maps; the input's statistics and then the norms' come first.
  void place_kept() {
    for (TrainingBuffer& buffer : buffers_) {
      if (&buffer == &buffers_[0]) buffer.statistics = keep(2 * buffer.channels);
    }
    for (const RawNorm& raw : plan_.norms)
      norms_.push_back({raw.buffer, raw.channel, raw.channels, keep(2 * raw.channels), 0});
    for (TrainingBuffer& buffer : buffers_) {
      if (&buffer != &buffers_[0]) buffer.statistics = keep(2 * buffer.channels);
    }
    for (TrainingNode& node : nodes_) node.prologue = keep(3 * node.input_channels);
    work_floats_ = find_work();
    if (target_.backward) work_ = keep(work_floats_);
    buffers_[0].map = {Memory::kInput, 0};
    buffers_[plan_.output].map = {Memory::kOutput, 0};
    // Those that are calculated again lie where maps that are kept are to be written later.
    for (const bool recalculated : {false, true}) {
      for (int64_t i = 0; i < count_; ++i) {
        const int64_t index = plan_.nodes[i].buffer;
        const RawBuffer& buffer = plan_.buffers[index];
        if (index == plan_.output || buffer.writers[0] != i ||
            is_recalculated(index) != recalculated)
          continue;
        Lifetime life = {floats_of(index), i, back(i)};
        if (!target_.backward || recalculated) life.last = buffer.readers.back();
        if (target_.repeatable && !recalculated) life.last = kForever;
        buffers_[index].map = {Memory::kKept, memory_.place(life)};
      }
    }
    header_.kept_floats = memory_.size();
    for (TrainingBuffer& buffer : buffers_) buffer.map_back = buffer.map;
  }

  // Goes back over all nodes: what each adds to, clears and calculates again.
  void find_gradients() {
    std::vector<std::vector<bool>> written;
    for (const TrainingBuffer& buffer : buffers_)
      written.emplace_back(buffer.channels, &buffer == &buffers_[plan_.output]);
    std::vector<bool> there(buffers_.size(), true);
    for (size_t i = 0; i < buffers_.size(); ++i) there[i] = !is_recalculated(i);
    std::vector<int64_t> left(norms_.size()), readers(norms_.size());
    for (const RawNode& node : plan_.nodes) {
      for (const RawRead& read : node.reads) {
        if (read.norm >= 0) ++readers[read.norm];
      }
    }
    left = readers;
    gradient_begins_.assign(buffers_.size(), -1);
    reads_.resize(count_);
    zeros_.resize(count_);
    rerun_.resize(count_);
    find_prologues();
    for (int64_t i = count_ - 1; target_.backward && i >= 0; --i) {
      const RawNode& raw = plan_.nodes[i];
      TrainingNode& node = nodes_[i];
      // What no reader has left a gradient for.
      clear(written[raw.buffer], {raw.buffer, raw.channel, raw.channels}, i);
      node.wants_inputs = target_.input_gradient;
      for (const RawRead& read : raw.reads) node.wants_inputs |= read.buffer != 0 || read.norm >= 0;
      const Window& window = node.window;
      require_plan(!node.wants_inputs || node.kind != RawKind::kConvolution ||
                       (window.stride == 1 && window.output_height() == window.height &&
                        window.output_width() == window.width),
                   "a convolution that changes the size of the map has to lead a gradient back");
      for (size_t r = 0; r < raw.reads.size(); ++r) {
        const RawRead& from = raw.reads[r];
        TrainingRead& read = reads_[i][r];
        if (!there[from.buffer]) {
          there[from.buffer] = true;
          rerun_[i].push_back(plan_.buffers[from.buffer].writers[0]);
        }
        if (!node.wants_inputs) continue;
        read.accumulate =
            claim(written[from.buffer], {from.buffer, from.channel, from.channels}, i);
        if (from.norm < 0) continue;
        read.first_sum = left[from.norm] == readers[from.norm];
        read.last_sum = --left[from.norm] == 0;
      }
    }
    if (target_.input_gradient) clear(written[0], {0, 0, buffers_[0].channels}, 0);
  }

  // Whether a gradient is there that others are added to; if in part, the rest is cleared.
  bool claim(std::vector<bool>& written, const BufferSegment& segment, int64_t node) {
    touch(segment.buffer, node);
    const auto begin = written.begin() + segment.channel;
    const bool any = std::find(begin, begin + segment.channels, true) != begin + segment.channels;
    if (any) clear(written, segment, node);
    std::fill_n(begin, segment.channels, true);
    return any;
  }

  // Clears the channels that nothing was written to.
  void clear(std::vector<bool>& written, const BufferSegment& segment, int64_t node) {
    for (int64_t c = segment.channel; c < segment.channel + segment.channels; ++c) {
      if (written[c]) continue;
      written[c] = true;
      touch(segment.buffer, node);
      std::vector<BufferSegment>& zeros = zeros_[node];
      if (!zeros.empty() && zeros.back().buffer == segment.buffer &&
          zeros.back().channel + zeros.back().channels == c) {
        ++zeros.back().channels;
      } else {
        zeros.push_back({segment.buffer, c, 1});
      }
    }
  }

  void touch(int64_t buffer, int64_t node) {
    if (gradient_begins_[buffer] < 0) gradient_begins_[buffer] = back(node);
  }

  void find_prologues() {
    std::vector<int64_t> first(norms_.size(), -1), pitch(norms_.size());
    for (int64_t i = 0; i < count_; ++i) {
      int64_t start = 0;
      for (const RawRead& from : plan_.nodes[i].reads) {
        TrainingRead read{
            from.buffer, from.channel, from.channels, from.norm, start, -1, 0, 0, 0, 0};
        if (from.norm >= 0) {
          read.prologue = first[from.norm];
          read.pitch = pitch[from.norm];
          if (read.prologue < 0) {
            first[from.norm] = nodes_[i].prologue + start;
            pitch[from.norm] = nodes_[i].input_channels;
          }
        }
        start += from.channels;
        reads_[i].push_back(read);
      }
    }
  }

  // What the pass backward works with all the time, in a piece: corrections, sums of each norm, and
  // those of a node. Offsets are from the beginning of it.
  int64_t find_work() {
    int64_t floats = 0;
    const auto reserve = [&](int64_t count) {
      floats += round_up(count, 16);
      return floats - round_up(count, 16);
    };
    for (TrainingBuffer& buffer : buffers_) buffer.correction = reserve(2 * buffer.channels);
    header_.correction_floats = floats;
    for (TrainingNorm& norm : norms_) norm.sums = reserve(2 * norm.channels);
    int64_t most = 0;
    for (const TrainingNode& node : nodes_) most = std::max(most, node.input_channels);
    header_.sums = reserve(2 * most);
    return floats;
  }

  void place_scratch() {
    if (!target_.backward) return;
    // A pass that is run again writes to nothing that is kept, even where there is a place for it.
    header_.work =
        (target_.repeatable ? memory_.place({work_floats_, 0, kForever}, header_.kept_floats)
                            : work_) -
        header_.kept_floats;
    std::vector<Wanted> wanted;
    for (int64_t i = 0; i < size_of(buffers_); ++i) {
      const RawBuffer& raw = plan_.buffers[i];
      TrainingBuffer& buffer = buffers_[i];
      if (i == plan_.output) {
        buffer.gradient = {Memory::kGradient, 0};
        continue;
      }
      if (i == 0 && target_.input_gradient) {
        buffer.gradient = {Memory::kInputGradient, 0};
      } else if (gradient_begins_[i] >= 0) {
        const int64_t last = i == 0 ? kForever : back(raw.writers[0]);
        wanted.push_back({{floats_of(i), gradient_begins_[i], last}, &buffer.gradient});
      }
      if (is_recalculated(i))
        wanted.push_back(
            {{floats_of(i), back(raw.readers.back()), back(raw.writers[0])}, &buffer.map_back});
    }
    place_best(wanted);
    header_.scratch_floats = memory_.size() - header_.kept_floats;
  }

  struct Wanted {
    Lifetime life;
    Place* place;
  };

  // Places the largest first, then again and again what reached furthest before all others; the
  // attempt counts that takes least memory.
  void place_best(std::vector<Wanted> wanted) {
    constexpr int kAttempts = 32;
    // Where a pass is run again, nothing that it keeps may be written to.
    const int64_t from = target_.repeatable ? header_.kept_floats : 0;
    const Layout before = memory_;
    std::stable_sort(wanted.begin(), wanted.end(), [](const Wanted& a, const Wanted& b) {
      return a.life.floats > b.life.floats;
    });
    for (int attempt = 0; attempt < kAttempts; ++attempt) {
      Layout layout = before;
      std::vector<int64_t> offsets;
      size_t furthest = 0;
      for (size_t i = 0; i < wanted.size(); ++i) {
        offsets.push_back(layout.place(wanted[i].life, from));
        if (offsets[i] + wanted[i].life.floats == layout.size()) furthest = i;
      }
      if (attempt == 0 || layout.size() < memory_.size()) {
        memory_ = layout;
        for (size_t i = 0; i < wanted.size(); ++i)
          *wanted[i].place = {Memory::kScratch, offsets[i] - header_.kept_floats};
      }
      if (furthest == 0) return;
      std::rotate(wanted.begin(), wanted.begin() + static_cast<int64_t>(furthest),
                  wanted.begin() + static_cast<int64_t>(furthest) + 1);
    }
  }

  void reserve_workspace() {
    const Workers workers = {target_.isa, target_.threads, nullptr};
    for (const TrainingNode& node : nodes_) {
      int64_t floats = 0;
      if (node.kind == RawKind::kMaxPool) {
        floats = pool_workspace(node.window, node.channels, workers);
      } else if (node.kind == RawKind::kConvolution) {
        floats = convolution_workspace(node.window, node.input_channels, node.channels,
                                       node.wants_inputs != 0, target_.winograd, workers);
      } else {
        floats = depthwise_workspace(node.window, node.channels, workers);
      }
      require_size(floats, "the workspace");
      header_.workspace_floats = std::max(header_.workspace_floats, floats);
    }
  }

  template <typename T>
  int64_t append(const std::vector<T>& items) {
    const int64_t offset = round_up(size_of(bytes_), 64);
    const std::byte* const from = reinterpret_cast<const std::byte*>(items.data());
    bytes_.resize(offset);
    bytes_.insert(bytes_.end(), from, from + items.size() * sizeof(T));
    return offset;
  }

  std::vector<std::byte> write() {
    bytes_.resize(sizeof(TrainingHeader));
    for (int64_t i = 0; i < count_; ++i) {
      TrainingNode& node = nodes_[i];
      node.reads = append(reads_[i]);
      node.read_count = size_of(reads_[i]);
      node.zeros = append(zeros_[i]);
      node.zero_count = size_of(zeros_[i]);
      node.rerun = append(rerun_[i]);
      node.rerun_count = size_of(rerun_[i]);
    }
    header_.buffers = append(buffers_);
    header_.buffer_count = size_of(buffers_);
    header_.norms = append(norms_);
    header_.norm_count = size_of(norms_);
    header_.nodes = append(nodes_);
    header_.node_count = count_;
    header_.bytes = size_of(bytes_);
    *reinterpret_cast<TrainingHeader*>(bytes_.data()) = header_;
    seal_program<TrainingHeader>(bytes_.data(), header_.bytes);
    return std::move(bytes_);
  }

  const RawPlan plan_;
  const TrainingTarget target_;
  const int64_t count_;
  TrainingHeader header_{};
  Layout memory_;
  int64_t work_ = 0, work_floats_ = 0;
  std::vector<TrainingBuffer> buffers_;
  std::vector<TrainingNorm> norms_;
  std::vector<TrainingNode> nodes_;
  std::vector<std::vector<TrainingRead>> reads_;   // of each node
  std::vector<std::vector<BufferSegment>> zeros_;  // of each node
  std::vector<std::vector<int64_t>> rerun_;        // before each node
  std::vector<int64_t> gradient_begins_;           // of each buffer, the step
  std::vector<std::byte> bytes_;
};

void check_target(const TrainingTarget& target) {
  const auto check = [](const char* name, int64_t value, int64_t most) {
    if (value < 1 || value > most)
      throw std::invalid_argument("threshnet_fast: " + std::string(name) + " is " +
                                  std::to_string(value) + ", expected 1 to " +
                                  std::to_string(most));
  };
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  check("batch", target.batch, kMost);
  check("height", target.height, kMost);
  check("width", target.width, kMost);
  check("threads", target.threads, kMostThreads);
}

}  // namespace

std::vector<std::byte> compile_training(const int64_t* description, int64_t length,
                                        const TrainingTarget& target) {
  check_target(target);
  return Compiler(read_raw_plan(description, length), target).compile();
}

int64_t convolution_workspace(const Window& window, int64_t input_channels, int64_t output_channels,
                              bool input_gradients, int64_t winograd, const Workers& workers) {
  ConvolutionForward forward = {};
  forward.window = window;
  forward.winograd = winograd;
  forward.inputs = {{nullptr, input_channels, input_channels}};
  forward.output_channels = output_channels;
  int64_t floats = workspace_floats(forward, workers);
  float placeholder = 0;
  ConvolutionBackward backward = {};
  backward.window = window;
  backward.winograd = winograd;
  backward.inputs = forward.inputs;
  backward.output_channels = output_channels;
  // Each of the gradients may be left out of a call.
  for (float* const weight_gradient : {&placeholder, static_cast<float*>(nullptr)}) {
    backward.weight_gradient = weight_gradient;
    backward.input_gradients.clear();
    floats = std::max(floats, workspace_floats(backward, workers));
    if (!input_gradients) continue;
    backward.input_gradients.resize(1);
    floats = std::max(floats, workspace_floats(backward, workers));
  }
  return floats;
}

int64_t depthwise_workspace(const Window& window, int64_t channels, const Workers& workers) {
  DepthwiseForward forward = {};
  forward.window = window;
  forward.input.channels = channels;
  DepthwiseBackward backward = {};
  backward.window = window;
  backward.input.channels = channels;
  float placeholder = 0;
  backward.weight_gradient = &placeholder;
  return std::max(workspace_floats(forward, workers), workspace_floats(backward, workers));
}

int64_t pool_workspace(const Window& window, int64_t channels, const Workers& workers) {
  PoolForward forward = {};
  forward.window = window;
  forward.input.channels = channels;
  PoolBackward backward = {};
  backward.window = window;
  backward.input.channels = channels;
  return std::max(workspace_floats(forward), workspace_floats(backward, workers));
}

TrainingProgram::TrainingProgram(const void* bytes, int64_t size)
    : bytes_(static_cast<const std::byte*>(bytes)) {
  if (!is_sealed<TrainingHeader>(bytes, size, kTrainingMagic, kTrainingVersion))
    throw std::invalid_argument(
        "threshnet_fast: program is not one of training that this process compiled, or was "
        "changed");
}

}  // namespace threshnet_fast::cpu
