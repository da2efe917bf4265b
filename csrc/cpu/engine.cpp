#include <algorithm>
#include <cstring>

#include "program.h"
#include "team.h"

namespace threshnet_fast::cpu {
namespace {

constexpr int32_t kIota[kMaxTilePixels] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13};
constexpr int32_t kZeros[kMaxTilePixels] = {};
constexpr float kNoBias[kMaxTileVectors * 16] = {};

// Splits [0, count) into the fewest tiles of at most `most` pixels, as equal as possible.
struct Tiles {
  int64_t count, tiles;
  Tiles(int64_t count, int64_t most) : count(count), tiles((count + most - 1) / most) {}
  int64_t begin(int64_t tile) const { return count * tile / tiles; }
};

class Engine {
 public:
  Engine(const Program& program, const float* packed, float* workspace, const Binding& binding)
      : program_(program),
        table_(*ukernel_table(program.header().isa)),
        packed_(packed),
        arena_(workspace),
        partials_(workspace + program.header().arena_floats),
        scratch_(partials_ + program.header().partial_floats),
        binding_(binding) {}

  void run(int64_t step_index, int64_t task, int64_t thread) const {
    const Step& step = program_.step(step_index);
    float* scratch = scratch_ + thread * program_.header().scratch_floats;
    switch (step.kind) {
      case kPool:
        return pool(step, task, scratch);
      case kReduction:
        return reduce(step, task);
      default:
        return convolve(step, task, scratch);
    }
  }

 private:
  const float* input_of(const Segment& segment) const {
    const Buffer& buffer = program_.buffer(segment.buffer);
    const float* base = buffer.offset >= 0 ? arena_ + buffer.offset
                                           : binding_.externals[kFirstExternal - buffer.offset];
    return base + segment.channel;
  }

  float* output_of(const Step& step) const {
    const Buffer& buffer = program_.buffer(step.output_buffer);
    return (buffer.offset >= 0 ? arena_ + buffer.offset : binding_.output) + step.output_channel;
  }

  void convolve(const Step& step, int64_t task, float* scratch) const {
    const int64_t split = task % step.split_count;
    const int64_t block = task / step.split_count % step.block_count;
    const int64_t group = task / step.split_count / step.block_count;
    const Panel* panels = program_.at<Panel>(step.panels);
    const int64_t first_pixel = block * step.block_pixels;
    const int64_t pixels = std::min(step.block_pixels, step.pixel_count - first_pixel);
    const int64_t first_panel = group * step.group_panels;
    const int64_t last_panel = std::min(first_panel + step.group_panels, step.panel_count);
    if (step.packs) {
      gather(step, first_pixel, pixels, scratch);
      for (int64_t p = first_panel; p < last_panel; ++p)
        convolve_packed(step, panels[p], first_pixel, pixels, scratch);
    } else {
      for (int64_t p = first_panel; p < last_panel; ++p)
        convolve_direct(step, p, split, first_pixel, pixels, scratch);
    }
  }

  // Where a part of a convolution with split taps leaves its sums: [pixel][NR].
  float* partial_sums(const Step& step, int64_t split, int64_t panel) const {
    return partials_ +
           (split * step.panel_count + panel) * step.pixel_count * kMaxTileVectors * table_.lanes;
  }

  void reduce(const Step& step, int64_t group) const {
    const int32_t* output_pixels = program_.at<int32_t>(step.output_pixels);
    const int64_t pitch = program_.buffer(step.output_buffer).pitch;
    const int64_t last = std::min((group + 1) * step.group_panels, step.panel_count);
    for (int64_t p = group * step.group_panels; p < last; ++p) {
      const Panel& panel = program_.at<Panel>(step.panels)[p];
      const int64_t width = panel.vectors * table_.lanes;
      for (int64_t i = 0; i < step.pixel_count; ++i) {
        float* output = output_of(step) + output_pixels[i] * pitch + panel.channel;
        for (int64_t c = 0; c < panel.channels; ++c) {
          float sum = partial_sums(step, 0, p)[i * width + c];
          for (int64_t split = 1; split < step.split_count; ++split)
            sum += partial_sums(step, split, p)[i * width + c];
          output[c] = step.relu && sum < 0.0f ? 0.0f : sum;
        }
      }
    }
  }

  static int64_t gathered_pitch(const Step& step) {
    const int64_t length = step.kernel_height * step.kernel_width * step.input_channels;
    return (length + 15) / 16 * 16 + 16;
  }

  // Writes each pixel's window as one row [tap][channel], after the prologue; taps that fall on
  // padding are zero, which is why the prologue cannot come later.
  void gather(const Step& step, int64_t first_pixel, int64_t pixels, float* rows) const {
    const int64_t pitch = gathered_pitch(step);
    const Segment* segments = program_.at<Segment>(step.segments);
    const int32_t* input_pixels = program_.at<int32_t>(step.input_pixels) + first_pixel;
    const int32_t* output_pixels = program_.at<int32_t>(step.output_pixels) + first_pixel;
    const uint64_t* pixel_taps = program_.at<uint64_t>(step.pixel_taps) + first_pixel;
    if (program_.buffer(segments[0].buffer).offset == kNetworkInput)
      return gather_strided(step, output_pixels, pixel_taps, pixels, rows);
    for (int64_t i = 0; i < pixels; ++i) {
      float* row = rows + i * pitch;
      for (int64_t tap = 0; tap < step.kernel_height * step.kernel_width; ++tap) {
        float* to = row + tap * step.input_channels;
        if (!(pixel_taps[i] >> tap & 1)) {
          std::memset(to, 0, step.input_channels * sizeof(float));
          continue;
        }
        int64_t channel = 0;
        for (int64_t s = 0; s < step.segment_count; ++s) {
          const Buffer& buffer = program_.buffer(segments[s].buffer);
          const int64_t shift =
              tap / step.kernel_width * buffer.width + tap % step.kernel_width;
          table_.bn_relu(input_of(segments[s]) + (input_pixels[i] + shift) * buffer.pitch,
                         packed_ + step.scale + channel, packed_ + step.shift + channel,
                         segments[s].channels, to + channel);
          channel += segments[s].channels;
        }
      }
    }
  }

  void gather_strided(const Step& step, const int32_t* output_pixels, const uint64_t* pixel_taps,
                      int64_t pixels, float* rows) const {
    const Buffer& to = program_.buffer(step.output_buffer);
    const StridedInput& input = binding_.input;
    const int64_t taps = step.kernel_height * step.kernel_width;
    const int64_t channels = step.input_channels;
    const uint64_t all = ~uint64_t{0} >> (64 - taps);
    const int64_t pitch = gathered_pitch(step);
    int64_t* const offsets = reinterpret_cast<int64_t*>(rows + pixels * pitch);
    for (int64_t tap = 0; tap < taps; ++tap) {
      for (int64_t c = 0; c < channels; ++c)
        offsets[tap * channels + c] = tap / step.kernel_width * input.height_stride +
                                      tap % step.kernel_width * input.width_stride +
                                      c * input.channel_stride;
    }
    int64_t x = to.width;
    const float* image_row = nullptr;
    for (int64_t i = 0; i < pixels; ++i) {
      if (++x >= to.width || output_pixels[i] != output_pixels[i - 1] + 1) {
        const int64_t line = output_pixels[i] / to.width;
        x = output_pixels[i] - line * to.width;
        image_row = input.data + line / to.height * input.batch_stride +
                    (line % to.height * step.stride - step.padding) * input.height_stride;
      }
      const float* from = image_row + (x * step.stride - step.padding) * input.width_stride;
      float* row = rows + i * pitch;
      if (pixel_taps[i] == all) {
        for (int64_t k = 0; k < taps * channels; ++k) row[k] = from[offsets[k]];
        continue;
      }
      for (int64_t tap = 0; tap < taps; ++tap) {
        const bool valid = pixel_taps[i] >> tap & 1;
        for (int64_t k = tap * channels; k < (tap + 1) * channels; ++k)
          row[k] = valid ? from[offsets[k]] : 0.0f;
      }
    }
  }

  ConvTile output_tile(const Step& step, const Panel& panel) const {
    ConvTile tile{};
    const int64_t lanes = panel.vectors * table_.lanes;
    tile.initial =
        packed_ + panel.weights +
        step.kernel_height * step.kernel_width * step.input_channels * lanes;
    tile.initial_rows = kZeros;
    tile.output = output_of(step) + panel.channel;
    tile.output_pitch = program_.buffer(step.output_buffer).pitch;
    tile.channels = panel.channels;
    tile.relu = step.relu != 0;
    return tile;
  }

  void convolve_packed(const Step& step, const Panel& panel, int64_t first_pixel, int64_t pixels,
                       const float* rows) const {
    const int64_t pitch = gathered_pitch(step);
    const int32_t* output_pixels = program_.at<int32_t>(step.output_pixels) + first_pixel;
    ConvTile tile = output_tile(step, panel);
    const Tiles tiles(pixels, table_.tile_pixels[panel.vectors]);
    for (int64_t t = 0; t < tiles.tiles; ++t) {
      const int64_t begin = tiles.begin(t);
      const ChannelRun run{rows + begin * pitch, packed_ + panel.weights, pitch,
                           step.kernel_height * step.kernel_width * step.input_channels};
      tile.runs = &run;
      tile.run_count = 1;
      tile.input_pixels = kIota;
      tile.output_rows = output_pixels + begin;
      table_.conv_tile[panel.vectors][tiles.begin(t + 1) - begin](tile);
    }
  }

  // Appends the runs of one tap: every segment, shifted by the tap.
  ChannelRun* append_runs(const Step& step, const Panel& panel, int64_t tap, ChannelRun* run) const {
    const Segment* segments = program_.at<Segment>(step.segments);
    const int64_t lanes = panel.vectors * table_.lanes;
    const float* weights = packed_ + panel.weights + tap * step.input_channels * lanes;
    for (int64_t s = 0; s < step.segment_count; ++s) {
      const Buffer& buffer = program_.buffer(segments[s].buffer);
      const int64_t shift = tap / step.kernel_width * buffer.width + tap % step.kernel_width;
      *run++ = {input_of(segments[s]) + shift * buffer.pitch, weights, buffer.pitch,
                segments[s].channels};
      weights += segments[s].channels * lanes;
    }
    return run;
  }

  void convolve_direct(const Step& step, int64_t panel_index, int64_t split, int64_t first_pixel,
                       int64_t pixels, float* scratch) const {
    const Panel& panel = program_.at<Panel>(step.panels)[panel_index];
    const int32_t* input_pixels = program_.at<int32_t>(step.input_pixels) + first_pixel;
    const int32_t* output_pixels = program_.at<int32_t>(step.output_pixels) + first_pixel;
    const uint64_t* pixel_taps = program_.at<uint64_t>(step.pixel_taps) + first_pixel;
    const int64_t taps = step.kernel_height * step.kernel_width;
    const int64_t lanes = panel.vectors * table_.lanes;
    const ConvTileFunction* conv_tile = table_.conv_tile[panel.vectors];
    const Tiles tiles(pixels, table_.tile_pixels[panel.vectors]);
    const bool one_chunk = step.taps_per_chunk >= taps;
    ChannelRun* const runs = reinterpret_cast<ChannelRun*>(scratch);
    const bool partial_result = step.split_count > 1;
    float* const accumulators =
        partial_result
            ? partial_sums(step, split, panel_index)
            : scratch + (taps * step.segment_count * sizeof(ChannelRun) / 4 + 15) / 16 * 16;
    const uint64_t split_taps =
        partial_result ? program_.at<uint64_t>(step.split_taps)[split] : ~uint64_t{0};

    for (int64_t chunk = 0; chunk < taps; chunk += step.taps_per_chunk) {
      const int64_t chunk_end = std::min(chunk + step.taps_per_chunk, taps);
      const uint64_t chunk_taps =
          split_taps & (~uint64_t{0} >> (64 - (chunk_end - chunk))) << chunk;
      for (int64_t t = 0; t < tiles.tiles; ++t) {
        const int64_t begin = tiles.begin(t);
        const int64_t count = tiles.begin(t + 1) - begin;
        uint64_t every = chunk_taps;
        uint64_t any = 0;
        for (int64_t i = 0; i < count; ++i) {
          every &= pixel_taps[begin + i];
          any |= pixel_taps[begin + i];
        }
        const uint64_t some = any & chunk_taps & ~every;

        ConvTile start = output_tile(step, panel);
        start.input_pixels = kZeros;
        if (split > 0) start.initial = kNoBias;
        float* const sums = one_chunk && !partial_result ? accumulators : accumulators + begin * lanes;
        const auto to_sums = [&](ConvTile& partial) {
          partial.output = sums;
          partial.output_rows = kIota;
          partial.output_pitch = lanes;
          partial.channels = lanes;
          partial.relu = false;
        };
        bool started = chunk > 0;
        const auto from_sums = [&](ConvTile& partial) {
          partial.initial = sums;
          partial.initial_rows = kIota;
          partial.initial_pitch = lanes;
        };

        for (uint64_t left = some; left != 0; left &= left - 1) {
          const int64_t tap = __builtin_ctzll(left);
          if (!started) {
            ConvTile bias = start;
            to_sums(bias);
            conv_tile[count](bias);
            started = true;
          }
          int32_t inputs[kMaxTilePixels];
          int32_t rows[kMaxTilePixels];
          int64_t used = 0;
          for (int64_t i = 0; i < count; ++i) {
            inputs[used] = input_pixels[begin + i];
            rows[used] = static_cast<int32_t>(i);
            used += pixel_taps[begin + i] >> tap & 1;
          }
          ConvTile partial{};
          partial.runs = runs;
          partial.run_count = append_runs(step, panel, tap, runs) - runs;
          partial.input_pixels = inputs;
          to_sums(partial);
          from_sums(partial);
          partial.initial_rows = rows;
          partial.output_rows = rows;
          conv_tile[used](partial);
        }

        ConvTile tile = start;
        ChannelRun* run = runs;
        for (uint64_t left = every; left != 0; left &= left - 1)
          run = append_runs(step, panel, __builtin_ctzll(left), run);
        tile.runs = runs;
        tile.run_count = run - runs;
        tile.input_pixels = input_pixels + begin;
        tile.output_rows = output_pixels + begin;
        if (started) from_sums(tile);
        if (chunk_end < taps || partial_result) {
          to_sums(tile);
          if (started && tile.run_count == 0) continue;
        }
        conv_tile[count](tile);
      }
    }
  }

  void pool(const Step& step, int64_t block, float* scratch) const {
    const Segment& segment = *program_.at<Segment>(step.segments);
    const Buffer& from = program_.buffer(segment.buffer);
    const Buffer& to = program_.buffer(step.output_buffer);
    const float* input = input_of(segment);
    float* output = output_of(step);
    int64_t* const offsets = reinterpret_cast<int64_t*>(scratch);
    const int64_t rows = program_.header().batch * to.height;
    const int64_t last = std::min((block + 1) * step.block_pixels, rows);
    for (int64_t row = block * step.block_pixels; row < last; ++row) {
      const int64_t n = row / to.height;
      const int64_t top = row % to.height * step.stride - step.padding;
      for (int64_t x = 0; x < to.width; ++x) {
        const int64_t left = x * step.stride - step.padding;
        int64_t count = 0;
        for (int64_t ky = 0; ky < step.kernel_height; ++ky) {
          for (int64_t kx = 0; kx < step.kernel_width; ++kx) {
            const int64_t y = top + ky;
            const int64_t column = left + kx;
            if (y >= 0 && y < from.height && column >= 0 && column < from.width)
              offsets[count++] = ((n * from.height + y) * from.width + column) * from.pitch;
          }
        }
        (step.average ? table_.average_pool : table_.max_pool)(
            input, offsets, count, segment.channels, 1.0f / static_cast<float>(count),
            output + (row * to.width + x) * to.pitch);
      }
    }
  }

  const Program& program_;
  const UkernelTable& table_;
  const float* packed_;
  float* arena_;
  float* partials_;
  float* scratch_;
  const Binding& binding_;
};

}  // namespace

static int64_t task_count(const Step& step) {
  const int64_t tasks = step.block_count * step.group_count;
  return step.kind == kConvolution ? tasks * step.split_count : tasks;
}

void run(const Program& program, const float* packed, float* workspace, const Binding& binding,
         int64_t threads, ParallelFor parallel_for) {
  const ProgramHeader& header = program.header();
  std::vector<int64_t> tasks;
  for (int64_t i = 0; i < header.step_count; ++i)
    tasks.push_back(task_count(program.step(i)));
  const Engine engine(program, packed, workspace, binding);
  Team team(threads, tasks);
  struct Context {
    const Engine& engine;
    Team& team;
  } context{engine, team};
  parallel_for(
      threads,
      [](void* opaque, int64_t begin, int64_t) {
        const Context& context = *static_cast<Context*>(opaque);
        context.team.work(begin, [&](int64_t step, int64_t task) {
          context.engine.run(step, task, begin);
        });
      },
      &context);
}

}  // namespace threshnet_fast::cpu
