#include <algorithm>
#include <cmath>
#include <cstring>

#include "program.h"

namespace threshnet_fast::cpu {
namespace {

class Run {
 public:
  Run(const TrainingProgram& program, const TrainingPass& pass, ParallelFor parallel_for)
      : program_(program),
        header_(program.header()),
        pass_(pass),
        workers_{header_.isa, header_.threads, parallel_for} {}

  void forward() const {
    std::vector<char> from_batch(header_.buffer_count, 0);
    for (int64_t i = 0; i < header_.norm_count; ++i) {
      const TrainingNorm& norm = program_.norm(i);
      if (pass_.norms[i].from_batch) {
        from_batch[norm.buffer] = 1;
      } else {
        keep_running_statistics(norm, pass_.norms[i]);
      }
    }
    for (int64_t i = 0; i < header_.node_count; ++i) {
      const TrainingNode& node = program_.node(i);
      const TrainingBuffer& buffer = program_.buffer(node.buffer);
      prepare_prologue(node);
      Statistics statistics = {nullptr, nullptr};
      if (from_batch[node.buffer]) {
        float* const mean = pass_.kept + buffer.statistics + node.channel;
        statistics = {mean, mean + buffer.channels};
      }
      run_node(node, false, statistics);
    }
    for (int64_t i = 0; i < header_.norm_count; ++i) update_running_statistics(i);
  }

  void backward() const {
    std::memset(work(), 0, header_.correction_floats * sizeof(float));
    for (int64_t i = header_.node_count - 1; i >= 0; --i) {
      const TrainingNode& node = program_.node(i);
      const int64_t* const rerun = program_.at<int64_t>(node.rerun);
      for (int64_t r = 0; r < node.rerun_count; ++r)
        run_node(program_.node(rerun[r]), true, {nullptr, nullptr});
      clear_gradients(node);
      run_node_back(node);
      if (node.wants_inputs) add_to_norms(node);
    }
    if (pass_.input_gradient != nullptr) correct_input_gradient();
  }

 private:
  float* work() const { return pass_.scratch + header_.work; }

  float* at(const Place& place) const {
    switch (place.memory) {
      case Memory::kInput:
        return const_cast<float*>(pass_.input);
      case Memory::kOutput:
        return pass_.output;
      case Memory::kKept:
        return pass_.kept + place.offset;
      case Memory::kScratch:
        return pass_.scratch + place.offset;
      case Memory::kInputGradient:
        return pass_.input_gradient;
      case Memory::kGradient:
        return pass_.gradient;
      case Memory::kNone:
        break;
    }
    return nullptr;
  }

  float* map_of(int64_t buffer, bool back) const {
    const TrainingBuffer& of = program_.buffer(buffer);
    return at(back ? of.map_back : of.map);
  }

  const TrainingRead* reads_of(const TrainingNode& node) const {
    return program_.at<TrainingRead>(node.reads);
  }

  MapSegment input_of(const TrainingRead& read, bool back) const {
    return {map_of(read.buffer, back) + read.channel, program_.buffer(read.buffer).channels,
            read.channels};
  }

  GradientSegment gradient_of(const TrainingRead& read) const {
    const TrainingBuffer& buffer = program_.buffer(read.buffer);
    return {at(buffer.gradient) + read.channel, buffer.channels, read.accumulate != 0};
  }

  // The statistics that a norm takes.
  Normalization normalization(int64_t index) const {
    const TrainingNorm& norm = program_.norm(index);
    const TrainingNormParameters& given = pass_.norms[index];
    const TrainingBuffer& buffer = program_.buffer(norm.buffer);
    const bool batch = given.from_batch;
    const float* const mean = pass_.kept + (batch ? buffer.statistics + norm.channel : norm.fixed);
    const float* const variance = mean + (batch ? buffer.channels : norm.channels);
    return {mean, variance, given.gamma, given.beta, given.eps};
  }

  void keep_running_statistics(const TrainingNorm& norm,
                               const TrainingNormParameters& given) const {
    float* const mean = pass_.kept + norm.fixed;
    float* const variance = mean + norm.channels;
    for (int64_t c = 0; c < norm.channels; ++c) {
      mean[c] = given.running_mean.data[c * given.running_mean.stride];
      variance[c] = given.running_variance.data[c * given.running_variance.stride];
    }
  }

  void prepare_prologue(const TrainingNode& node) const {
    float* const scale = pass_.kept + node.prologue;
    const int64_t pitch = node.input_channels;
    const TrainingRead* const reads = reads_of(node);
    for (int64_t r = 0; r < node.read_count; ++r) {
      const TrainingRead& read = reads[r];
      float* const to = scale + read.start;
      if (read.norm < 0) {
        std::fill_n(to, read.channels, 1.0f);
        std::fill_n(to + pitch, read.channels, 0.0f);
        std::fill_n(to + 2 * pitch, read.channels, 0.0f);
      } else if (read.prologue >= 0) {
        for (int64_t row = 0; row < 3; ++row)
          std::copy_n(pass_.kept + read.prologue + row * read.pitch, read.channels,
                      to + row * pitch);
      } else {
        const Normalization norm = normalization(read.norm);
        normalization_prologue(norm, read.channels, to, to + pitch);
        std::copy_n(norm.mean, read.channels, to + 2 * pitch);
      }
    }
  }

  template <typename Step>
  void bind_prologue(Step& step, const TrainingNode& node) const {
    const float* const scale = pass_.kept + node.prologue;
    step.window = node.window;
    step.prologue = {scale, scale + node.input_channels, static_cast<Activation>(node.activation)};
  }

  // What a depthwise convolution multiplies by; an average pool, every pixel by the same.
  template <typename Step>
  void bind_depthwise_weight(Step& step, const TrainingNode& node, const float& average) const {
    if (node.weight >= 0) {
      step.weight = pass_.weights[node.weight].data;
      step.strides = pass_.weights[node.weight].strides;
    } else {
      step.weight = &average;
      step.strides = {0, 0, 0, 0};
    }
  }

  static float average_of(const TrainingNode& node) {
    return static_cast<float>(1.0 / static_cast<double>(node.window.taps()));
  }

  void run_node(const TrainingNode& node, bool again, const Statistics& statistics) const {
    float* const output = map_of(node.buffer, again) + node.channel;
    const int64_t pitch = program_.buffer(node.buffer).channels;
    const TrainingRead* const reads = reads_of(node);
    const auto bind = [&](auto& step) {
      bind_prologue(step, node);
      step.output = output;
      step.output_pitch = pitch;
      step.statistics = statistics;
    };
    if (node.kind == RawKind::kConvolution) {
      ConvolutionForward step = {};
      bind(step);
      step.winograd = header_.winograd;
      for (int64_t r = 0; r < node.read_count; ++r)
        step.inputs.push_back(input_of(reads[r], again));
      step.weight = pass_.weights[node.weight].data;
      step.strides = pass_.weights[node.weight].strides;
      step.output_channels = node.channels;
      convolution_forward(step, pass_.workspace, workers_);
    } else if (node.kind == RawKind::kMaxPool) {
      PoolForward step = {};
      bind(step);
      step.input = input_of(reads[0], again);
      pool_forward(step, pass_.workspace, workers_);
    } else {
      const float average = average_of(node);
      DepthwiseForward step = {};
      bind(step);
      step.input = input_of(reads[0], again);
      bind_depthwise_weight(step, node, average);
      depthwise_forward(step, pass_.workspace, workers_);
    }
  }

  void run_node_back(const TrainingNode& node) const {
    const TrainingBuffer& buffer = program_.buffer(node.buffer);
    const TrainingRead* const reads = reads_of(node);
    float* const sums = work() + header_.sums;
    const auto bind = [&](auto& step) {
      bind_prologue(step, node);
      step.mean = step.prologue.scale + 2 * node.input_channels;
      step.output = {map_of(node.buffer, true) + node.channel, buffer.channels, node.channels};
      step.gradient = {at(buffer.gradient) + node.channel, buffer.channels, node.channels};
      step.slope = work() + buffer.correction + node.channel;
      step.offset = step.slope + buffer.channels;
      step.sums = node.wants_inputs ? sums : nullptr;
    };
    if (node.kind == RawKind::kConvolution) {
      const TrainingWeight& weight = pass_.weights[node.weight];
      if (!node.wants_inputs && weight.gradient == nullptr) return;
      ConvolutionBackward step = {};
      bind(step);
      step.winograd = header_.winograd;
      for (int64_t r = 0; r < node.read_count; ++r) {
        step.inputs.push_back(input_of(reads[r], true));
        if (node.wants_inputs) step.input_gradients.push_back(gradient_of(reads[r]));
      }
      step.weight = weight.data;
      step.strides = weight.strides;
      step.output_channels = node.channels;
      step.weight_gradient = weight.gradient;
      step.gradient_strides = weight.gradient_strides;
      convolution_backward(step, pass_.workspace, workers_);
    } else if (node.kind == RawKind::kMaxPool) {
      if (!node.wants_inputs) return;
      PoolBackward step = {};
      bind(step);
      step.input = input_of(reads[0], true);
      step.input_gradient = gradient_of(reads[0]);
      pool_backward(step, pass_.workspace, workers_);
    } else {
      const float average = average_of(node);
      DepthwiseBackward step = {};
      bind(step);
      step.input = input_of(reads[0], true);
      bind_depthwise_weight(step, node, average);
      if (node.wants_inputs) step.input_gradient = gradient_of(reads[0]);
      if (node.weight >= 0) {
        step.weight_gradient = pass_.weights[node.weight].gradient;
        step.gradient_strides = pass_.weights[node.weight].gradient_strides;
      }
      if (!node.wants_inputs && step.weight_gradient == nullptr) return;
      depthwise_backward(step, pass_.workspace, workers_);
    }
  }

  void clear_gradients(const TrainingNode& node) const {
    const BufferSegment* const zeros = program_.at<BufferSegment>(node.zeros);
    for (int64_t z = 0; z < node.zero_count; ++z) {
      const TrainingBuffer& buffer = program_.buffer(zeros[z].buffer);
      float* to = at(buffer.gradient) + zeros[z].channel;
      for (int64_t pixel = 0; pixel < buffer.pixels; ++pixel, to += buffer.channels)
        std::memset(to, 0, zeros[z].channels * sizeof(float));
    }
  }

  // Of each norm that a node reads through, adds up what its readers found; after the last of them,
  // turns that into gradients and the map's correction.
  void add_to_norms(const TrainingNode& node) const {
    const TrainingRead* const reads = reads_of(node);
    for (int64_t r = 0; r < node.read_count; ++r) {
      const TrainingRead& read = reads[r];
      if (read.norm < 0) continue;
      const TrainingNorm& norm = program_.norm(read.norm);
      const float* found = work() + header_.sums + read.start;
      int64_t pitch = node.input_channels;
      if (!read.first_sum || !read.last_sum) {
        float* const total = work() + norm.sums;
        for (int64_t row = 0; row < 2; ++row) {
          const float* const from = found + row * pitch;
          float* const to = total + row * norm.channels;
          for (int64_t c = 0; c < norm.channels; ++c)
            to[c] = read.first_sum ? from[c] : to[c] + from[c];
        }
        found = total;
        pitch = norm.channels;
      }
      if (!read.last_sum) continue;
      const TrainingNormParameters& given = pass_.norms[read.norm];
      const TrainingBuffer& buffer = program_.buffer(norm.buffer);
      NormalizationBackward step = {};
      step.norm = normalization(read.norm);
      step.sums = found;
      step.sums_pitch = pitch;
      step.count = buffer.pixels;
      step.gamma_gradient = given.gamma_gradient;
      step.beta_gradient = given.beta_gradient;
      if (given.from_batch) {
        step.slope = work() + buffer.correction + norm.channel;
        step.offset = step.slope + buffer.channels;
      }
      normalization_backward(step, norm.channels);
    }
  }

  // Adds to the input's gradient what its norms do through mean and variance.
  void correct_input_gradient() const {
    const TrainingBuffer& buffer = program_.buffer(0);
    const float* const slope = work() + buffer.correction;
    const float* const offset = slope + buffer.channels;
    const float* map = pass_.input;
    float* to = pass_.input_gradient;
    for (int64_t pixel = 0; pixel < buffer.pixels; ++pixel) {
      for (int64_t c = 0; c < buffer.channels; ++c) to[c] = to[c] - map[c] * slope[c] + offset[c];
      map += buffer.channels;
      to += buffer.channels;
    }
  }

  // As BatchNorm does: the running variance is that without bias.
  void update_running_statistics(int64_t index) const {
    const TrainingNormParameters& given = pass_.norms[index];
    if (std::isnan(given.momentum) || given.running_mean.data == nullptr) return;
    const TrainingNorm& norm = program_.norm(index);
    const Normalization batch = normalization(index);
    const double count = static_cast<double>(program_.buffer(norm.buffer).pixels);
    follow(given.running_mean, batch.mean, 1, given.momentum, norm.channels);
    follow(given.running_variance, batch.variance, static_cast<float>(count / (count - 1)),
           given.momentum, norm.channels);
  }

  // to + (from * factor - to) * momentum, from the nearer end. The product is exact in float64, so
  // that the result is that of a fused multiply-add, which PyTorch uses.
  static void follow(const RunningVector& to, const float* from, float factor, double momentum,
                     int64_t channels) {
    const float weight = static_cast<float>(momentum);
    const bool small = std::abs(weight) < 0.5f;
    const double step = small ? weight : weight - 1.0f;
    for (int64_t c = 0; c < channels; ++c) {
      float& value = to.data[c * to.stride];
      const float end = from[c] * factor;
      const float difference = end - value;
      value = static_cast<float>(static_cast<double>(small ? value : end) +
                                 step * static_cast<double>(difference));
    }
  }

  const TrainingProgram& program_;
  const TrainingHeader& header_;
  const TrainingPass& pass_;
  const Workers workers_;
};

}  // namespace

void run_forward(const TrainingProgram& program, const TrainingPass& pass,
                 ParallelFor parallel_for) {
  Run(program, pass, parallel_for).forward();
}

void run_backward(const TrainingProgram& program, const TrainingPass& pass,
                  ParallelFor parallel_for) {
  Run(program, pass, parallel_for).backward();
}

}  // namespace threshnet_fast::cpu
