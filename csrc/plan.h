// A plan as threshnet_fast/plan/serialize.py writes it, read and checked: what the compilers of all
// engines begin with.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

#include "codes.h"
#include "kernel_limits.h"

namespace threshnet_fast {

constexpr int64_t kDescriptionMagic = 0x4e4c5046544e54;  // "TNTFPLN"
constexpr int64_t kDescriptionVersion = 1;

// Where a buffer lives: at a non-negative offset (in elements) of the arena, or outside of it.
constexpr int64_t kNetworkInput = -1;   // any strides; only the first convolution may read it
constexpr int64_t kNetworkOutput = -2;  // dense NHWC
constexpr int64_t kFirstExternal = -3;  // NHWC with the buffer's pitch; -3 - i is external input i

// The most channels of a segment or of all that a step reads.
constexpr int64_t kMostChannels = int64_t{1} << 24;
// The most elements of anything that is read or written: more than any memory holds, and few enough
// that what is calculated from it in bytes, threads or products of a few taps fits in 64 bits.
constexpr int64_t kMostElements = int64_t{1} << 48;
constexpr int64_t kMostThreads = int64_t{1} << 12;

// NHWC, pitch elements between neighbouring pixels.
struct Buffer {
  int64_t height, width, pitch, offset;
};

// Some channels of a buffer.
struct BufferSegment {
  int64_t buffer, channel, channels;
};

struct PlanStep {
  PlanStepKind kind;
  std::vector<BufferSegment> inputs;  // several only for a convolution
  BufferSegment output;
  int64_t input_channels;
  int64_t kernel_height, kernel_width, stride, padding;
  Activation activation;                                       // of convolutions only
  bool average;                                                // pool only
  int64_t weight_index, bias_index, scale_index, shift_index;  // into the list of weights, -1: none
  bool reads_network_input;
};

struct Plan {
  int64_t batch, input_channels, input_height, input_width;
  int64_t output_channels, output_height, output_width;
  int64_t external_count, weight_count, arena_size;
  std::vector<Buffer> buffers;
  std::vector<PlanStep> steps;

  const Buffer& buffer_of(const BufferSegment& segment) const { return buffers[segment.buffer]; }
};

// Throws std::invalid_argument, saying what is wrong with a plan.
[[noreturn]] void fail_plan(const std::string& what);
void require_plan(bool condition, const char* what);

// The product of sizes from a description. Throws std::invalid_argument, saying that it is `what`
// that has too many elements, where it is negative or more than kMostElements.
int64_t product_of_sizes(std::initializer_list<int64_t> sizes, const std::string& what);
// Throws where a sum of such products is more than that.
void require_size(int64_t elements, const std::string& what);

// Reads a description of `length` entries. Every index in the result is within bounds, every
// segment within its buffer, every buffer within the arena, and every output as large as its window
// makes it. Throws std::invalid_argument where that is not so.
Plan read_plan(const int64_t* description, int64_t length);

}  // namespace threshnet_fast
