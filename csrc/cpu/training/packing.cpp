#include "packing.h"

#include <cstring>

#include "cpu/winograd.h"

namespace threshnet_fast::cpu {
namespace {

// Channels that are transformed side by side: as many floats as a line of the cache has.
constexpr int64_t kLanes = 16;
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));

constexpr int64_t kGradientPositions = winograd_positions(kGradientTile);

// Input channels at a time, so that what is written stays in L1 until all lanes of it are there.
constexpr int64_t kTogether = 16;

typedef float Four __attribute__((vector_size(4 * sizeof(float))));
typedef int32_t FourIndices __attribute__((vector_size(4 * sizeof(int32_t))));

inline Four load_four(const float* from) {
  Four result;
  std::memcpy(&result, from, sizeof(result));
  return result;
}

inline void store_four(Four from, float* to) { std::memcpy(to, &from, sizeof(from)); }

#ifdef __clang__
#define THRESHNET_FAST_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define THRESHNET_FAST_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, FourIndices{__VA_ARGS__})
#endif

inline void transpose_four(const float* from, int64_t from_step, float* to, int64_t to_step) {
  const Four a = load_four(from), b = load_four(from + from_step),
             c = load_four(from + 2 * from_step), d = load_four(from + 3 * from_step);
  const Four ab_low = THRESHNET_FAST_SHUFFLE(a, b, 0, 4, 1, 5),
             ab_high = THRESHNET_FAST_SHUFFLE(a, b, 2, 6, 3, 7),
             cd_low = THRESHNET_FAST_SHUFFLE(c, d, 0, 4, 1, 5),
             cd_high = THRESHNET_FAST_SHUFFLE(c, d, 2, 6, 3, 7);
  store_four(THRESHNET_FAST_SHUFFLE(ab_low, cd_low, 0, 1, 4, 5), to);
  store_four(THRESHNET_FAST_SHUFFLE(ab_low, cd_low, 2, 3, 6, 7), to + to_step);
  store_four(THRESHNET_FAST_SHUFFLE(ab_high, cd_high, 0, 1, 4, 5), to + 2 * to_step);
  store_four(THRESHNET_FAST_SHUFFLE(ab_high, cd_high, 2, 3, 6, 7), to + 3 * to_step);
}

#undef THRESHNET_FAST_SHUFFLE

// A matrix in memory: element (r, c) at data[r * row + c * column].
template <typename Float>
struct Matrix {
  Float* data;
  int64_t row, column;

  Float& at(int64_t r, int64_t c) const { return data[r * row + c * column]; }
};

void copy(int64_t rows, int64_t columns, const Matrix<const float>& from, const Matrix<float>& to) {
  if (from.row == 1 && to.row == 1) {
    for (int64_t c = 0; c < columns; ++c) std::copy_n(&from.at(0, c), rows, &to.at(0, c));
    return;
  }
  const bool fours = from.column == 1 && to.row == 1;
  const int64_t four_rows = fours ? rows / 4 * 4 : 0, four_columns = fours ? columns / 4 * 4 : 0;
  for (int64_t r = 0; r < four_rows; r += 4) {
    for (int64_t c = 0; c < four_columns; c += 4)
      transpose_four(&from.at(r, c), from.row, &to.at(r, c), to.column);
    for (int64_t c = four_columns; c < columns; ++c)
      for (int64_t i = r; i < r + 4; ++i) to.at(i, c) = from.at(i, c);
  }
  for (int64_t r = four_rows; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) to.at(r, c) = from.at(r, c);
}

// The distance between taps that follow each other in memory, up or down; otherwise 0.
template <typename Float>
int64_t tap_step(const WeightTaps<Float>& weights) {
  if (weights.count == 1) return 0;
  const int64_t step = weights.taps[1] - weights.taps[0];
  for (int64_t tap = 1; tap < weights.count; ++tap)
    if (weights.taps[tap] - weights.taps[tap - 1] != step) return 0;
  return step == 1 || step == -1 ? step : 0;
}

// The weights of one input channel and some output channels, lanes side by side.
void load_taps(const WeightTaps<const float>& weights, int64_t step, const float* from,
               int64_t lanes, float* to, int64_t tap_floats) {
  const int64_t last = weights.count - 1;
  if (step == 1) {
    copy(lanes, weights.count, {from + weights.taps[0], weights.output_step, 1},
         {to, 1, tap_floats});
  } else if (step == -1) {
    copy(lanes, weights.count, {from + weights.taps[last], weights.output_step, 1},
         {to + last * tap_floats, 1, -tap_floats});
  } else {
    for (int64_t tap = 0; tap <= last; ++tap)
      copy(lanes, 1, {from + weights.taps[tap], weights.output_step, 1},
           {to + tap * tap_floats, 1, 1});
  }
}

void pack_winograd(const Panels& panels, int64_t panel, const WeightTaps<const float>& weights,
                   int64_t tile, float* packed) {
  const int64_t pitch = panels.pitch(panel), step = tap_step(weights);
  const int64_t position_floats = panels.inputs * pitch;
  for (int64_t first = 0; first < pitch; first += kLanes) {
    const int64_t lanes = std::min(pitch - first, kLanes);
    const int64_t channels = std::min(panels.channels(panel) - first, lanes);
    for (int64_t input = 0; input < panels.inputs && channels > 0; ++input) {
      Lanes kernel[9] = {}, transformed[winograd_positions(kMostTile)];
      load_taps(weights, step, weights.at(panels.first(panel) + first, input), channels,
                reinterpret_cast<float*>(kernel), kLanes);
      winograd_kernel<float>(tile, kernel, transformed);
      float* const to = packed + input * pitch + first;
      for (int64_t i = 0; i < winograd_positions(tile); ++i)
        std::memcpy(to + i * position_floats, &transformed[i], lanes * sizeof(float));
    }
  }
}

}  // namespace

void pack_panel(const Panels& panels, int64_t panel, const WeightTaps<const float>& weights,
                int64_t tile, float* packed) {
  packed += panels.offset(panel);
  if (tile != 0) return pack_winograd(panels, panel, weights, tile, packed);
  const int64_t pitch = panels.pitch(panel), channels = panels.channels(panel);
  const int64_t tap_floats = panels.inputs * pitch, step = tap_step(weights);
  for (int64_t first = 0; first < panels.inputs; first += kTogether) {
    const int64_t inputs = std::min(panels.inputs - first, kTogether);
    const float* const from = weights.at(panels.first(panel), first);
    float* const to = packed + first * pitch;
    for (int64_t input = 0; input < inputs && step != 0; ++input)
      load_taps(weights, step, from + input * weights.input_step, channels, to + input * pitch,
                tap_floats);
    for (int64_t tap = 0; tap < panels.taps && step == 0; ++tap)
      copy(channels, inputs, {from + weights.taps[tap], weights.output_step, weights.input_step},
           {to + tap * tap_floats, 1, pitch});
    for (int64_t tap = 0; tap < panels.taps && channels < pitch; ++tap)
      for (int64_t input = 0; input < inputs; ++input)
        std::fill_n(to + tap * tap_floats + input * pitch + channels, pitch - channels, 0.0f);
  }
}

void unpack_gradient(const float* sums, const GradientBlock& block, int64_t begin, int64_t end,
                     bool winograd, const WeightTaps<float>& gradient) {
  const int64_t step = tap_step(gradient), taps = gradient.count;
  const int64_t positions = winograd ? kGradientPositions : taps;
  const int64_t tap_floats = block.inputs * block.pitch;
  for (int64_t first = 0; first < block.outputs; first += kLanes) {
    const int64_t lanes = std::min(block.outputs - first, kLanes);
    float* const outputs = gradient.at(block.first_output + first, block.first_input);
    if (step == 0 && !winograd) {
      for (int64_t tap = 0; tap < taps; ++tap)
        copy(end - begin, lanes,
             {sums + tap * tap_floats + begin * block.pitch + first, block.pitch, 1},
             {outputs + begin * gradient.input_step + gradient.taps[tap], gradient.input_step,
              gradient.output_step});
      continue;
    }
    for (int64_t input = begin; input < end; ++input) {
      const float* from = sums + input * block.pitch + first;
      float* const to = outputs + input * gradient.input_step;
      int64_t from_step = tap_floats;
      Lanes transformed[kGradientPositions] = {}, kernel[9];
      if (winograd) {
        for (int64_t i = 0; i < positions; ++i)
          std::memcpy(&transformed[i], from + i * tap_floats, lanes * sizeof(float));
        winograd_kernel_gradient_2x2(transformed, kernel);
        from = reinterpret_cast<const float*>(kernel);
        from_step = kLanes;
      }
      if (step == 1) {
        copy(taps, lanes, {from, from_step, 1}, {to + gradient.taps[0], 1, gradient.output_step});
      } else {
        for (int64_t tap = 0; tap < taps; ++tap)
          copy(1, lanes, {from + tap * from_step, from_step, 1},
               {to + gradient.taps[tap], 1, gradient.output_step});
      }
    }
  }
}

}  // namespace threshnet_fast::cpu
