// The micro-kernels of training, written once over `Vector` as those in templates.h are.
#pragma once

#include "training.h"

namespace threshnet_fast::cpu {
namespace {

// How many vectors of channels are worked on side by side, so that their sums stay in registers.
constexpr int kSumVectors = 4;

// sum[i][j] += input[i] * gradient[j] for every pixel: an outer product whose sides lie next to
// each other in memory.
template <int kChannels, int kVectors>
void weight_gradient_tile(const WeightGradientTile& tile) {
  constexpr int64_t kLanes = Vector::kLanes;
  Vector sum[kChannels][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kChannels; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j)
      sum[i][j] = Vector::load(tile.output + i * tile.output_pitch + j * kLanes);
  }
  const char* fetch = static_cast<const char*>(tile.fetch.address);
  if (fetch == nullptr) fetch = reinterpret_cast<const char*>(tile.output);
  for (int64_t r = 0; r < tile.run_count; ++r) {
    const float* input = tile.runs[r].input;
    const float* gradient = tile.runs[r].gradient;
    for (int64_t p = tile.runs[r].count; p > 0; --p) {
      Vector factor[kVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) factor[j] = Vector::load(gradient + j * kLanes);
      __builtin_prefetch(fetch, 0, 2);
      fetch += tile.fetch.step;
#pragma GCC unroll 16
      for (int i = 0; i < kChannels; ++i) {
        const Vector value = Vector::broadcast(input + i);
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) sum[i][j].multiply_add(value, factor[j]);
      }
      input += tile.input_pitch;
      gradient += tile.gradient_pitch;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kChannels; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j)
      sum[i][j].store(tile.output + i * tile.output_pitch + j * kLanes);
  }
}

inline Vector product(Vector a, Vector b) {
  Vector result = Vector::zero();
  result.multiply_add(a, b);
  return result;
}

inline Vector difference(Vector a, Vector b) {
  a.subtract(b);
  return a;
}

inline Vector constant(float value) { return Vector::broadcast(&value); }

// A vector of a row that may have fewer channels left than a vector has lanes.
inline Vector load_channels(const float* p, int64_t left) {
  return left >= Vector::kLanes ? Vector::load(p) : Vector::load(p, left);
}
inline void store_channels(Vector vector, float* p, int64_t left) {
  if (left >= Vector::kLanes) {
    vector.store(p);
  } else {
    vector.store(p, left);
  }
}

inline Vector before_activation(Vector value, Vector scale, Vector shift) {
  shift.multiply_add(value, scale);
  return shift;
}

template <Activation kActivation>
inline Vector activated(Vector value) {
  if constexpr (kActivation != kIdentity) value.relu();
  if constexpr (kActivation == kRelu6) {
    // The smaller of the two; a NaN stays a NaN.
    value.scale(-1.0f);
    value.maximum(constant(-6.0f));
    value.scale(-1.0f);
  }
  return value;
}

// The gradient where the activation passes one on, else 0.
template <Activation kActivation>
inline Vector gated(Vector gradient, Vector before) {
  if constexpr (kActivation != kIdentity) gradient.drop_where_not_positive(before);
  if constexpr (kActivation == kRelu6)
    gradient.drop_where_not_positive(difference(constant(6.0f), before));
  return gradient;
}

// Calls body(activation as a constant).
template <Activation kActivation>
struct ActivationConstant {
  static constexpr Activation value = kActivation;
};
template <typename Body>
inline void with_activation(Activation activation, const Body& body) {
  if (activation == kRelu) return body(ActivationConstant<kRelu>{});
  if (activation == kRelu6) return body(ActivationConstant<kRelu6>{});
  body(ActivationConstant<kIdentity>{});
}

void normalize(Rows input, const Prologue& prologue, int64_t count, int64_t channels,
               MutableRows output) {
  with_activation(prologue.activation, [&](auto activation) {
    for (int64_t p = 0; p < count; ++p) {
      const float* from = input.data + p * input.pitch;
      float* to = output.data + p * output.pitch;
      for (int64_t c = 0; c < channels; c += Vector::kLanes) {
        const int64_t left = channels - c;
        const Vector before = before_activation(load_channels(from + c, left),
                                                load_channels(prologue.scale + c, left),
                                                load_channels(prologue.shift + c, left));
        store_channels(activated<decltype(activation)::value>(before), to + c, left);
      }
    }
  });
}

void map_gradient(Rows gradient, Rows map, const float* slope, const float* offset, int64_t count,
                  int64_t channels, MutableRows output) {
  for (int64_t p = 0; p < count; ++p) {
    const float* from = gradient.data + p * gradient.pitch;
    const float* value = map.data + p * map.pitch;
    float* to = output.data + p * output.pitch;
    for (int64_t c = 0; c < channels; c += Vector::kLanes) {
      const int64_t left = channels - c;
      Vector result = load_channels(from + c, left);
      result.subtract(product(load_channels(value + c, left), load_channels(slope + c, left)));
      result.add(load_channels(offset + c, left));
      store_channels(result, to + c, left);
    }
  }
}

template <Activation kActivation, bool kAccumulate, int kVectors>
inline void prologue_gradient_channels(const PrologueGradient& step, int64_t first, int64_t left) {
  constexpr int64_t kLanes = Vector::kLanes;
  Vector scale[kVectors], shift[kVectors], mean[kVectors], sum[kVectors], moment[kVectors];
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) {
    const int64_t c = first + j * kLanes;
    const int64_t lanes = left - j * kLanes;
    scale[j] = load_channels(step.prologue.scale + c, lanes);
    shift[j] = load_channels(step.prologue.shift + c, lanes);
    mean[j] = load_channels(step.mean + c, lanes);
    sum[j] = moment[j] = Vector::zero();
  }
  for (int64_t p = 0; p < step.count; ++p) {
    const float* gradient = step.gradient.data + p * step.gradient.pitch + first;
    const float* map = step.map.data + p * step.map.pitch + first;
    float* output = step.output.data + p * step.output.pitch + first;
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      const int64_t c = j * kLanes;
      const Vector value = load_channels(map + c, left - c);
      const Vector passed = gated<kActivation>(load_channels(gradient + c, left - c),
                                               before_activation(value, scale[j], shift[j]));
      sum[j].add(passed);
      moment[j].multiply_add(passed, difference(value, mean[j]));
      Vector result = kAccumulate ? load_channels(output + c, left - c) : Vector::zero();
      result.multiply_add(passed, scale[j]);
      store_channels(result, output + c, left - c);
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) {
    const int64_t c = first + j * kLanes;
    const int64_t lanes = left - j * kLanes;
    float* const sums = step.sums + c;
    float* const moments = sums + step.sums_pitch;
    sum[j].add(load_channels(sums, lanes));
    moment[j].add(load_channels(moments, lanes));
    store_channels(sum[j], sums, lanes);
    store_channels(moment[j], moments, lanes);
  }
}

template <Activation kActivation, bool kAccumulate>
inline void prologue_gradient_as(const PrologueGradient& step) {
  constexpr int64_t kTogether = kSumVectors * Vector::kLanes;
  int64_t c = 0;
  for (; c + kTogether <= step.channels; c += kTogether)
    prologue_gradient_channels<kActivation, kAccumulate, kSumVectors>(step, c, kTogether);
  for (; c < step.channels; c += Vector::kLanes)
    prologue_gradient_channels<kActivation, kAccumulate, 1>(step, c, step.channels - c);
}

void prologue_gradient(const PrologueGradient& step) {
  with_activation(step.prologue.activation, [&](auto activation) {
    if (step.accumulate) {
      prologue_gradient_as<decltype(activation)::value, true>(step);
    } else {
      prologue_gradient_as<decltype(activation)::value, false>(step);
    }
  });
}

template <int kVectors>
inline void moments_of_channels(Rows map, const float* origin, int64_t count, int64_t first,
                                int64_t left, float* sums, int64_t sums_pitch) {
  constexpr int64_t kLanes = Vector::kLanes;
  Vector start[kVectors], sum[kVectors], square[kVectors];
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) {
    start[j] = load_channels(origin + first + j * kLanes, left - j * kLanes);
    sum[j] = square[j] = Vector::zero();
  }
  for (int64_t p = 0; p < count; ++p) {
    const float* row = map.data + p * map.pitch + first;
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      const Vector value = difference(load_channels(row + j * kLanes, left - j * kLanes), start[j]);
      sum[j].add(value);
      square[j].multiply_add(value, value);
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) {
    const int64_t lanes = left - j * kLanes;
    float* const to = sums + first + j * kLanes;
    sum[j].add(load_channels(to, lanes));
    square[j].add(load_channels(to + sums_pitch, lanes));
    store_channels(sum[j], to, lanes);
    store_channels(square[j], to + sums_pitch, lanes);
  }
}

void moments(Rows map, const float* origin, int64_t count, int64_t channels, float* sums,
             int64_t sums_pitch) {
  constexpr int64_t kTogether = kSumVectors * Vector::kLanes;
  int64_t c = 0;
  for (; c + kTogether <= channels; c += kTogether)
    moments_of_channels<kSumVectors>(map, origin, count, c, kTogether, sums, sums_pitch);
  for (; c < channels; c += Vector::kLanes)
    moments_of_channels<1>(map, origin, count, c, channels - c, sums, sums_pitch);
}

// The largest normalised value of a window's pixels.
template <Activation kActivation>
inline Vector window_maximum(const float* input, const int64_t* offsets, int64_t count,
                             Vector scale, Vector shift, int64_t left) {
  const auto value = [&](int64_t i) {
    return activated<kActivation>(
        before_activation(load_channels(input + offsets[i], left), scale, shift));
  };
  Vector result = value(0);
  for (int64_t i = 1; i < count; ++i) result.maximum(value(i));
  return result;
}

void normalized_max_pool(const float* input, const int64_t* offsets, int64_t count,
                         const Prologue& prologue, int64_t channels, float* output) {
  with_activation(prologue.activation, [&](auto activation) {
    for (int64_t c = 0; c < channels; c += Vector::kLanes) {
      const int64_t left = channels - c;
      const Vector result = window_maximum<decltype(activation)::value>(
          input + c, offsets, count, load_channels(prologue.scale + c, left),
          load_channels(prologue.shift + c, left), left);
      store_channels(result, output + c, left);
    }
  });
}

void max_pool_gradient(const float* input, const int64_t* offsets, const int64_t* output_offsets,
                       int64_t count, const Prologue& prologue, int64_t channels,
                       const float* gradient, float* output) {
  with_activation(prologue.activation, [&](auto activation) {
    constexpr Activation kActivation = decltype(activation)::value;
    for (int64_t c = 0; c < channels; c += Vector::kLanes) {
      const int64_t left = channels - c;
      const Vector scale = load_channels(prologue.scale + c, left);
      const Vector shift = load_channels(prologue.shift + c, left);
      const Vector maximum =
          window_maximum<kActivation>(input + c, offsets, count, scale, shift, left);
      // What no pixel before had the maximum of.
      Vector pending = load_channels(gradient + c, left);
      for (int64_t i = 0; i < count; ++i) {
        const Vector value = activated<kActivation>(
            before_activation(load_channels(input + offsets[i] + c, left), scale, shift));
        Vector rest = pending;
        rest.drop_where_equal(value, maximum);
        float* const to = output + output_offsets[i] + c;
        Vector sum = load_channels(to, left);
        sum.add(difference(pending, rest));
        store_channels(sum, to, left);
        pending = rest;
      }
    }
  });
}

// One direction of the transform: rows of A.
inline void winograd_gradient_line(Vector a, Vector b, Vector (&result)[4]) {
  result[0] = result[1] = result[2] = a;
  result[1].add(b);
  result[2].subtract(b);
  result[3] = difference(Vector::zero(), b);
}

void winograd_gradient(const float* const* pixels, int64_t channels, float* output,
                       int64_t output_pitch) {
  for (int64_t c = 0; c < channels; c += Vector::kLanes) {
    const int64_t left = channels - c;
    Vector columns[2][4];
    for (int x = 0; x < 2; ++x)
      winograd_gradient_line(load_channels(pixels[x] + c, left),
                             load_channels(pixels[2 + x] + c, left), columns[x]);
#pragma GCC unroll 4
    for (int y = 0; y < 4; ++y) {
      Vector row[4];
      winograd_gradient_line(columns[0][y], columns[1][y], row);
#pragma GCC unroll 4
      for (int x = 0; x < 4; ++x)
        store_channels(row[x], output + (4 * y + x) * output_pitch + c, left);
    }
  }
}

void depthwise_gradient(const DepthwiseGradientRow& row) {
  for (int64_t c = 0; c < row.channels; c += Vector::kLanes) {
    const int64_t left = row.channels - c;
    for (int64_t p = 0; p < row.pixels; ++p) {
      const Vector gradient = load_channels(row.gradient + p * row.gradient_step + c, left);
      const int64_t pixel = p * row.input_step + c;
      for (int64_t t = 0; t < row.taps && row.input_gradient != nullptr; ++t) {
        float* const to = row.input_gradient + pixel + row.offsets[t];
        Vector sum = load_channels(to, left);
        sum.multiply_add(gradient, load_channels(row.weights + t * row.weight_pitch + c, left));
        store_channels(sum, to, left);
      }
      for (int64_t t = 0; t < row.taps && row.weight_gradient != nullptr; ++t) {
        float* const to = row.weight_gradient + t * row.weight_pitch + c;
        Vector sum = load_channels(to, left);
        sum.multiply_add(gradient, load_channels(row.input + pixel + row.offsets[t], left));
        store_channels(sum, to, left);
      }
    }
  }
}

constexpr TrainingTable training_table_of(
    const WeightGradientFunction (*weight_gradient)[kMaxTilePixels + 1]) {
  return {weight_gradient,     normalize,         map_gradient,      prologue_gradient, moments,
          normalized_max_pool, max_pool_gradient, winograd_gradient, depthwise_gradient};
}

// [vectors][channels]
#define THRESHNET_FAST_GRADIENT_ROW_6(V)                                                       \
  nullptr, weight_gradient_tile<1, V>, weight_gradient_tile<2, V>, weight_gradient_tile<3, V>, \
      weight_gradient_tile<4, V>, weight_gradient_tile<5, V>, weight_gradient_tile<6, V>
#define THRESHNET_FAST_GRADIENT_ROW_8(V) \
  THRESHNET_FAST_GRADIENT_ROW_6(V), weight_gradient_tile<7, V>, weight_gradient_tile<8, V>
#define THRESHNET_FAST_GRADIENT_ROW_14(V)                                                    \
  THRESHNET_FAST_GRADIENT_ROW_8(V), weight_gradient_tile<9, V>, weight_gradient_tile<10, V>, \
      weight_gradient_tile<11, V>, weight_gradient_tile<12, V>, weight_gradient_tile<13, V>, \
      weight_gradient_tile<14, V>

}  // namespace
}  // namespace threshnet_fast::cpu
