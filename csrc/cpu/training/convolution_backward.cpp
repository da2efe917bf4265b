#include <algorithm>
#include <cstring>
#include <vector>

#include "backward_plan.h"
#include "concatenation.h"
#include "cpu/team.h"
#include "products.h"
#include "steps.h"
#include "weight_gradient.h"

namespace threshnet_fast::cpu {
namespace {

class Backward {
 public:
  Backward(const ConvolutionBackward& step, float* workspace, const Workers& workers)
      : step_(step),
        plan_(step, workers),
        training_(training_table(workers.isa)),
        weight_gradient_(plan_, training_),
        packed_(workspace),
        partials_(packed_ + plan_.packed_floats()),
        sums_(partials_ + plan_.partial_floats()),
        scratch_(sums_ + plan_.sum_floats()) {}

  void run(const Workers& workers) const {
    const WeightTaps<const float> weights =
        WeightTaps<const float>(step_.weight, step_.strides, step_.window).flipped();
    const int64_t packing = plan_.wants_inputs ? plan_.panels.count() : 0;
    const int64_t blocks = plan_.wants_weight ? plan_.input_blocks * plan_.output_blocks : 0;
    const int64_t bands = plan_.wants_inputs ? plan_.bands.count * plan_.groups : 0;
    const int64_t tasks = plan_.together ? plan_.splits : blocks + bands;
    const int64_t unpacking =
        plan_.together && plan_.wants_weight ? divide_up(plan_.input_channels, kTogether) : 0;
    const int64_t reductions = plan_.wants_inputs ? divide_up(plan_.input_channels, kTogether) : 0;
    run_team(workers.threads, workers.parallel_for, {packing, tasks, unpacking + reductions},
             [&](int64_t stage, int64_t task, int64_t thread) {
               float* const memory = scratch_ + thread * plan_.scratch;
               if (stage == 0) {
                 pack_panel(plan_.panels, task, weights, plan_.bands.tile, packed_);
               } else if (stage == 1) {
                 if (plan_.together) {
                   split(task, memory);
                 } else if (task < blocks) {
                   block(task, memory);
                 } else {
                   band((task - blocks) / plan_.groups, (task - blocks) % plan_.groups, memory);
                 }
               } else if (task < unpacking) {
                 unpack_splits(task * kTogether);
               } else {
                 add_sums((task - unpacking) * kTogether);
               }
             });
  }

 private:
  static constexpr int64_t kTogether = 32;

  // The part of the output's gradient that a band needs: with a ring where the input's gradient is
  // calculated from it too.
  Patch gradient_patch(const Band& band, bool ring, float* data) const {
    const Window& window = band.window;
    const int64_t margin = ring && !band.by_position ? backward_window(window).padding : 0;
    return {band.by_position,
            band.images(),
            window.output_height(),
            window.output_width(),
            band.first - margin,
            band.last + margin,
            margin,
            plan_.gradient_pitch,
            data};
  }

  // The gradient of some output channels, with zeros up to a whole vector.
  void load_gradient(const Band& band, const Patch& patch, const GradientBlock& block) const {
    const int64_t first = block.first_output, channels = block.outputs;
    const int64_t padding = block.pitch - channels;
    fill(patch, band, block.pitch, [&](int64_t pixel, int64_t step, int64_t count, float* to) {
      const MapSegment &gradient = step_.gradient, &output = step_.output;
      training_.map_gradient(
          {gradient.data + pixel * gradient.pitch + first, step * gradient.pitch},
          {output.data + pixel * output.pitch + first, step * output.pitch}, step_.slope + first,
          step_.offset + first, count, channels, {to, patch.pitch});
      for (int64_t i = 0; i < count && padding > 0; ++i)
        std::memset(to + i * patch.pitch + channels, 0, padding * sizeof(float));
    });
  }

  // Adds what a band's input gradient is added to, and the maps where they have not been read.
  void fetch_input_gradients(const Band& band, bool maps, FetchList& ahead) const {
    const int64_t pixel = band.first_pixel(), pixels = band.pixels();
    for (size_t i = 0; i < step_.inputs.size() && plan_.bands.fetches_ahead(); ++i) {
      const MapSegment& map = step_.inputs[i];
      const GradientSegment& to = step_.input_gradients[i];
      if (maps) ahead.add(map.data + pixel * map.pitch, map.pitch, map.channels, pixels);
      ahead.add(to.data + pixel * to.pitch, to.pitch, map.channels, pixels);
    }
  }

  // Adds what the band after this one is going to read of a block, with or without its inputs.
  void fetch_next(const Bands& bands, int64_t index, const GradientBlock& block, bool inputs,
                  FetchList& ahead) const {
    if (!bands.fetches_ahead() || index + 1 >= bands.count) return;
    const Band band(bands, index + 1);
    for (const MapSegment* map : {&step_.gradient, &step_.output})
      ahead.add(map->data + band.first_pixel() * map->pitch + block.first_output, map->pitch,
                block.outputs, band.pixels());
    if (inputs)
      fetch_inputs(step_.inputs, block.first_input, block.first_input + block.inputs, band,
                   Band(bands, index), ahead);
  }

  // The gradient of a band's input, of the channels of some panels.
  void input_gradient(const Band& band, const Patch& gradient, int64_t first_panel,
                      int64_t last_panel, float* result, float* sums, FetchList& ahead) const {
    Band back = band;
    back.window = backward_window(band.window);
    float* const tiles = result + round_up(most_pixels(plan_.bands) * plan_.result_pitch, 16);
    plan_.convolution.multiply(back, gradient, packed_, first_panel, last_panel,
                               {result, plan_.result_pitch, nullptr, 0, tiles, &ahead});
    const int64_t first = plan_.panels.first(first_panel);
    const int64_t last = std::min(plan_.panels.first(last_panel), plan_.input_channels);
    for_each_group(band, true, [&](const Group& group) {
      for_each_segment(
          step_.inputs, first, last, [&](size_t i, int64_t start, int64_t from, int64_t end) {
            const MapSegment& map = step_.inputs[i];
            const GradientSegment& to = step_.input_gradients[i];
            PrologueGradient part;
            part.gradient = {result + group.place * plan_.result_pitch + from - first,
                             plan_.result_pitch};
            part.map = {map.data + group.pixel * map.pitch + from - start, group.step * map.pitch};
            part.prologue = {step_.prologue.scale + from, step_.prologue.shift + from,
                             step_.prologue.activation};
            part.mean = step_.mean + from;
            part.count = group.count;
            part.channels = end - from;
            part.output = {to.data + group.pixel * to.pitch + from - start, group.step * to.pitch};
            part.accumulate = to.accumulate;
            part.sums = sums + from;
            part.sums_pitch = plan_.input_channels;
            training_.prologue_gradient(part);
          });
    });
  }

  float* sums_of(int64_t index) const {
    float* const sums = sums_ + index * 2 * plan_.input_channels;
    return plan_.wants_inputs ? sums : nullptr;
  }

  // A part of all bands, the whole way back.
  void split(int64_t index, float* memory) const {
    const Bands& bands = plan_.bands;
    const GradientBlock whole = plan_.whole();
    float* const partial = partials_ + index * plan_.split_floats();
    if (plan_.wants_weight) std::memset(partial, 0, plan_.split_floats() * sizeof(float));
    float* const sums = sums_of(index);
    if (plan_.wants_inputs) std::memset(sums, 0, 2 * plan_.input_channels * sizeof(float));
    float* const gradient_memory = memory + plan_.input_patch;
    float* const result = gradient_memory + plan_.output_patch;
    for (int64_t b = part_begin(bands.count, plan_.splits, index);
         b < part_begin(bands.count, plan_.splits, index + 1); ++b) {
      const Band band(bands, b);
      const Patch gradient = gradient_patch(band, plan_.wants_inputs, gradient_memory);
      load_gradient(band, gradient, whole);
      FetchList ahead(plan_.convolution.words());
      if (plan_.wants_inputs) fetch_input_gradients(band, false, ahead);
      fetch_next(bands, b, whole, plan_.wants_weight, ahead);
      ahead.divide(
          (plan_.wants_weight ? weight_gradient_.calls(whole) : 0) +
          (plan_.wants_inputs ? plan_.convolution.tile_calls(band, plan_.panels.count()) : 0));
      if (plan_.wants_weight) {
        const Patch inputs = input_patch(band, plan_.input_channels, memory);
        load_inputs(training_, step_.inputs, step_.prologue, 0, plan_.input_channels, band, inputs);
        weight_gradient_.add(band, inputs, gradient, whole, result, partial, ahead);
      }
      if (plan_.wants_inputs)
        input_gradient(band, gradient, 0, plan_.panels.count(), result, sums, ahead);
    }
  }

  // A block of the weight's gradient, over all pixels.
  void block(int64_t index, float* memory) const {
    const Bands& bands = plan_.block_bands;
    const GradientBlock block = plan_.block(index);
    float* const gradient_memory = memory + plan_.input_patch;
    float* const sums = gradient_memory + plan_.output_patch;
    const int64_t floats = round_up(plan_.gradient_positions() * block.inputs * block.pitch, 16);
    std::memset(sums, 0, floats * sizeof(float));
    for (int64_t b = 0; b < bands.count; ++b) {
      const Band band(bands, b);
      const Patch gradient = gradient_patch(band, false, gradient_memory);
      load_gradient(band, gradient, block);
      const Patch inputs = input_patch(band, block.inputs, memory);
      load_inputs(training_, step_.inputs, step_.prologue, block.first_input,
                  block.first_input + block.inputs, band, inputs);
      FetchList ahead(plan_.convolution.words());
      fetch_next(bands, b, block, true, ahead);
      ahead.divide(weight_gradient_.calls(block));
      weight_gradient_.add(band, inputs, gradient, block, sums + floats, sums, ahead);
    }
    unpack(sums, block, 0, block.inputs);
  }

  // The gradient of a band's input, of the channels of a group of panels.
  void band(int64_t index, int64_t group, float* memory) const {
    const Band band(plan_.bands, index);
    const int64_t first_panel = part_begin(plan_.panels.count(), plan_.groups, group);
    const int64_t last_panel = part_begin(plan_.panels.count(), plan_.groups, group + 1);
    float* const sums = sums_of(index);
    const int64_t first = plan_.panels.first(first_panel);
    const int64_t last = std::min(plan_.panels.first(last_panel), plan_.input_channels);
    std::memset(sums + first, 0, (last - first) * sizeof(float));
    std::memset(sums + plan_.input_channels + first, 0, (last - first) * sizeof(float));
    float* const gradient_memory = memory + plan_.input_patch;
    const Patch gradient = gradient_patch(band, true, gradient_memory);
    load_gradient(band, gradient, plan_.whole());
    FetchList ahead(plan_.convolution.words());
    fetch_input_gradients(band, true, ahead);
    if (group == plan_.groups - 1) fetch_next(plan_.bands, index, plan_.whole(), false, ahead);
    ahead.divide(plan_.convolution.tile_calls(band, last_panel - first_panel));
    input_gradient(band, gradient, first_panel, last_panel, gradient_memory + plan_.output_patch,
                   sums, ahead);
  }

  // Writes the gradient of the weight of input channels [begin, end) of a block.
  void unpack(const float* sums, const GradientBlock& block, int64_t begin, int64_t end) const {
    unpack_gradient(sums, block, begin, end, plan_.bands.tile != 0,
                    WeightTaps<float>(step_.weight_gradient, step_.gradient_strides, step_.window));
  }

  // Adds up the splits' gradients of the weight of some input channels.
  void unpack_splits(int64_t first) const {
    const GradientBlock whole = plan_.whole();
    const int64_t last = std::min(first + kTogether, whole.inputs);
    for (int64_t tap = 0; tap < plan_.gradient_positions(); ++tap) {
      const int64_t begin = (tap * whole.inputs + first) * whole.pitch;
      const int64_t count = (last - first) * whole.pitch;
      for (int64_t i = 1; i < plan_.splits; ++i) {
        const float* const from = partials_ + i * plan_.split_floats() + begin;
        for (int64_t c = 0; c < count; ++c) partials_[begin + c] += from[c];
      }
    }
    unpack(partials_, whole, first, last);
  }

  void add_sums(int64_t first) const {
    const int64_t last = std::min(first + kTogether, plan_.input_channels);
    for (int64_t row = 0; row < 2; ++row) {
      for (int64_t c = first; c < last; ++c) {
        double sum = 0;
        for (int64_t i = 0; i < plan_.sum_count(); ++i)
          sum += sums_of(i)[row * plan_.input_channels + c];
        step_.sums[row * plan_.input_channels + c] = static_cast<float>(sum);
      }
    }
  }

  const ConvolutionBackward& step_;
  BackwardPlan plan_;
  const TrainingTable& training_;
  WeightGradient weight_gradient_;
  float* packed_;
  float* partials_;
  float* sums_;
  float* scratch_;
};

}  // namespace

int64_t workspace_floats(const ConvolutionBackward& step, const Workers& workers) {
  const BackwardPlan plan(step, workers);
  return plan.packed_floats() + plan.partial_floats() + plan.sum_floats() +
         workers.threads * plan.scratch;
}

void convolution_backward(const ConvolutionBackward& step, float* workspace,
                          const Workers& workers) {
  Backward(step, workspace, workers).run(workers);
}

}  // namespace threshnet_fast::cpu
