// A program: a plan compiled for one instruction set, one batch and one number of threads. It is
// one flat block of plain data with offsets instead of pointers, so that it can live in a tensor,
// be copied, and be run by any number of threads at once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/parallel_for.h"
#include "cpu/tiles.h"
#include "cpu/ukernels/kinds.h"
#include "cpu/winograd.h"
#include "plan.h"

namespace threshnet_fast::cpu {

constexpr int64_t kProgramMagic = 0x4752504654544e;  // "NTTFPRG"
constexpr int64_t kVersion = 5;

enum StepKind : int64_t {
  kConvolution = 0,
  kPool = 1,
  kReduction = 2,
  kTransform = 3,
  kDepthwise = 4,
  kPointwise = 5,
  kResize = 6
};

// Whether a task of a Winograd convolution transforms its own inputs, or a step before did so for
// all.
enum WinogradMode : int64_t { kNoWinograd = 0, kWinogradInTask = 1, kWinogradInSteps = 2 };

// Whether a task copies its inputs first: the windows of its pixels, where there is a prologue or
// channels do not fill whole words; or the rows that it reads of the network's input. In this mode
// the rows of the output take the place of pixels.
enum PackMode : int64_t { kInPlace = 0, kWindows = 1, kImageRows = 2 };

// A panel: the output channels that one micro-kernel call computes, packed as words
// [tap][input word][pitch], and NR biases. The pitch leaves out most of what a last, partly used
// vector has no weights for: the kernel loads the next word's there and stores none of it. Offsets
// are in floats.
struct Panel {
  int64_t vectors, channel, channels, weights, bias, pitch;
};

struct Chunk {
  uint64_t taps;
  int64_t first_channel, last_channel;
};

struct Step {
  int64_t kind;
  int64_t segments, segment_count;  // byte offset into the program, and how many
  int64_t output_buffer, output_channel, output_channels;
  int64_t input_channels;
  int64_t padded_channels;  // input channels rounded up to whole words
  PlanWindow window;
  OutputLattice lattice;
  Activation activation;  // of convolutions and pointwise steps
  Activation prologue_activation;
  int64_t average;    // pool only
  int64_t divisor;    // average pool only: that, or kPixelsOfMap or kPixelsOfPadded
  float slope;        // pointwise only
  Resizing resizing;  // resize only
  int64_t weight_index, bias_index, scale_index, shift_index;  // into the list of weights, -1: none
  int64_t scale, shift;         // float offsets into the packed weights
  int64_t panels, panel_count;  // a depthwise convolution has one, [tap][pitch] floats
  int64_t winograd;             // WinogradMode of F(m x m, 3x3)
  int64_t winograd_size;        // m: tiles of m x m outputs take the place of pixels
  PackMode packs;
  // Output pixels in the order in which they are computed: byte offsets of int32 input pixel (the
  // top left tap's, possibly outside of the map), int32 output pixel and uint64 mask of valid taps.
  int64_t pixel_count, input_pixels, output_pixels, pixel_taps;
  // A task is one block of pixels times one group of panels times one split of chunks.
  int64_t block_count;
  int64_t group_panels, group_count;
  // The input channels and taps in parts whose weights and inputs stay in L2 while a block's tiles
  // pass by. Where there are too few tiles and panels for all threads, the chunks are split between
  // tasks too: each adds up its own partial sums, and a reduction, the next step, adds those.
  int64_t chunks, chunk_count, split_count;
};

// Whether a step is one of the plan's, rather than what the compiler added for one.
inline bool is_planned(const Step& step) {
  return step.kind != kTransform && step.kind != kReduction;
}

// What the compiler reserves and the engine then uses lies as these say.

// Weights of an output channel for each input channel.
inline int64_t positions_of(const Step& step) {
  return step.winograd ? winograd_positions(step.winograd_size) : step.window.taps();
}

// Elements between the gathered windows of neighbouring pixels.
inline int64_t gathered_pitch(const Step& step) {
  return round_up(step.window.taps() * step.padded_channels, 32) + 16;
}

// Elements of a row of the network's input that has been copied with its padding: as many columns
// as windows reach.
inline int64_t image_row_elements(const Step& step, const Buffer& to) {
  return ((to.width - 1) * step.window.stride_width + step.window.width()) * step.padded_channels;
}

// Rows of the input that some rows of the output reach.
inline int64_t image_rows(const Step& step, int64_t rows) {
  return (rows - 1) * step.window.stride_height + step.window.height();
}

// How many pixels of a map a tap lies behind a window's first one.
inline int64_t tap_shift(const PlanWindow& window, int64_t tap, int64_t map_width) {
  return tap / window.kernel_width * window.dilation_height * map_width +
         tap % window.kernel_width * window.dilation_width;
}

// Floats that the runs of a tile take at the beginning of the scratch memory.
inline int64_t run_floats(const Step& step) {
  const int64_t runs = step.window.taps() * step.segment_count;
  return round_up(runs * static_cast<int64_t>(sizeof(ChannelRun<float>) / sizeof(float)), 16);
}

// Elements of the pixel of zeros that stands for padding.
inline int64_t zero_elements(const Step& step) { return round_up(step.padded_channels, 32); }

// Floats between neighbouring positions of Winograd's transformed tiles or of their products: an
// odd number of cache lines, so that all positions of a tile lie in different sets of L1.
inline int64_t position_floats(int64_t floats) { return (divide_up(floats, 16) | 1) * 16; }

// Floats that take the place of some elements.
template <typename Element>
int64_t floats_of(int64_t elements) {
  return divide_up(elements, kWordChannels<Element>);
}

struct ProgramHeader {
  int64_t magic, version, bytes;
  uint64_t seal;  // of all behind it
  int64_t isa;
  int64_t batch, input_channels, input_height, input_width;
  int64_t output_channels, output_height, output_width;
  int64_t input_count, external_count;  // of external maps, those that are inputs and all
  int64_t externals;                    // byte offset of the index of each one's buffer
  int64_t reads_network_input;          // whether a step does
  int64_t writes_network_output;
  int64_t weight_count;
  int64_t
      layout;  // which steps' weights are packed for Winograd; programs of equal layout share them
  int64_t arena_floats, partial_floats, scratch_floats, packed_floats;
  int64_t buffers, buffer_count, steps, step_count;
};

// A checked view of a program's bytes.
class Program {
 public:
  // Throws std::invalid_argument where this process compiled no such program, or a byte of it was
  // changed since.
  Program(const void* bytes, int64_t size);

  const ProgramHeader& header() const { return *at<ProgramHeader>(0); }
  const Buffer& buffer(int64_t i) const { return at<Buffer>(header().buffers)[i]; }
  const Buffer& external(int64_t i) const { return buffer(at<int64_t>(header().externals)[i]); }
  const Step& step(int64_t i) const { return at<Step>(header().steps)[i]; }
  template <typename T>
  const T* at(int64_t offset) const {
    return reinterpret_cast<const T*>(bytes_ + offset);
  }
  int64_t workspace_floats(int64_t threads) const;

 private:
  const std::byte* bytes_;
};

// Compiles a plan's description (see threshnet_fast/plan/serialize.py for its layout) after
// checking it. `winograd` says which 3x3 convolutions use tiles of F(m x m, 3x3): -1 those that it
// makes faster, 0 none, 2 or 4 all that can, with that m. Throws std::invalid_argument where
// anything is inconsistent.
std::vector<std::byte> compile(const int64_t* description, int64_t length, int64_t isa,
                               int64_t threads, int64_t winograd);

// How a step of the description is computed.
Algorithm algorithm_of(const Step& step);

struct Weight {
  const float* data;
  int64_t count;
};

// Packs a plan's weights into `packed` (header().packed_floats floats), rounded to the program's
// elements.
void pack(const Program& program, const std::vector<Weight>& weights, float* packed,
          int64_t threads, ParallelFor parallel_for);

// Strides in elements.
struct StridedInput {
  const void* data = nullptr;
  int64_t batch_stride = 0, channel_stride = 0, height_stride = 0, width_stride = 0;
};

struct Binding {
  StridedInput input;
  std::vector<void*> externals;  // of which inputs are read only
  void* output = nullptr;
};

// Told by a thread that a task of a step is over, before any thread can begin the next step.
struct TaskObserver {
  void (*finished)(void* context, int64_t step, int64_t thread);
  void* context;
};

// Runs a program on input, external maps and output of its elements. `workspace` holds
// workspace_floats(threads) floats, 64-byte aligned.
void run(const Program& program, const float* packed, float* workspace, const Binding& binding,
         int64_t threads, ParallelFor parallel_for, const TaskObserver* observer = nullptr);

}  // namespace threshnet_fast::cpu
