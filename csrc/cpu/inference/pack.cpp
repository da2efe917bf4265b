#include <algorithm>
#include <cstring>
#include <string>

#include "cpu/team.h"
#include "cpu/ukernels/kinds.h"
#include "cpu/winograd.h"
#include "program.h"

namespace threshnet_fast::cpu {
namespace {

constexpr int64_t kPackChannels = 16;

void require_count(const Weight& weight, int64_t expected, const char* what, int64_t step) {
  if (weight.count == expected) return;
  throw std::invalid_argument("threshnet_fast: " + std::string(what) + " of step " +
                              std::to_string(step) + " has " + std::to_string(weight.count) +
                              " elements, expected " + std::to_string(expected));
}

// In float64.
void transform_kernel(int64_t size, const float* kernel, float* transformed) {
  double taps[9], positions[kMaxWinogradPositions];
  std::copy_n(kernel, 9, taps);
  winograd_kernel<double>(size, taps, positions);
  for (int64_t i = 0; i < winograd_positions(size); ++i)
    transformed[i] = static_cast<float>(positions[i]);
}

// From [output channel][input channel][tap] to words [tap][input word][pitch]. What is padding is
// zero already.
template <typename Element>
void pack_panel(const Step& step, const Panel& panel, const float* weight, const float* bias,
                float* packed) {
  constexpr int64_t kElements = kWordChannels<Element>;
  const int64_t taps = step.window.taps();
  const int64_t channels = step.input_channels;
  const int64_t position_elements = step.padded_channels * panel.pitch;
  Element* const words = reinterpret_cast<Element*>(packed + panel.weights);
  const auto first_of = [&](int64_t channel) {
    return words + channel / kElements * kElements * panel.pitch + channel % kElements;
  };
  const float* rows = weight + panel.channel * channels * taps;
  // Some channels at a time, so that what is read of them stays in L1 while it is written by
  // position.
  for (int64_t first = 0; first < channels; first += kPackChannels) {
    const int64_t last = std::min(first + kPackChannels, channels);
    for (int64_t i = 0; i < taps && !step.winograd; ++i) {
      for (int64_t channel = first; channel < last; ++channel) {
        Element* to = first_of(channel) + i * position_elements;
        for (int64_t lane = 0; lane < panel.channels; ++lane)
          to[lane * kElements] = rounded<Element>(rows[(lane * channels + channel) * taps + i]);
      }
    }
    for (int64_t channel = first; channel < last && step.winograd; ++channel) {
      Element* to = first_of(channel);
      for (int64_t lane = 0; lane < panel.channels; ++lane) {
        float transformed[kMaxWinogradPositions];
        const float* kernel = rows + (lane * channels + channel) * taps;
        transform_kernel(step.winograd_size, kernel, transformed);
        for (int64_t i = 0; i < positions_of(step); ++i)
          to[i * position_elements + lane * kElements] = rounded<Element>(transformed[i]);
      }
    }
  }
  if (bias == nullptr) return;
  std::memcpy(packed + panel.bias, bias + panel.channel, panel.channels * sizeof(float));
}

// From [channel][tap] to [tap][pitch]: floats, whatever the elements are.
void pack_depthwise(const Step& step, const Panel& panel, const std::vector<Weight>& weights,
                    float* packed) {
  const int64_t taps = step.window.taps();
  const float* weight = weights[step.weight_index].data;
  for (int64_t channel = 0; channel < panel.channels; ++channel) {
    for (int64_t tap = 0; tap < taps; ++tap)
      packed[panel.weights + tap * panel.pitch + channel] = weight[channel * taps + tap];
  }
  if (step.bias_index >= 0)
    std::memcpy(packed + panel.bias, weights[step.bias_index].data, panel.channels * sizeof(float));
}

}  // namespace

void pack(const Program& program, const std::vector<Weight>& weights, float* packed,
          int64_t threads, ParallelFor parallel_for) {
  const ProgramHeader& header = program.header();
  if (static_cast<int64_t>(weights.size()) != header.weight_count)
    throw std::invalid_argument("threshnet_fast: weights has " + std::to_string(weights.size()) +
                                " tensors, expected " + std::to_string(header.weight_count));
  struct Job {
    const Step* step;
    const Panel* panel;
  };
  std::vector<Job> jobs;
  for (int64_t s = 0; s < header.step_count; ++s) {
    const Step& step = program.step(s);
    if (!is_planned(step)) continue;
    if (step.scale_index >= 0) {
      require_count(weights[step.scale_index], step.input_channels, "scale", s);
      require_count(weights[step.shift_index], step.input_channels, "shift", s);
    }
    if (step.weight_index < 0) continue;
    const int64_t taps = step.window.taps();
    const int64_t channels = step.kind == kDepthwise ? 1 : step.input_channels;
    require_count(weights[step.weight_index], step.output_channels * channels * taps, "weight", s);
    if (step.bias_index >= 0)
      require_count(weights[step.bias_index], step.output_channels, "bias", s);
    for (int64_t p = 0; p < step.panel_count && step.kind == kConvolution; ++p)
      jobs.push_back({&step, program.at<Panel>(step.panels) + p});
  }

  std::memset(packed, 0, header.packed_floats * sizeof(float));
  for (int64_t s = 0; s < header.step_count; ++s) {
    const Step& step = program.step(s);
    if (!is_planned(step)) continue;
    if (step.scale_index >= 0) {
      const size_t bytes = step.input_channels * sizeof(float);
      std::memcpy(packed + step.scale, weights[step.scale_index].data, bytes);
      std::memcpy(packed + step.shift, weights[step.shift_index].data, bytes);
    }
    if (step.kind == kDepthwise)
      pack_depthwise(step, *program.at<Panel>(step.panels), weights, packed);
  }
  const auto pack_one = with_element(kind_of(header.isa)->dtype,
                                     [](auto element) { return pack_panel<decltype(element)>; });
  run_team(threads, parallel_for, {static_cast<int64_t>(jobs.size())},
           [&](int64_t, int64_t job, int64_t) {
             const Step& step = *jobs[job].step;
             const float* bias = step.bias_index >= 0 ? weights[step.bias_index].data : nullptr;
             pack_one(step, *jobs[job].panel, weights[step.weight_index].data, bias, packed);
           });
}

}  // namespace threshnet_fast::cpu
