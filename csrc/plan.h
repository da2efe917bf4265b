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
constexpr int64_t kDescriptionVersion = 3;

// Where a buffer lives: at a non-negative offset (in elements) of the arena, or outside of it.
constexpr int64_t kNetworkInput = -1;   // any strides; only convolutions without prologue read it
constexpr int64_t kNetworkOutput = -2;  // dense NHWC
// NHWC with the buffer's pitch; -3 - i is external map i. The first are inputs, which no step
// writes; those behind are outputs, which steps may write and read.
constexpr int64_t kFirstExternal = -3;

// The most channels of a segment or of all that a step reads.
constexpr int64_t kMostChannels = int64_t{1} << 24;
// The most elements of anything that is read or written: more than any memory holds, and few enough
// that what is calculated from it in bytes, threads or products of a few taps fits in 64 bits.
constexpr int64_t kMostElements = int64_t{1} << 48;
constexpr int64_t kMostThreads = int64_t{1} << 12;

// NHWC, pitch elements between neighbouring pixels.
struct Buffer {
  int64_t height, width, channels, pitch, offset;
};

// Some channels of a buffer.
struct BufferSegment {
  int64_t buffer, channel, channels;
};

// Of a convolution or a pool. How many rows and columns of padding there are below and to the right
// follows from the size of the output.
struct PlanWindow {
  int64_t kernel_height, kernel_width;
  int64_t stride_height, stride_width;
  int64_t padding_top, padding_left;
  int64_t dilation_height, dilation_width;

  int64_t taps() const { return kernel_height * kernel_width; }
  // From a window's first row or column to behind its last.
  int64_t height() const { return (kernel_height - 1) * dilation_height + 1; }
  int64_t width() const { return (kernel_width - 1) * dilation_width + 1; }
};

// The pixels of a map that a convolution writes: those so far apart, from the first on. All, but
// of a transposed convolution.
struct OutputLattice {
  int64_t stride_height, stride_width;
  int64_t first_row, first_column;

  bool is_whole() const { return stride_height == 1 && stride_width == 1; }
  int64_t height(const Buffer& to) const { return (to.height - 1 - first_row) / stride_height + 1; }
  int64_t width(const Buffer& to) const { return (to.width - 1 - first_column) / stride_width + 1; }
};

// Pixels of the input to one of the output, down and to the right.
struct Resizing {
  ResizeMode mode;
  bool align_corners;
  float scale_height, scale_width;
};

// What an average divides by, where that is not a number.
constexpr int64_t kPixelsOfMap = -1;    // the window's pixels on the map
constexpr int64_t kPixelsOfPadded = 0;  // and on a padding that is the same on all sides

struct PlanStep {
  PlanStepKind kind;
  std::vector<BufferSegment> inputs;  // several only for convolutions and pointwise steps
  BufferSegment output;
  int64_t input_channels;
  PlanWindow window;      // 1x1 of pointwise steps and of those that resize
  OutputLattice lattice;  // all pixels but of convolutions
  Activation activation;  // of convolutions and pointwise steps
  Activation prologue_activation;
  bool average;       // pool only
  int64_t divisor;    // average pool only: that, or kPixelsOfMap or kPixelsOfPadded
  float slope;        // pointwise only
  Resizing resizing;  // resize only
  int64_t weight_index, bias_index, scale_index, shift_index;  // into the list of weights, -1: none
  bool reads_network_input;
};

struct Plan {
  int64_t batch, input_channels, input_height, input_width;
  int64_t output_channels, output_height, output_width;
  int64_t input_count, external_count;  // of external maps, those that are inputs and all
  int64_t weight_count, arena_size;
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
// segment within its buffer, every buffer within the arena, every external map that of one buffer,
// and every output as large as its window makes it. Throws std::invalid_argument where that is not
// so.
Plan read_plan(const int64_t* description, int64_t length);

}  // namespace threshnet_fast
