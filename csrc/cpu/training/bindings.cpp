// The operators of training for torch, registered through the LibTorch stable ABI. Checks of
// tensors and registration, nothing else.
//
// A map is a contiguous float32 tensor [pixels, channels] in NHWC order; `segments` holds a first
// channel and a number of channels for each of `maps`. `window` is [N, H, W, kh, kw, stride,
// padding], of the input. A tensor without elements stands for none; one of which the storage was
// freed does not.
#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "checks.h"
#include "program.h"

namespace threshnet_fast {
namespace {

cpu::Window window_of(const std::vector<int64_t>& numbers) {
  constexpr int64_t kLimit = int64_t{1} << 31;
  check(numbers.size() == 7, "window has " + std::to_string(numbers.size()) +
                                 " numbers, expected 7: N, H, W, kh, kw, stride, padding");
  for (size_t i = 0; i < numbers.size(); ++i)
    check(numbers[i] >= (i == 6 ? 0 : 1) && numbers[i] < kLimit,
          "window[" + std::to_string(i) + "] is " + std::to_string(numbers[i]) +
              ", which is out of range");
  const cpu::Window window = {numbers[0], numbers[1], numbers[2], numbers[3],
                              numbers[4], numbers[5], numbers[6]};
  constexpr double kMostPixels = 1e15;
  check(static_cast<double>(window.batch) *
                static_cast<double>(window.height + 2 * window.padding) *
                static_cast<double>(window.width + 2 * window.padding) <
            kMostPixels,
        "window has more pixels than any memory");
  check(window.taps() <= cpu::kMostTaps, "window has " + std::to_string(window.taps()) +
                                             " taps, expected at most " +
                                             std::to_string(cpu::kMostTaps));
  check(window.padding < window.kernel_height && window.padding < window.kernel_width &&
            window.height + 2 * window.padding >= window.kernel_height &&
            window.width + 2 * window.padding >= window.kernel_width,
        "window does not fit the map that it slides over");
  return window;
}

cpu::Activation activation_of(int64_t activation) {
  check(activation >= cpu::kIdentity && activation <= cpu::kRelu6,
        "activation is " + std::to_string(activation) + ", expected 0 to 2");
  return static_cast<cpu::Activation>(activation);
}

// Channels of one map.
cpu::MapSegment segment_of(const Tensor& map, const std::string& name, int64_t pixels,
                           int64_t first, int64_t channels) {
  check(map.dim() == 2 && map.size(0) == pixels, name + " has shape " + shape_of(map) +
                                                     ", expected [" + std::to_string(pixels) +
                                                     ", channels]");
  check(first >= 0 && channels >= 1 && channels <= map.size(1) - first,
        name + " has " + std::to_string(map.size(1)) + " channels, of which none are " +
            std::to_string(first) + " to " + std::to_string(first + channels));
  return {floats_of(map, name) + first, map.size(1), channels};
}

std::vector<cpu::MapSegment> segments_of(const std::vector<Tensor>& maps, const std::string& name,
                                         const std::vector<int64_t>& segments, int64_t pixels) {
  check(!maps.empty() && segments.size() == 2 * maps.size(),
        name + " has " + std::to_string(maps.size()) + " tensors, segments " +
            std::to_string(segments.size()) + " numbers, expected two for each of one or more");
  std::vector<cpu::MapSegment> result;
  for (size_t i = 0; i < maps.size(); ++i)
    result.push_back(segment_of(maps[i], name + "[" + std::to_string(i) + "]", pixels,
                                segments[2 * i], segments[2 * i + 1]));
  return result;
}

int64_t channels_of(const std::vector<cpu::MapSegment>& segments) {
  int64_t channels = 0;
  for (const cpu::MapSegment& segment : segments) channels += segment.channels;
  return channels;
}

// Rows of scale, shift and the mean that the norm subtracts.
struct PrologueRows {
  cpu::Prologue prologue;
  const float* mean;
};

PrologueRows prologue_of(const Tensor& prologue, int64_t channels, int64_t activation) {
  const float* const rows = floats_of(prologue, "prologue", 3, channels);
  return {{rows, rows + channels, activation_of(activation)}, rows + 2 * channels};
}

cpu::Statistics statistics_of(const Tensor& statistics, const Tensor& map, int64_t first) {
  float* const rows = floats_or_null(statistics, "statistics", 2, map.size(1));
  if (rows == nullptr) return {nullptr, nullptr};
  return {rows + first, rows + map.size(1) + first};
}

// Output and gradient of a step, and what its norms add to the gradient.
template <typename Step>
void bind_gradient(Step& step, const Tensor& output, const Tensor& gradient, int64_t first,
                   int64_t channels, const Tensor& correction) {
  const int64_t pixels = step.window.batch * step.window.output_pixels();
  step.output = segment_of(output, "output", pixels, first, channels);
  step.gradient = segment_of(gradient, "gradient", pixels, first, channels);
  const float* const rows = floats_of(correction, "correction", 2, output.size(1));
  step.slope = rows + first;
  step.offset = rows + output.size(1) + first;
}

cpu::GradientSegment gradient_of(const Tensor& gradient, const std::string& name, int64_t pixels,
                                 const cpu::MapSegment& segment, int64_t first,
                                 int64_t accumulate) {
  const cpu::MapSegment to = segment_of(gradient, name, pixels, first, segment.channels);
  return {const_cast<float*>(to.data), to.pitch, accumulate != 0};
}

void training_convolution_forward(const std::vector<Tensor>& maps,
                                  const std::vector<int64_t>& segments, const Tensor& prologue,
                                  int64_t activation, const Tensor& weight,
                                  const std::vector<int64_t>& window, Tensor output,
                                  int64_t output_channel, Tensor statistics, Tensor workspace,
                                  int64_t winograd, int64_t isa) {
  const cpu::Workers workers = workers_of(isa);
  cpu::ConvolutionForward step;
  step.window = window_of(window);
  step.winograd = winograd_of(winograd);
  step.inputs = segments_of(maps, "maps", segments, step.window.batch * step.window.input_pixels());
  const int64_t channels = channels_of(step.inputs);
  step.prologue = prologue_of(prologue, channels, activation).prologue;
  step.strides = check_weight(weight, "weight", step.window, channels);
  step.weight = static_cast<const float*>(weight.data_ptr());
  step.output_channels = weight.size(0);
  const cpu::MapSegment to =
      segment_of(output, "output", step.window.batch * step.window.output_pixels(), output_channel,
                 step.output_channels);
  step.output = const_cast<float*>(to.data);
  step.output_pitch = to.pitch;
  step.statistics = statistics_of(statistics, output, output_channel);
  cpu::convolution_forward(step, workspace_of(workspace, cpu::workspace_floats(step, workers)),
                           workers);
}

void training_convolution_backward(
    const std::vector<Tensor>& maps, const std::vector<int64_t>& segments, const Tensor& prologue,
    int64_t activation, const Tensor& weight, const std::vector<int64_t>& window,
    const Tensor& output, const Tensor& gradient, int64_t output_channel, const Tensor& correction,
    const std::vector<Tensor>& input_gradients, const std::vector<int64_t>& accumulate, Tensor sums,
    Tensor weight_gradient, Tensor workspace, int64_t winograd, int64_t isa) {
  const cpu::Workers workers = workers_of(isa);
  cpu::ConvolutionBackward step;
  step.window = window_of(window);
  step.winograd = winograd_of(winograd);
  const int64_t pixels = step.window.batch * step.window.input_pixels();
  step.inputs = segments_of(maps, "maps", segments, pixels);
  const int64_t channels = channels_of(step.inputs);
  const PrologueRows rows = prologue_of(prologue, channels, activation);
  step.prologue = rows.prologue;
  step.mean = rows.mean;
  step.strides = check_weight(weight, "weight", step.window, channels);
  step.weight = static_cast<const float*>(weight.data_ptr());
  step.output_channels = weight.size(0);
  bind_gradient(step, output, gradient, output_channel, step.output_channels, correction);
  step.weight_gradient = nullptr;
  if (weight_gradient.numel() > 0) {
    step.gradient_strides = check_weight(weight_gradient, "weight_gradient", step.window, channels);
    check(weight_gradient.size(0) == weight.size(0),
          "weight_gradient has shape " + shape_of(weight_gradient) + ", expected the weight's");
    step.weight_gradient = static_cast<float*>(weight_gradient.data_ptr());
  }
  step.sums = nullptr;
  if (!input_gradients.empty()) {
    check(input_gradients.size() == maps.size() && accumulate.size() == maps.size(),
          "input_gradients has " + std::to_string(input_gradients.size()) +
              " tensors, accumulate " + std::to_string(accumulate.size()) +
              " numbers, expected one for each of maps or no gradients");
    check(step.window.stride == 1 && step.window.output_height() == step.window.height &&
              step.window.output_width() == step.window.width,
          "input_gradients are wanted of a window that changes the size of the map");
    for (size_t i = 0; i < maps.size(); ++i)
      step.input_gradients.push_back(
          gradient_of(input_gradients[i], "input_gradients[" + std::to_string(i) + "]", pixels,
                      step.inputs[i], segments[2 * i], accumulate[i]));
    step.sums = floats_of(sums, "sums", 2, channels);
  }
  cpu::convolution_backward(step, workspace_of(workspace, cpu::workspace_floats(step, workers)),
                            workers);
}

// Floats of the workspace that a convolution needs, forward and back.
int64_t training_convolution_workspace(const std::vector<int64_t>& window, int64_t input_channels,
                                       int64_t output_channels, bool input_gradients,
                                       int64_t winograd, int64_t isa) {
  const cpu::Workers workers = workers_of(isa);
  check_channels(input_channels, output_channels);
  return cpu::convolution_workspace(window_of(window), input_channels, output_channels,
                                    input_gradients, winograd_of(winograd), workers);
}

// What a depthwise convolution and a pool have in common, forward.
template <typename Step>
void bind_forward(Step& step, const Tensor& map, const std::vector<int64_t>& segment,
                  const Tensor& prologue, int64_t activation, const std::vector<int64_t>& window,
                  const Tensor& output, int64_t output_channel, const Tensor& statistics) {
  step.window = window_of(window);
  step.input =
      segments_of({map}, "map", segment, step.window.batch * step.window.input_pixels()).front();
  step.prologue = prologue_of(prologue, step.input.channels, activation).prologue;
  const cpu::MapSegment to =
      segment_of(output, "output", step.window.batch * step.window.output_pixels(), output_channel,
                 step.input.channels);
  step.output = const_cast<float*>(to.data);
  step.output_pitch = to.pitch;
  step.statistics = statistics_of(statistics, output, output_channel);
}

// The same, back; without what is only there where the gradient of the input is wanted.
template <typename Step>
void bind_backward(Step& step, const Tensor& map, const std::vector<int64_t>& segment,
                   const Tensor& prologue, int64_t activation, const std::vector<int64_t>& window,
                   const Tensor& output, const Tensor& gradient, int64_t output_channel,
                   const Tensor& correction) {
  step.window = window_of(window);
  step.input =
      segments_of({map}, "map", segment, step.window.batch * step.window.input_pixels()).front();
  const PrologueRows rows = prologue_of(prologue, step.input.channels, activation);
  step.prologue = rows.prologue;
  step.mean = rows.mean;
  bind_gradient(step, output, gradient, output_channel, step.input.channels, correction);
}

template <typename Step>
void bind_input_gradient(Step& step, const Tensor& input_gradient, int64_t first,
                         int64_t accumulate, const Tensor& sums) {
  step.input_gradient =
      gradient_of(input_gradient, "input_gradient", step.window.batch * step.window.input_pixels(),
                  step.input, first, accumulate);
  step.sums = floats_of(sums, "sums", 2, step.input.channels);
}

void training_depthwise_forward(const Tensor& map, const std::vector<int64_t>& segment,
                                const Tensor& prologue, int64_t activation, const Tensor& weight,
                                const std::vector<int64_t>& window, Tensor output,
                                int64_t output_channel, Tensor statistics, Tensor workspace,
                                int64_t isa) {
  const cpu::Workers workers = workers_of(isa);
  cpu::DepthwiseForward step;
  bind_forward(step, map, segment, prologue, activation, window, output, output_channel,
               statistics);
  step.strides = check_depthwise_weight(weight, "weight", step.window, step.input.channels);
  step.weight = static_cast<const float*>(weight.data_ptr());
  cpu::depthwise_forward(step, workspace_of(workspace, cpu::workspace_floats(step, workers)),
                         workers);
}

void training_depthwise_backward(const Tensor& map, const std::vector<int64_t>& segment,
                                 const Tensor& prologue, int64_t activation, const Tensor& weight,
                                 const std::vector<int64_t>& window, const Tensor& output,
                                 const Tensor& gradient, int64_t output_channel,
                                 const Tensor& correction, Tensor input_gradient,
                                 int64_t accumulate, Tensor sums, Tensor weight_gradient,
                                 Tensor workspace, int64_t isa) {
  const cpu::Workers workers = workers_of(isa);
  cpu::DepthwiseBackward step = {};
  bind_backward(step, map, segment, prologue, activation, window, output, gradient, output_channel,
                correction);
  step.strides = check_depthwise_weight(weight, "weight", step.window, step.input.channels);
  step.weight = static_cast<const float*>(weight.data_ptr());
  if (weight_gradient.numel() > 0) {
    step.gradient_strides = check_depthwise_weight(weight_gradient, "weight_gradient", step.window,
                                                   step.input.channels);
    step.weight_gradient = static_cast<float*>(weight_gradient.data_ptr());
  }
  if (input_gradient.numel() > 0)
    bind_input_gradient(step, input_gradient, segment[0], accumulate, sums);
  cpu::depthwise_backward(step, workspace_of(workspace, cpu::workspace_floats(step, workers)),
                          workers);
}

int64_t training_depthwise_workspace(const std::vector<int64_t>& window, int64_t channels,
                                     int64_t isa) {
  const cpu::Workers workers = workers_of(isa);
  check_channels(channels, 1);
  return cpu::depthwise_workspace(window_of(window), channels, workers);
}

void training_pool_forward(const Tensor& map, const std::vector<int64_t>& segment,
                           const Tensor& prologue, int64_t activation,
                           const std::vector<int64_t>& window, Tensor output,
                           int64_t output_channel, Tensor statistics, Tensor workspace,
                           int64_t isa) {
  const cpu::Workers workers = workers_of(isa);
  cpu::PoolForward step;
  bind_forward(step, map, segment, prologue, activation, window, output, output_channel,
               statistics);
  cpu::pool_forward(step, workspace_of(workspace, cpu::workspace_floats(step)), workers);
}

void training_pool_backward(const Tensor& map, const std::vector<int64_t>& segment,
                            const Tensor& prologue, int64_t activation,
                            const std::vector<int64_t>& window, const Tensor& output,
                            const Tensor& gradient, int64_t output_channel,
                            const Tensor& correction, Tensor input_gradient, int64_t accumulate,
                            Tensor sums, Tensor workspace, int64_t isa) {
  const cpu::Workers workers = workers_of(isa);
  cpu::PoolBackward step;
  bind_backward(step, map, segment, prologue, activation, window, output, gradient, output_channel,
                correction);
  bind_input_gradient(step, input_gradient, segment[0], accumulate, sums);
  cpu::pool_backward(step, workspace_of(workspace, cpu::workspace_floats(step, workers)), workers);
}

int64_t training_pool_workspace(const std::vector<int64_t>& window, int64_t channels, int64_t isa) {
  const cpu::Workers workers = workers_of(isa);
  check_channels(channels, 1);
  return cpu::pool_workspace(window_of(window), channels, workers);
}

// The norm of channels [first, first + channels) of a map with these statistics.
cpu::Normalization norm_of(const Tensor& statistics, int64_t first, int64_t channels,
                           const Tensor& gamma, const Tensor& beta, double eps) {
  check(statistics.dim() == 2 && statistics.size(0) == 2 && first >= 0 && channels >= 1 &&
            channels <= statistics.size(1) - first,
        "statistics has shape " + shape_of(statistics) + ", expected [2, " +
            std::to_string(first + channels) + " or more]");
  const float* const rows = floats_of(statistics, "statistics");
  return {rows + first, rows + statistics.size(1) + first, vector_or_null(gamma, "gamma", channels),
          vector_or_null(beta, "beta", channels), eps};
}

// Writes channels [to, to + channels) of a prologue.
void normalization_prologue(const Tensor& statistics, int64_t first, int64_t channels,
                            const Tensor& gamma, const Tensor& beta, double eps, Tensor prologue,
                            int64_t to) {
  const cpu::Normalization norm = norm_of(statistics, first, channels, gamma, beta, eps);
  check(
      prologue.dim() == 2 && prologue.size(0) == 3 && to >= 0 && channels <= prologue.size(1) - to,
      "prologue has shape " + shape_of(prologue) + ", expected [3, " +
          std::to_string(to + channels) + " or more]");
  float* const rows = floats_of(prologue, "prologue") + to;
  const int64_t pitch = prologue.size(1);
  cpu::normalization_prologue(norm, channels, rows, rows + pitch);
  std::copy_n(norm.mean, channels, rows + 2 * pitch);
}

// From channels [from, from + channels) of the sums.
void normalization_backward(const Tensor& statistics, int64_t first, int64_t channels,
                            const Tensor& gamma, double eps, const Tensor& sums, int64_t from,
                            int64_t count, Tensor gamma_gradient, Tensor beta_gradient,
                            Tensor correction) {
  cpu::NormalizationBackward step;
  step.norm = norm_of(statistics, first, channels, gamma, gamma, eps);
  check(sums.dim() == 2 && sums.size(0) == 2 && from >= 0 && channels <= sums.size(1) - from,
        "sums has shape " + shape_of(sums) + ", expected [2, " + std::to_string(from + channels) +
            " or more]");
  check(count >= 1, "count is " + std::to_string(count) + ", expected at least 1");
  step.sums = floats_of(sums, "sums") + from;
  step.sums_pitch = sums.size(1);
  step.count = count;
  step.gamma_gradient = vector_or_null(gamma_gradient, "gamma_gradient", channels);
  step.beta_gradient = vector_or_null(beta_gradient, "beta_gradient", channels);
  float* const rows = floats_or_null(correction, "correction", 2, statistics.size(1));
  step.slope = rows == nullptr ? nullptr : rows + first;
  step.offset = rows == nullptr ? nullptr : rows + statistics.size(1) + first;
  cpu::normalization_backward(step, channels);
}

}  // namespace
}  // namespace threshnet_fast

using namespace threshnet_fast;

STABLE_TORCH_LIBRARY_IMPL(threshnet_fast_cpu, CompositeExplicitAutograd, m) {
  m.impl("training_convolution_workspace", TORCH_BOX(&training_convolution_workspace));
  m.impl("training_depthwise_workspace", TORCH_BOX(&training_depthwise_workspace));
  m.impl("training_pool_workspace", TORCH_BOX(&training_pool_workspace));
}

STABLE_TORCH_LIBRARY_IMPL(threshnet_fast_cpu, CPU, m) {
  m.impl("training_convolution_forward", TORCH_BOX(&training_convolution_forward));
  m.impl("training_convolution_backward", TORCH_BOX(&training_convolution_backward));
  m.impl("training_depthwise_forward", TORCH_BOX(&training_depthwise_forward));
  m.impl("training_depthwise_backward", TORCH_BOX(&training_depthwise_backward));
  m.impl("training_pool_forward", TORCH_BOX(&training_pool_forward));
  m.impl("training_pool_backward", TORCH_BOX(&training_pool_backward));
  m.impl("normalization_prologue", TORCH_BOX(&normalization_prologue));
  m.impl("normalization_backward", TORCH_BOX(&normalization_backward));
}
