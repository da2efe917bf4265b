#include <algorithm>
#include <cstring>

#include "cpu/team.h"
#include "products.h"
#include "steps.h"

namespace threshnet_fast::cpu {
namespace {

// Calls body(segment, its first channel in the concatenation, from channel, to channel) for the
// segments that some channels of a concatenation lie in.
template <typename Segments, typename Body>
void for_each_segment(const Segments& segments, int64_t first, int64_t last, const Body& body) {
  int64_t start = 0;
  for (size_t i = 0; i < segments.size() && start < last; ++i) {
    const int64_t end = start + segments[i].channels;
    if (end > first) body(i, start, std::max(first, start), std::min(last, end));
    start = end;
  }
}

// Normalises channels [first, last) of the inputs into a patch.
void load_inputs(const TrainingTable& table, const std::vector<MapSegment>& inputs,
                 const Prologue& prologue, int64_t first, int64_t last, const Band& band,
                 const Patch& patch) {
  fill(patch, band, last - first, [&](int64_t pixel, int64_t step, int64_t count, float* to) {
    for_each_segment(inputs, first, last, [&](size_t i, int64_t start, int64_t from, int64_t end) {
      const MapSegment& input = inputs[i];
      table.normalize({input.data + pixel * input.pitch + from - start, step * input.pitch},
                      {prologue.scale + from, prologue.shift + from, prologue.activation}, count,
                      end - from, {to + from - first, patch.pitch});
    });
  });
}

// Adds what a band is going to read of channels [first, last) that the one before it has not.
void fetch_inputs(const std::vector<MapSegment>& inputs, int64_t first, int64_t last,
                  const Band& band, const Band& before, FetchList& ahead) {
  const int64_t pixel = std::max(band.first_input_pixel(), before.last_input_pixel());
  for_each_segment(inputs, first, last, [&](size_t i, int64_t start, int64_t from, int64_t end) {
    ahead.add(inputs[i].data + pixel * inputs[i].pitch + from - start, inputs[i].pitch, end - from,
              band.last_input_pixel() - pixel);
  });
}

int64_t channels_of(const std::vector<MapSegment>& segments) {
  int64_t channels = 0;
  for (const MapSegment& segment : segments) channels += segment.channels;
  return channels;
}

// How many groups the panels are divided into, so that all threads have work, and Winograd's
// products of one stay in L2.
int64_t panel_groups(const Bands& bands, const Panels& panels, int64_t threads) {
  constexpr int64_t kTogether = 4;
  const int64_t least = bands.tile != 0 ? divide_up(panels.count(), kTogether) : 1;
  return std::clamp<int64_t>(divide_up(3 * threads, bands.count), least, panels.count());
}

// Weights of an output channel for each input channel, as they are packed.
int64_t packed_taps(const Bands& bands) {
  return bands.tile != 0 ? winograd_positions(bands.tile) : bands.window.taps();
}

struct ForwardPlan {
  const UkernelTable<float>& table;
  int64_t input_channels;
  Bands bands;
  Panels panels;
  Convolution convolution;
  int64_t groups;
  int64_t output_pitch;
  int64_t patch, places, scratch;

  ForwardPlan(const ConvolutionForward& step, const Workers& workers)
      : table(ukernel_table<float>(workers.isa)),
        input_channels(channels_of(step.inputs)),
        bands(step.window, scratch_pitch(input_channels),
              round_up(step.output_channels, table.tiling.lanes), scratch_pitch(input_channels),
              workers.threads, table.tiling.tile_pixels[kPanelVectors],
              choose_tile(step.window, input_channels, step.output_channels, step.winograd)),
        panels{input_channels, step.output_channels, packed_taps(bands), table.tiling.lanes},
        convolution(panels, table, bands.tile),
        groups(panel_groups(bands, panels, workers.threads)),
        output_pitch(scratch_pitch(panels.padded_outputs())),
        patch(round_up(patch_floats(bands, input_channels), 16)) {
    const int64_t outputs = divide_up(panels.count(), groups) * panels.first(1);
    places = bands.tile != 0 ? convolution.tile_floats(bands.most_tiles(), outputs)
                             : round_up(most_pixels(bands) * output_pitch, 16);
    scratch = patch + places;
  }

  int64_t packed_floats() const { return panels.floats(); }
  // Of each band: where its sums start from, and those.
  int64_t moment_floats() const { return round_up(bands.count * 3 * panels.outputs, 16); }
};

}  // namespace

int64_t workspace_floats(const ConvolutionForward& step, const Workers& workers) {
  const ForwardPlan plan(step, workers);
  return plan.packed_floats() + plan.moment_floats() + workers.threads * plan.scratch;
}

void convolution_forward(const ConvolutionForward& step, float* workspace, const Workers& workers) {
  const ForwardPlan plan(step, workers);
  const TrainingTable& training = training_table(workers.isa);
  const Panels& panels = plan.panels;
  float* const packed = workspace;
  float* const moments = packed + plan.packed_floats();
  float* const scratch = moments + plan.moment_floats();
  const WeightTaps<const float> weights(step.weight, step.strides, step.window);
  constexpr int64_t kChannelsTogether = 32;

  const auto convolve = [&](int64_t task, int64_t thread) {
    const Band band(plan.bands, task / plan.groups);
    const int64_t first_panel = part_begin(panels.count(), plan.groups, task % plan.groups);
    const int64_t last_panel = part_begin(panels.count(), plan.groups, task % plan.groups + 1);
    float* const memory = scratch + thread * plan.scratch;
    const Patch patch = input_patch(band, plan.input_channels, memory);
    load_inputs(training, step.inputs, step.prologue, 0, plan.input_channels, band, patch);
    const int64_t first = panels.first(first_panel);
    const int64_t channels = std::min(panels.first(last_panel), panels.outputs) - first;
    float* const places = memory + plan.patch;
    FetchList ahead(plan.convolution.words());
    if (plan.bands.fetches_ahead() && task % plan.groups == plan.groups - 1 &&
        task / plan.groups + 1 < plan.bands.count)
      fetch_inputs(step.inputs, 0, plan.input_channels, Band(plan.bands, task / plan.groups + 1),
                   band, ahead);
    ahead.divide(plan.convolution.tile_calls(band, last_panel - first_panel));
    plan.convolution.multiply(
        band, patch, packed, first_panel, last_panel,
        {places, plan.output_pitch, step.output + first, step.output_pitch, places, &ahead});
    if (step.statistics.mean == nullptr) return;
    const Rows rows = {step.output + band.first_pixel() * step.output_pitch + first,
                       step.output_pitch};
    float* const origin = moments + task / plan.groups * 3 * panels.outputs + first;
    std::memcpy(origin, rows.data, channels * sizeof(float));
    float* const sums = origin + panels.outputs;
    std::memset(sums, 0, channels * sizeof(float));
    std::memset(sums + panels.outputs, 0, channels * sizeof(float));
    training.moments(rows, origin, band.pixels(), channels, sums, panels.outputs);
  };

  std::vector<int64_t> counts;
  for (int64_t b = 0; b < plan.bands.count; ++b) counts.push_back(Band(plan.bands, b).pixels());
  const int64_t reductions =
      step.statistics.mean == nullptr ? 0 : divide_up(panels.outputs, kChannelsTogether);
  run_team(workers.threads, workers.parallel_for,
           {panels.count(), plan.bands.count * plan.groups, reductions},
           [&](int64_t stage, int64_t task, int64_t thread) {
             if (stage == 0) {
               pack_panel(panels, task, weights, plan.bands.tile, packed);
             } else if (stage == 1) {
               convolve(task, thread);
             } else {
               combine_moments(moments, counts, panels.outputs, task * kChannelsTogether,
                               std::min((task + 1) * kChannelsTogether, panels.outputs),
                               step.statistics);
             }
           });
}

namespace {

// The convolution that leads back from the output's gradient to the input's.
Window backward_window(const Window& window) {
  return {window.batch,
          window.output_height(),
          window.output_width(),
          window.kernel_height,
          window.kernel_width,
          1,
          window.kernel_height - 1 - window.padding};
}

// Small weight gradients are added up for a part of the pixels at a time, in the same pass that
// calculates the input's gradient; large ones for some channels at a time, over all pixels.
struct BackwardPlan {
  const UkernelTable<float>& table;
  int64_t input_channels, output_channels;
  bool wants_inputs, wants_weight;
  int64_t gradient_pitch;  // floats between pixels of the output's gradient
  Bands bands;
  Panels panels;  // of the way back: from output channels to input channels
  Convolution convolution;
  bool together;
  int64_t splits, groups;
  int64_t input_blocks, output_blocks;
  int64_t result_pitch;
  Bands block_bands;
  int64_t input_patch, output_patch, scratch;

  BackwardPlan(const ConvolutionBackward& step, const Workers& workers)
      : table(ukernel_table<float>(workers.isa)),
        input_channels(channels_of(step.inputs)),
        output_channels(step.output_channels),
        wants_inputs(!step.input_gradients.empty()),
        wants_weight(step.weight_gradient != nullptr),
        gradient_pitch(scratch_pitch(padded(output_channels))),
        bands(bands_of(step, workers, scratch_pitch(input_channels))),
        panels{output_channels, input_channels, packed_taps(bands), table.tiling.lanes},
        convolution(panels, table, bands.tile),
        result_pitch(scratch_pitch(panels.padded_outputs())),
        block_bands(bands) {
    together = block_floats(input_channels, output_channels) <= kGradientFloats;
    // Each on its own, they need either the gradient's patches or these and some of the inputs'.
    if (!together) bands = bands_of(step, workers, 0);
    splits = std::min(bands.count, 2 * workers.threads);
    groups = together ? 1 : panel_groups(bands, panels, workers.threads);
    output_blocks = bands.tile != 0 && !together ? divide_up(output_channels, kBlockOutputs) : 1;
    const int64_t tile = table.tiling.tile_pixels[kPanelVectors];
    const int64_t row = block_floats(1, block_outputs());
    const int64_t most = std::max(kGradientFloats / row / tile * tile, tile);
    input_blocks = std::min(
        std::max(divide_up(input_channels, most), divide_up(2 * workers.threads, output_blocks)),
        divide_up(input_channels, tile));
    if (!together) block_bands = bands_of(step, workers, scratch_pitch(block_inputs()));
    const int64_t inputs = together ? input_channels : block_inputs();
    input_patch = patch_floats(block_bands, inputs);
    output_patch = std::max(most_pixels(block_bands), most_pixels(bands)) * gradient_pitch;
    if (wants_inputs) {
      Bands back = bands;
      back.window = backward_window(bands.window);
      output_patch = std::max(output_patch, patch_floats(back, gradient_pitch));
    }
    input_patch = round_up(input_patch, 16);
    output_patch = round_up(output_patch, 16);
    // A part of the weight's gradient and a band of the input's are never there at once.
    const int64_t outputs = divide_up(panels.count(), groups) * panels.first(1);
    const int64_t band = round_up(most_pixels(bands) * result_pitch, 16) +
                         convolution.tile_floats(bands.most_tiles(), outputs);
    const int64_t block = (together ? 0 : round_up(block_floats(inputs, block_outputs()), 16)) +
                          weight_tile_floats(inputs);
    scratch = input_patch + output_patch + std::max(band, block);
  }

  // Of a weight's gradient: sums for each pair of channels, as it is added up.
  int64_t gradient_positions() const {
    return bands.tile != 0 ? winograd_positions(kGradientTile) : bands.window.taps();
  }
  // Rows of a band whose tiles are there at once, for the weight's gradient.
  int64_t gradient_rows() const {
    const int64_t columns = divide_up(bands.window.output_width(), kGradientTile);
    return std::max<int64_t>(band_tiles(kGradientTile) / columns, 1) * kGradientTile;
  }
  int64_t most_gradient_tiles() const {
    return gradient_rows() / kGradientTile * divide_up(bands.window.output_width(), kGradientTile);
  }
  int64_t padded(int64_t outputs) const { return round_up(outputs, table.tiling.lanes); }
  int64_t block_floats(int64_t inputs, int64_t outputs) const {
    return gradient_positions() * inputs * padded(outputs);
  }
  int64_t block_inputs() const { return divide_up(input_channels, input_blocks); }
  int64_t block_outputs() const {
    return std::min(padded(divide_up(output_channels, output_blocks)), padded(output_channels));
  }
  GradientBlock whole() const {
    return {0, input_channels, 0, output_channels, padded(output_channels)};
  }
  GradientBlock block(int64_t index) const {
    const int64_t input = index / output_blocks;
    const int64_t first = part_begin(input_channels, input_blocks, input);
    const int64_t first_output = index % output_blocks * block_outputs();
    const int64_t outputs = std::min(block_outputs(), output_channels - first_output);
    return {first, part_begin(input_channels, input_blocks, input + 1) - first, first_output,
            outputs, padded(outputs)};
  }
  int64_t weight_tile_floats(int64_t inputs) const {
    if (bands.tile == 0) return 0;
    const int64_t pitches =
        scratch_pitch(std::min(inputs, kTileChannels)) + scratch_pitch(block_outputs());
    return round_up(winograd_positions(kGradientTile) * most_gradient_tiles() * pitches, 16);
  }

  int64_t packed_floats() const { return wants_inputs ? panels.floats() : 0; }
  // Of the weight's gradient, one for each split.
  int64_t split_floats() const {
    return round_up(block_floats(input_channels, output_channels), 16);
  }
  int64_t partial_floats() const { return together && wants_weight ? splits * split_floats() : 0; }
  // How many tasks add to sums of their own.
  int64_t sum_count() const { return together ? splits : bands.count; }
  int64_t sum_floats() const {
    return wants_inputs ? round_up(sum_count() * 2 * input_channels, 16) : 0;
  }

 private:
  static constexpr int64_t kBlockOutputs = 128;

  // `input_floats` are those of a pixel of the normalised inputs, where there are any.
  Bands bands_of(const ConvolutionBackward& step, const Workers& workers,
                 int64_t input_floats) const {
    return Bands(step.window, input_floats + (wants_inputs ? input_channels : 0), gradient_pitch,
                 input_floats + gradient_pitch, workers.threads,
                 table.tiling.tile_pixels[kPanelVectors],
                 choose_tile(step.window, input_channels, output_channels, step.winograd));
  }
};

class Backward {
 public:
  Backward(const ConvolutionBackward& step, float* workspace, const Workers& workers)
      : step_(step),
        plan_(step, workers),
        training_(training_table(workers.isa)),
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

  // Adds the products of pixels to the rows of `inputs` input channels of a block's gradient.
  void add_products(std::vector<PixelRun>& runs, int64_t inputs, int64_t distance,
                    int64_t gradient_pitch, const GradientBlock& block, float* rows,
                    FetchList& ahead) const {
    const int64_t lanes = plan_.table.tiling.lanes;
    const int64_t tiles = divide_up(inputs, plan_.table.tiling.tile_pixels[kPanelVectors]);
    const int64_t run_count = static_cast<int64_t>(runs.size());
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t first = part_begin(inputs, tiles, t);
      const int64_t count = part_begin(inputs, tiles, t + 1) - first;
      for (int64_t c = 0; c < block.pitch; c += kPanelVectors * lanes) {
        const int64_t vectors = std::min<int64_t>(kPanelVectors, (block.pitch - c) / lanes);
        training_.weight_gradient[vectors][count]({runs.data(), run_count, distance, gradient_pitch,
                                                   rows + first * block.pitch + c, block.pitch,
                                                   ahead.next()});
        shift(runs, 0, vectors * lanes);
      }
      shift(runs, count, -block.pitch);
    }
  }

  static void shift(std::vector<PixelRun>& runs, int64_t inputs, int64_t gradient) {
    for (PixelRun& run : runs) {
      run.input += inputs;
      run.gradient += gradient;
    }
  }

  // Adds the products of a band to a block of the weight's gradient.
  void add_weight_gradient(const Band& band, const Patch& inputs, const Patch& gradient,
                           const GradientBlock& block, float* tiles, float* sums,
                           FetchList& ahead) const {
    if (plan_.bands.tile != 0) {
      Band part = band;
      for (part.first = band.first; part.first < band.last; part.first = part.last) {
        part.last = std::min(part.first + plan_.gradient_rows(), band.last);
        add_tile_gradient(part, inputs, gradient, block, tiles, sums, ahead);
      }
      return;
    }
    const Window& window = band.window;
    const int64_t distance = band.by_position ? inputs.pitch : window.stride * inputs.pitch;
    std::vector<PixelRun> runs;
    for (int64_t tap = 0; tap < window.taps(); ++tap) {
      runs.clear();
      for_each_group(band, false, [&](const Group& group) {
        const int64_t y = group.row * window.stride - window.padding + tap / window.kernel_width;
        const int64_t x = group.column * window.stride - window.padding + tap % window.kernel_width;
        if (band.by_position && (y < 0 || y >= window.height || x < 0 || x >= window.width)) return;
        runs.push_back({inputs.at(y, x), gradient.at(group.row, group.column), group.count});
      });
      if (!runs.empty())
        add_products(runs, block.inputs, distance, gradient.pitch, block,
                     sums + tap * block.inputs * block.pitch, ahead);
    }
  }

  // The same of Winograd's tiles, position by position.
  void add_tile_gradient(const Band& band, const Patch& inputs, const Patch& gradient,
                         const GradientBlock& block, float* memory, float* sums,
                         FetchList& ahead) const {
    const int64_t tiles = tiles_of(band, kGradientTile);
    const int64_t gradient_pitch = scratch_pitch(block.pitch);
    constexpr int64_t positions = winograd_positions(kGradientTile);
    float* const gradient_tiles = memory;
    float* const input_tiles = gradient_tiles + positions * tiles * gradient_pitch;
    for_each_tile(band, kGradientTile, [&](int64_t number, int64_t y, int64_t x) {
      const float* pixels[kGradientTile * kGradientTile];
      for (int64_t i = 0; i < kGradientTile * kGradientTile; ++i) {
        const int64_t row = y + i / kGradientTile, column = x + i % kGradientTile;
        const bool inside = row < band.last && column < band.window.output_width();
        pixels[i] = inside ? gradient.at(row, column) : kZeros;
      }
      training_.winograd_gradient(pixels, block.pitch, gradient_tiles + number * gradient_pitch,
                                  tiles * gradient_pitch);
    });
    std::vector<PixelRun> runs(1);
    const int64_t chunks = divide_up(block.inputs, kTileChannels);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t first = part_begin(block.inputs, chunks, chunk);
      const int64_t channels = part_begin(block.inputs, chunks, chunk + 1) - first;
      const int64_t pitch = scratch_pitch(channels);
      for_each_tile(band, kGradientTile, [&](int64_t number, int64_t y, int64_t x) {
        const TilePixels pixels(inputs, kGradientTile, y, x, band.window.padding, first);
        plan_.table.winograd_2x2.input(pixels.data, channels, input_tiles + number * pitch,
                                       tiles * pitch);
      });
      for (int64_t position = 0; position < positions; ++position) {
        runs[0] = {input_tiles + position * tiles * pitch,
                   gradient_tiles + position * tiles * gradient_pitch, tiles};
        add_products(runs, channels, pitch, gradient_pitch, block,
                     sums + (position * block.inputs + first) * block.pitch, ahead);
      }
    }
  }

  // How many tiles of a block of the weight's gradient there are.
  int64_t weight_tile_calls(const GradientBlock& block) const {
    const Tiling& tiling = plan_.table.tiling;
    return plan_.gradient_positions() * divide_up(block.inputs, tiling.tile_pixels[kPanelVectors]) *
           divide_up(block.pitch, kPanelVectors * tiling.lanes);
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
          (plan_.wants_weight ? weight_tile_calls(whole) : 0) +
          (plan_.wants_inputs ? plan_.convolution.tile_calls(band, plan_.panels.count()) : 0));
      if (plan_.wants_weight) {
        const Patch inputs = input_patch(band, plan_.input_channels, memory);
        load_inputs(training_, step_.inputs, step_.prologue, 0, plan_.input_channels, band, inputs);
        add_weight_gradient(band, inputs, gradient, whole, result, partial, ahead);
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
      ahead.divide(weight_tile_calls(block));
      add_weight_gradient(band, inputs, gradient, block, sums + floats, sums, ahead);
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
