// A plan of training as threshnet_fast/plan/serialize_raw.py writes it, read and checked.
#pragma once

#include <cstdint>
#include <vector>

#include "plan.h"

namespace threshnet_fast::cpu {

constexpr int64_t kRawMagic = 0x574152464e54;  // "TNFRAW"
constexpr int64_t kRawVersion = 1;

// Largest side of a window.
constexpr int64_t kMostSide = 8;

enum class RawKind : int64_t { kConvolution = 0, kDepthwise = 1, kMaxPool = 2, kAveragePool = 3 };

// Channels of a buffer, and the norm of just these, or -1.
struct RawRead {
  int64_t buffer, channel, channels, norm;
};

struct RawNode {
  RawKind kind;
  int64_t activation;
  int64_t buffer, channel, channels;
  int64_t kernel, stride, padding;
  int64_t input_channels;
  std::vector<RawRead> reads;  // several only for a convolution
};

struct RawBuffer {
  int64_t channels;
  bool temporary;  // written by one node, which reads none that is temporary
  std::vector<int64_t> writers, readers;
};

// Of channels of a buffer.
struct RawNorm {
  int64_t buffer, channel, channels;
};

// The first buffer is the input, which no node writes.
struct RawPlan {
  int64_t output;
  std::vector<RawBuffer> buffers;
  std::vector<RawNorm> norms;
  std::vector<RawNode> nodes;
};

// Reads a description of `length` entries. Every index in the result is within bounds, every read
// within its buffer and of channels that nodes before have written, every channel is written once
// at most, every norm is read, and the output is written as a whole. Throws std::invalid_argument
// where that is not so.
RawPlan read_raw_plan(const int64_t* description, int64_t length);

}  // namespace threshnet_fast::cpu
