// The micro-kernels, written once over `Vector`, a type of float lanes, and `Element`, what
// features and weights are stored in, which each instruction set's source file defines before it
// includes this header. Everything lives in an unnamed namespace: each source file gets its own
// copies, compiled for its own instruction set.
#pragma once

#include "ukernels.h"

namespace threshnet_fast::cpu {
namespace {

// Elements are converted where they are loaded and stored, words are multiplied as they are. A file
// whose elements are not floats brings its own of these.
inline Vector load_elements(const float* p) { return Vector::load(p); }
inline Vector load_elements(const float* p, int64_t lanes) { return Vector::load(p, lanes); }
inline void store_elements(Vector vector, float* p) { vector.store(p); }
inline void store_elements(Vector vector, float* p, int64_t lanes) { vector.store(p, lanes); }
inline Vector load_words(const float* p) { return Vector::load(p); }
inline Vector broadcast_word(const float* p) { return Vector::broadcast(p); }
inline void multiply_add_words(Vector& sum, Vector a, Vector b, const float*) {
  sum.multiply_add(a, b);
}

inline __attribute__((always_inline)) Vector splat(float value) {
  return Vector::broadcast(&value);
}

inline __attribute__((always_inline)) void activate(Vector& value, Activation activation) {
  if (activation != kIdentity) value.relu();
  if (activation == kRelu6) value.at_most(splat(6.0f));
}

constexpr int32_t kOrder[kMaxTilePixels] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13};

// How many words' products a chain of additions takes before it is added to the sum of the chains
// before it: the rounding error then grows with the square root of 128 plus the number of chains,
// not of all products.
constexpr int64_t kChainWords = 128;

constexpr int64_t kPrefetchWords = 4096;
constexpr int64_t kLineWords = 16;
constexpr int64_t kElements = kWordChannels<Element>;  // in a word

// Whether a vector can be multiplied by one lane of another, which it then says itself.
template <typename V, typename = void>
constexpr bool kMultipliesByLane = false;
template <typename V>
constexpr bool kMultipliesByLane<V, decltype(void(V::kMultipliesByLane))> = V::kMultipliesByLane;

// Products of kLanes channels, from lane kLane on: kPixels * kVectors chains of additions, so that
// none waits for the one before it.
template <int kLane, int kPixels, int kVectors, typename V>
inline __attribute__((always_inline)) void multiply_lanes(V (&accumulator)[kPixels][kVectors],
                                                          const V (&pixel)[kPixels],
                                                          const float* weights,
                                                          int64_t weight_pitch) {
  V weight[kVectors];
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) weight[j] = V::load(weights + j * V::kLanes);
#pragma GCC unroll 16
  for (int i = 0; i < kPixels; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j)
      accumulator[i][j].template multiply_add_lane<kLane>(weight[j], pixel[i]);
  }
  if constexpr (kLane + 1 < V::kLanes)
    multiply_lanes<kLane + 1>(accumulator, pixel, weights + weight_pitch, weight_pitch);
}

// As many whole vectors of channels as there are: one load gives the factors of kLanes channels of
// a pixel. Returns how many channels that were.
template <int kPixels, int kVectors, typename V>
inline __attribute__((always_inline)) int64_t
multiply_by_lanes(V (&accumulator)[kPixels][kVectors], const float* const (&pixel)[kPixels],
                  const float* weights, int64_t weight_pitch, int64_t channels) {
  int64_t c = 0;
  for (; c + V::kLanes <= channels; c += V::kLanes) {
    V values[kPixels];
#pragma GCC unroll 16
    for (int i = 0; i < kPixels; ++i) values[i] = V::load(pixel[i] + c);
#pragma GCC unroll 4
    for (int64_t p = 0; p < kVectors * V::kLanes * V::kLanes; p += kLineWords)
      __builtin_prefetch(weights + kPrefetchWords + p, 0, 2);
    multiply_lanes<0>(accumulator, values, weights, weight_pitch);
    weights += V::kLanes * weight_pitch;
  }
  return c;
}

template <int kPixels, int kVectors, typename To>
inline __attribute__((always_inline)) void store_tile(const Vector (&values)[kPixels][kVectors],
                                                      const ConvTile<Element>& tile, To* output) {
  constexpr int64_t kLanes = Vector::kLanes;
  const bool whole = tile.channels == kVectors * kLanes;
#pragma GCC unroll 16
  for (int i = 0; i < kPixels; ++i) {
    To* row = output + tile.output_rows[i] * tile.output_pitch;
    if (whole) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) store_elements(values[i][j], row + j * kLanes);
    } else {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        const int64_t left = tile.channels - j * kLanes;
        if (left > 0) store_elements(values[i][j], row + j * kLanes, left < kLanes ? left : kLanes);
      }
    }
  }
}

// Where the words of a tile's pixels are, one pointer each.
template <int kPixels>
struct ScatteredPixels {
  static constexpr int kCount = kPixels;
  const Element* pixel[kPixels];
  int64_t word = 0;

  inline __attribute__((always_inline)) Vector broadcast(int i) const {
    return broadcast_word(pixel[i] + word * kElements);
  }
  inline __attribute__((always_inline)) void advance() { ++word; }
};

// The same for pixels at equal distances: pointers to every fifth and four multiples of the
// distance, which an address adds up. They fit in the general registers, a pointer for every pixel
// does not.
template <int kPixels>
struct EvenPixels {
  static constexpr int kCount = kPixels;
  const char* fifth[(kPixels + 4) / 5];
  int64_t multiples[5];

  EvenPixels(const Element* first, int64_t pitch) {
    const int64_t distance = pitch * static_cast<int64_t>(sizeof(Element));
#pragma GCC unroll 5
    for (int i = 0; i < 5; ++i) multiples[i] = i * distance;
#pragma GCC unroll 3
    for (int i = 0; i < (kPixels + 4) / 5; ++i)
      fifth[i] = reinterpret_cast<const char*>(first) + i * 5 * distance;
  }
  inline __attribute__((always_inline)) Vector broadcast(int i) const {
    return broadcast_word(reinterpret_cast<const Element*>(fifth[i / 5] + multiples[i % 5]));
  }
  inline __attribute__((always_inline)) void advance() {
    for (const char*& pointer : fifth) pointer += sizeof(float);
  }
};

// What is fetched into the cache with every word.
struct FetchStream {
  const char* address;
  int64_t step;

  inline __attribute__((always_inline)) void advance() {
    __builtin_prefetch(address, 0, 2);
    address += step;
  }
};

template <int kVectors, typename Pixels>
inline __attribute__((always_inline)) void multiply_words(
    Vector (&accumulator)[Pixels::kCount][kVectors], Pixels pixels, const Element* weights,
    int64_t weight_pitch, FetchStream& first, FetchStream& second, int64_t words) {
  for (int64_t w = 0; w < words; ++w) {
    Vector weight[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j)
      weight[j] = load_words(weights + j * Vector::kLanes * kElements);
    first.advance();
    second.advance();
    weights += weight_pitch * kElements;
#pragma GCC unroll 16
    for (int i = 0; i < Pixels::kCount; ++i) {
      const Vector value = pixels.broadcast(i);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j)
        multiply_add_words(accumulator[i][j], value, weight[j], weights);
    }
    pixels.advance();
  }
}

// Broadcast a word of a pixel, multiply it by vectors of output channels: with kPixels * kVectors
// accumulators in registers, every weight vector loaded serves kPixels multiply-adds.
template <int kPixels, int kVectors>
void conv_tile(const ConvTile<Element>& tile) {
  constexpr int64_t kLanes = Vector::kLanes;
  Vector accumulator[kPixels][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kPixels; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) accumulator[i][j] = Vector::zero();
  }
  float sums[kPixels][kVectors * kLanes];
  const float* initial = tile.initial;
  const int32_t* initial_rows = tile.initial_rows;
  int64_t initial_pitch = tile.initial_pitch;
  int64_t chain = 0;
  // Fewer pixels leave registers enough.
  bool even = kPixels > 6 && !kMultipliesByLane<Vector>;
  for (int i = 1; i < kPixels && even; ++i) even = tile.input_pixels[i] == tile.input_pixels[0] + i;

  for (int64_t r = 0; r < tile.run_count; ++r) {
    const ChannelRun<Element>& run = tile.runs[r];
    const int64_t run_words = run.channels / kElements;
    const Element* weights = run.weights;
    FetchStream streams[2];
    for (int i = 0; i < 2; ++i) {
      const Fetch& fetch = run.fetches[i];
      const bool given = fetch.address != nullptr;
      const Element* later = weights + (kPrefetchWords + i * kLineWords) * kElements;
      streams[i] = {static_cast<const char*>(given ? fetch.address : later),
                    given ? fetch.step : tile.weight_pitch * static_cast<int64_t>(sizeof(float))};
    }
    for (int64_t first = 0; first < run_words; first += kChainWords) {
      const int64_t left = run_words - first;
      const int64_t words = left < kChainWords ? left : kChainWords;
      if (chain + words > kChainWords) {
#pragma GCC unroll 16
        for (int i = 0; i < kPixels; ++i) {
          const float* row = initial + initial_rows[i] * initial_pitch;
#pragma GCC unroll 4
          for (int j = 0; j < kVectors; ++j) {
            accumulator[i][j].add(Vector::load(row + j * kLanes));
            accumulator[i][j].store(sums[i] + j * kLanes);
            accumulator[i][j] = Vector::zero();
          }
        }
        initial = sums[0];
        initial_rows = kOrder;
        initial_pitch = kVectors * kLanes;
        chain = 0;
      }
      chain += words;
      const Element* const input = run.input + first * kElements;
      if (even) {
        multiply_words<kVectors>(
            accumulator, EvenPixels<kPixels>(input + tile.input_pixels[0] * run.pitch, run.pitch),
            weights, tile.weight_pitch, streams[0], streams[1], words);
      } else {
        ScatteredPixels<kPixels> pixels;
#pragma GCC unroll 16
        for (int i = 0; i < kPixels; ++i)
          pixels.pixel[i] = input + tile.input_pixels[i] * run.pitch;
        if constexpr (kMultipliesByLane<Vector>) {
          pixels.word =
              multiply_by_lanes(accumulator, pixels.pixel, weights, tile.weight_pitch, words);
        }
        multiply_words<kVectors>(accumulator, pixels,
                                 weights + pixels.word * tile.weight_pitch * kElements,
                                 tile.weight_pitch, streams[0], streams[1], words - pixels.word);
      }
      weights += words * tile.weight_pitch * kElements;
    }
  }

#pragma GCC unroll 16
  for (int i = 0; i < kPixels; ++i) {
    const float* row = initial + initial_rows[i] * initial_pitch;
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) accumulator[i][j].add(Vector::load(row + j * kLanes));
  }
  if (tile.activation != kIdentity) {
#pragma GCC unroll 16
    for (int i = 0; i < kPixels; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) accumulator[i][j].relu();
    }
  }
  if (tile.activation == kRelu6) {
    const Vector six = splat(6.0f);
#pragma GCC unroll 16
    for (int i = 0; i < kPixels; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) accumulator[i][j].at_most(six);
    }
  }
  if (tile.sums != nullptr) {
    store_tile(accumulator, tile, tile.sums);
  } else {
    store_tile(accumulator, tile, tile.output);
  }
}

template <Activation kActivation>
void affine(const Element* input, const float* scale, const float* shift, int64_t channels,
            Element* output) {
  constexpr int64_t kLanes = Vector::kLanes;
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) {
    Vector value = Vector::load(shift + c);
    value.multiply_add(load_elements(input + c), Vector::load(scale + c));
    activate(value, kActivation);
    store_elements(value, output + c);
  }
  if (const int64_t left = channels - c; left > 0) {
    Vector value = Vector::load(shift + c, left);
    value.multiply_add(load_elements(input + c, left), Vector::load(scale + c, left));
    activate(value, kActivation);
    store_elements(value, output + c, left);
  }
}

void max_pool(const Element* input, const int64_t* offsets, int64_t count, int64_t channels, float,
              Element* output) {
  constexpr int64_t kLanes = Vector::kLanes;
  for (int64_t c = 0; c < channels; c += kLanes) {
    const int64_t left = channels - c < kLanes ? channels - c : kLanes;
    Vector result = load_elements(input + offsets[0] + c, left);
    for (int64_t i = 1; i < count; ++i) result.maximum(load_elements(input + offsets[i] + c, left));
    store_elements(result, output + c, left);
  }
}

void average_pool(const Element* input, const int64_t* offsets, int64_t count, int64_t channels,
                  float factor, Element* output) {
  constexpr int64_t kLanes = Vector::kLanes;
  for (int64_t c = 0; c < channels; c += kLanes) {
    const int64_t left = channels - c < kLanes ? channels - c : kLanes;
    Vector sum = load_elements(input + offsets[0] + c, left);
    for (int64_t i = 1; i < count; ++i) sum.add(load_elements(input + offsets[i] + c, left));
    sum.scale(factor);
    store_elements(sum, output + c, left);
  }
}

template <Activation kActivation>
void affine_average_pool(const Element* input, const int64_t* offsets, int64_t count,
                         const float* scale, const float* shift, int64_t channels, float factor,
                         Element* output) {
  constexpr int64_t kLanes = Vector::kLanes;
  for (int64_t c = 0; c < channels; c += kLanes) {
    const int64_t left = channels - c < kLanes ? channels - c : kLanes;
    const Vector channel_scale = Vector::load(scale + c, left);
    const Vector channel_shift = Vector::load(shift + c, left);
    Vector sum = Vector::zero();
    for (int64_t i = 0; i < count; ++i) {
      Vector value = channel_shift;
      value.multiply_add(load_elements(input + offsets[i] + c, left), channel_scale);
      activate(value, kActivation);
      sum.add(value);
    }
    sum.scale(factor);
    store_elements(sum, output + c, left);
  }
}

// One vector of channels of a depthwise convolution; with kTaps of 0 there are row.taps.
template <int kTaps>
inline __attribute__((always_inline)) void depthwise_channels(const DepthwiseRow<Element>& row,
                                                              int64_t channel, int64_t lanes) {
  constexpr int kHeld = kTaps > 0 ? kTaps : 1;
  const bool whole = lanes == Vector::kLanes;
  const float* weights = row.weights + channel;
  Vector held[kHeld];
  if (kTaps > 0) {
#pragma GCC unroll 9
    for (int t = 0; t < kHeld; ++t) held[t] = Vector::load(weights + row.weight_offsets[t]);
  }
  const Vector bias = Vector::load(row.bias + channel);
  const Element* input = row.input + channel;
  Element* output = row.output + channel;
  for (int64_t p = 0; p < row.pixels; ++p) {
    Vector sum = bias;
    if (kTaps > 0) {
#pragma GCC unroll 9
      for (int t = 0; t < kHeld; ++t) {
        const Element* from = input + row.input_offsets[t];
        sum.multiply_add(whole ? load_elements(from) : load_elements(from, lanes), held[t]);
      }
    } else {
      for (int64_t t = 0; t < row.taps; ++t)
        sum.multiply_add(load_elements(input + row.input_offsets[t], lanes),
                         Vector::load(weights + row.weight_offsets[t]));
    }
    activate(sum, row.activation);
    if (whole) {
      store_elements(sum, output);
    } else {
      store_elements(sum, output, lanes);
    }
    input += row.input_step;
    output += row.output_step;
  }
}

void depthwise(const DepthwiseRow<Element>& row) {
  constexpr int64_t kLanes = Vector::kLanes;
  constexpr int kHeldTaps = 9;
  for (int64_t c = 0; c < row.channels; c += kLanes) {
    const int64_t left = row.channels - c < kLanes ? row.channels - c : kLanes;
    if (row.taps == kHeldTaps) {
      depthwise_channels<kHeldTaps>(row, c, left);
    } else {
      depthwise_channels<0>(row, c, left);
    }
  }
}

// exp, off by two units in the last place at most, of what is at least -80: what is less counts as
// that. From where float32 ends on it is infinite.
inline __attribute__((always_inline)) Vector exponential(Vector x) {
  x.at_most(splat(89.0f));
  x.at_least(splat(-80.0f));
  // What is added and taken off again leaves the nearest whole number of powers of two.
  Vector shifted = splat(12582912.0f);
  shifted.multiply_add(x, splat(1.44269504f));
  Vector power = shifted;
  power.subtract(splat(12582912.0f));
  // log(2) in two parts, the first of which leaves room for any power.
  x.multiply_add(power, splat(-0.693359375f));
  x.multiply_add(power, splat(2.12194440e-4f));
  constexpr float kTerms[] = {1.3981999507e-3f,
                              8.3334519073e-3f,
                              4.1665795894e-2f,
                              1.6666665459e-1f,
                              5.0000001201e-1f,
                              1.0f,
                              1.0f};
  Vector result = splat(1.9875691500e-4f);
#pragma GCC unroll 7
  for (const float term : kTerms) {
    Vector next = splat(term);
    next.multiply_add(result, x);
    result = next;
  }
  // In two steps, as the largest results are of a power that no float32 is.
  shifted.subtract(splat(1.0f));
  result.multiply(shifted.power_of_two());
  result.add(result);
  return result;
}

template <Activation kActivation>
inline __attribute__((always_inline)) void activate_pointwise(Vector& value, Vector slope) {
  if constexpr (kActivation == kLeakyRelu) {
    Vector positive = value;
    positive.relu();
    value.at_most(Vector::zero());
    positive.multiply_add(value, slope);
    value = positive;
  } else if constexpr (kActivation == kSilu || kActivation == kSigmoid) {
    Vector negative = Vector::zero();
    negative.subtract(value);
    Vector divisor = exponential(negative);
    divisor.add(splat(1.0f));
    Vector result = kActivation == kSilu ? value : splat(1.0f);
    result.divide(divisor);
    value = result;
  } else if constexpr (kActivation == kHardswish) {
    Vector gate = value;
    gate.add(splat(3.0f));
    gate.relu();
    gate.at_most(splat(6.0f));
    gate.scale(1.0f / 6.0f);
    value.multiply(gate);
  } else {
    activate(value, kActivation);
  }
}

template <bool kScaled, Activation kActivation>
void pointwise(const PointwiseRow<Element>& row) {
  constexpr int64_t kLanes = Vector::kLanes;
  const Vector slope = splat(row.slope);
  const auto compute = [&](int64_t pixel, int64_t c, auto... lanes) __attribute__((always_inline)) {
    Vector value = load_elements(row.inputs[0] + pixel * row.input_steps[0] + c, lanes...);
    for (int64_t i = 1; i < row.count; ++i)
      value.add(load_elements(row.inputs[i] + pixel * row.input_steps[i] + c, lanes...));
    if constexpr (kScaled) {
      Vector scaled = Vector::load(row.shift + c);
      scaled.multiply_add(value, Vector::load(row.scale + c));
      value = scaled;
    }
    activate_pointwise<kActivation>(value, slope);
    store_elements(value, row.output + pixel * row.output_step + c, lanes...);
  };
  for (int64_t p = 0; p < row.pixels; ++p) {
    int64_t c = 0;
    for (; c + kLanes <= row.channels; c += kLanes) compute(p, c);
    if (c < row.channels) compute(p, c, row.channels - c);
  }
}

void bilinear(const BilinearRow<Element>& row) {
  constexpr int64_t kLanes = Vector::kLanes;
  Element* output = row.output;
  for (int64_t x = 0; x < row.pixels; ++x, output += row.output_step) {
    const int64_t left = row.offsets[2 * x], right = row.offsets[2 * x + 1];
    const float weight = row.weights[x];
    const Vector weights[4] = {splat((1.0f - row.weight) * (1.0f - weight)),
                               splat((1.0f - row.weight) * weight),
                               splat(row.weight * (1.0f - weight)), splat(row.weight * weight)};
    const Element* const corners[4] = {row.first + left, row.first + right, row.second + left,
                                       row.second + right};
    const auto compute = [&](int64_t c, auto... lanes) __attribute__((always_inline)) {
      Vector sum = load_elements(corners[0] + c, lanes...);
      sum.multiply(weights[0]);
#pragma GCC unroll 3
      for (int i = 1; i < 4; ++i)
        sum.multiply_add(load_elements(corners[i] + c, lanes...), weights[i]);
      store_elements(sum, output + c, lanes...);
    };
    int64_t c = 0;
    for (; c + kLanes <= row.channels; c += kLanes) compute(c);
    if (c < row.channels) compute(c, row.channels - c);
  }
}

// One direction of the input transform, in place: rows of B^T.
inline __attribute__((always_inline)) void winograd_input_line_2x2(Vector& a, Vector& b, Vector& c,
                                                                   Vector& d) {
  Vector first = a, second = b, third = c, fourth = b;
  first.subtract(c);
  second.add(c);
  third.subtract(b);
  fourth.subtract(d);
  a = first;
  b = second;
  c = third;
  d = fourth;
}

void winograd_input_2x2(const Element* const* pixels, int64_t channels, Element* output,
                        int64_t output_pitch) {
  constexpr int64_t kLanes = Vector::kLanes;
  for (int64_t c = 0; c < channels; c += kLanes) {
    const int64_t left = channels - c < kLanes ? channels - c : kLanes;
    const bool whole = left == kLanes;
    Vector d[4][4];
#pragma GCC unroll 4
    for (int y = 0; y < 4; ++y) {
#pragma GCC unroll 4
      for (int x = 0; x < 4; ++x)
        d[y][x] = whole ? load_elements(pixels[4 * y + x] + c)
                        : load_elements(pixels[4 * y + x] + c, left);
    }
#pragma GCC unroll 4
    for (int x = 0; x < 4; ++x) winograd_input_line_2x2(d[0][x], d[1][x], d[2][x], d[3][x]);
#pragma GCC unroll 4
    for (int y = 0; y < 4; ++y) {
      winograd_input_line_2x2(d[y][0], d[y][1], d[y][2], d[y][3]);
#pragma GCC unroll 4
      for (int x = 0; x < 4; ++x) {
        Element* to = output + (4 * y + x) * output_pitch + c;
        if (whole) {
          store_elements(d[y][x], to);
        } else {
          store_elements(d[y][x], to, left);
        }
      }
    }
  }
}

void winograd_output_2x2(const float* products, int64_t product_pitch, const float* bias,
                         int64_t channels, Activation activation, Element* const* outputs) {
  constexpr int64_t kLanes = Vector::kLanes;
  for (int64_t c = 0; c < channels; c += kLanes) {
    const int64_t left = channels - c < kLanes ? channels - c : kLanes;
    // Products and bias are padded to whole vectors.
    Vector rows[2][4];
#pragma GCC unroll 4
    for (int x = 0; x < 4; ++x) {
      const float* column = products + x * product_pitch + c;
      Vector m[4];
#pragma GCC unroll 4
      for (int y = 0; y < 4; ++y) m[y] = Vector::load(column + 4 * y * product_pitch);
      rows[0][x] = m[0];
      rows[0][x].add(m[1]);
      rows[0][x].add(m[2]);
      rows[1][x] = m[1];
      rows[1][x].subtract(m[2]);
      rows[1][x].subtract(m[3]);
    }
    const Vector offset = Vector::load(bias + c);
#pragma GCC unroll 2
    for (int y = 0; y < 2; ++y) {
      Vector result[2] = {rows[y][0], rows[y][1]};
      result[0].add(rows[y][1]);
      result[0].add(rows[y][2]);
      result[1].subtract(rows[y][2]);
      result[1].subtract(rows[y][3]);
#pragma GCC unroll 2
      for (int x = 0; x < 2; ++x) {
        if (outputs[2 * y + x] == nullptr) continue;
        result[x].add(offset);
        activate(result[x], activation);
        if (left == kLanes) {
          store_elements(result[x], outputs[2 * y + x] + c);
        } else {
          store_elements(result[x], outputs[2 * y + x] + c, left);
        }
      }
    }
  }
}

// F(4x4, 3x3) interpolates at 0, a and -a, b and -b, and infinity. With a^2 = 1/2 and b^2 = 2 the
// rounding error is less than half of that at 1 and 2.
constexpr float kA = 0.70710678118654752f;
constexpr float kB = 1.41421356237309505f;

// value = value + factor * other.
inline __attribute__((always_inline)) void add_scaled(Vector& value, Vector factor, Vector other) {
  value.multiply_add(factor, other);
}

// One direction of the input transform: rows of B^T.
inline __attribute__((always_inline)) void winograd_input_line_4x4(const Vector (&d)[6],
                                                                   Vector (&result)[6]) {
  const Vector minus_half = splat(-0.5f), minus_two = splat(-2.0f);
  const Vector minus_sum = splat(-2.5f);
  // (x^2 - b^2) and its product with x, at x^2 = a^2; then the same with a and b exchanged.
  Vector even_a = d[4], odd_a = d[3], even_b = d[4], odd_b = d[3];
  add_scaled(even_a, minus_two, d[2]);
  add_scaled(odd_a, minus_two, d[1]);
  add_scaled(even_b, minus_half, d[2]);
  add_scaled(odd_b, minus_half, d[1]);
  result[0] = d[0];
  result[0].add(d[4]);
  add_scaled(result[0], minus_sum, d[2]);
  result[1] = result[2] = even_a;
  add_scaled(result[1], splat(kA), odd_a);
  add_scaled(result[2], splat(-kA), odd_a);
  result[3] = result[4] = even_b;
  add_scaled(result[3], splat(kB), odd_b);
  add_scaled(result[4], splat(-kB), odd_b);
  result[5] = d[1];
  result[5].add(d[5]);
  add_scaled(result[5], minus_sum, d[3]);
}

void winograd_input_4x4(const Element* const* pixels, int64_t channels, Element* output,
                        int64_t output_pitch) {
  constexpr int64_t kLanes = Vector::kLanes;
  for (int64_t c = 0; c < channels; c += kLanes) {
    const int64_t left = channels - c < kLanes ? channels - c : kLanes;
    const bool whole = left == kLanes;
    float columns[6][6][kLanes];
#pragma GCC unroll 6
    for (int x = 0; x < 6; ++x) {
      Vector d[6], result[6];
#pragma GCC unroll 6
      for (int y = 0; y < 6; ++y)
        d[y] = whole ? load_elements(pixels[6 * y + x] + c)
                     : load_elements(pixels[6 * y + x] + c, left);
      winograd_input_line_4x4(d, result);
#pragma GCC unroll 6
      for (int y = 0; y < 6; ++y) result[y].store(columns[y][x]);
    }
#pragma GCC unroll 6
    for (int y = 0; y < 6; ++y) {
      Vector d[6], result[6];
#pragma GCC unroll 6
      for (int x = 0; x < 6; ++x) d[x] = Vector::load(columns[y][x]);
      winograd_input_line_4x4(d, result);
#pragma GCC unroll 6
      for (int x = 0; x < 6; ++x) {
        Element* to = output + (6 * y + x) * output_pitch + c;
        if (whole) {
          store_elements(result[x], to);
        } else {
          store_elements(result[x], to, left);
        }
      }
    }
  }
}

// One direction of the output transform: rows of A^T.
inline __attribute__((always_inline)) void winograd_output_line_4x4(const Vector (&m)[6],
                                                                    Vector (&result)[4]) {
  Vector sum_a = m[1], difference_a = m[1], sum_b = m[3], difference_b = m[3];
  sum_a.add(m[2]);
  difference_a.subtract(m[2]);
  sum_b.add(m[4]);
  difference_b.subtract(m[4]);
  result[0] = m[0];
  result[0].add(sum_a);
  result[0].add(sum_b);
  result[1] = difference_a;
  result[1].scale(kA);
  add_scaled(result[1], splat(kB), difference_b);
  result[2] = sum_a;
  result[2].scale(0.5f);
  add_scaled(result[2], splat(2.0f), sum_b);
  result[3] = m[5];
  add_scaled(result[3], splat(kA / 2), difference_a);
  add_scaled(result[3], splat(2 * kB), difference_b);
}

void winograd_output_4x4(const float* products, int64_t product_pitch, const float* bias,
                         int64_t channels, Activation activation, Element* const* outputs) {
  constexpr int64_t kLanes = Vector::kLanes;
  for (int64_t c = 0; c < channels; c += kLanes) {
    const int64_t left = channels - c < kLanes ? channels - c : kLanes;
    // Products and bias are padded to whole vectors.
    float rows[4][6][kLanes];
#pragma GCC unroll 6
    for (int x = 0; x < 6; ++x) {
      Vector m[6], result[4];
#pragma GCC unroll 6
      for (int y = 0; y < 6; ++y) m[y] = Vector::load(products + (6 * y + x) * product_pitch + c);
      winograd_output_line_4x4(m, result);
#pragma GCC unroll 4
      for (int y = 0; y < 4; ++y) result[y].store(rows[y][x]);
    }
    const Vector offset = Vector::load(bias + c);
#pragma GCC unroll 4
    for (int y = 0; y < 4; ++y) {
      Vector m[6], result[4];
#pragma GCC unroll 6
      for (int x = 0; x < 6; ++x) m[x] = Vector::load(rows[y][x]);
      winograd_output_line_4x4(m, result);
#pragma GCC unroll 4
      for (int x = 0; x < 4; ++x) {
        if (outputs[4 * y + x] == nullptr) continue;
        result[x].add(offset);
        activate(result[x], activation);
        if (left == kLanes) {
          store_elements(result[x], outputs[4 * y + x] + c);
        } else {
          store_elements(result[x], outputs[4 * y + x] + c, left);
        }
      }
    }
  }
}

// By activation.
#define THRESHNET_FAST_POINTWISE(SCALED)                                                   \
  {pointwise<SCALED, kIdentity>,  pointwise<SCALED, kRelu>, pointwise<SCALED, kRelu6>,     \
   pointwise<SCALED, kLeakyRelu>, pointwise<SCALED, kSilu>, pointwise<SCALED, kHardswish>, \
   pointwise<SCALED, kSigmoid>}

constexpr UkernelTable<Element> table_of(
    const Tiling& tiling, const ConvTileFunction<Element> (*conv_tile)[kMaxTilePixels + 1]) {
  return {tiling,
          conv_tile,
          {affine<kIdentity>, affine<kRelu>, affine<kRelu6>},
          max_pool,
          average_pool,
          {affine_average_pool<kIdentity>, affine_average_pool<kRelu>, affine_average_pool<kRelu6>},
          depthwise,
          {THRESHNET_FAST_POINTWISE(false), THRESHNET_FAST_POINTWISE(true)},
          bilinear,
          {winograd_input_2x2, winograd_output_2x2},
          {winograd_input_4x4, winograd_output_4x4}};
}

// [vectors][pixels]; a tile wider than the registers allow is left out.
#define THRESHNET_FAST_ROW_4(V) \
  nullptr, conv_tile<1, V>, conv_tile<2, V>, conv_tile<3, V>, conv_tile<4, V>
#define THRESHNET_FAST_ROW_6(V) THRESHNET_FAST_ROW_4(V), conv_tile<5, V>, conv_tile<6, V>
#define THRESHNET_FAST_ROW_9(V) \
  THRESHNET_FAST_ROW_6(V), conv_tile<7, V>, conv_tile<8, V>, conv_tile<9, V>
#define THRESHNET_FAST_ROW_14(V)                                                                   \
  THRESHNET_FAST_ROW_9(V), conv_tile<10, V>, conv_tile<11, V>, conv_tile<12, V>, conv_tile<13, V>, \
      conv_tile<14, V>

}  // namespace
}  // namespace threshnet_fast::cpu
