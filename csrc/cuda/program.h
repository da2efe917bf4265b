// A program: a plan compiled for one dtype and one kind of device. It is one flat block of plain
// data with offsets instead of pointers, so that it can live in a tensor, be copied, and be run on
// any stream. All that it needs of memory is the caller's: packed weights and a workspace, both on
// the device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "export.h"
#include "operands.h"
#include "plan.h"

namespace threshnet_fast::cuda {

enum class StepKind : int64_t {
  kConvolution = 0,
  kStem = 1,  // the convolution that reads the network's input
  kPool = 2,
  kHead = 3,  // an average pool and the classifier behind it, two steps of the plan
};

struct Step {
  StepKind kind;
  int64_t first_segment, segment_count;  // of Program::segment
  BufferSegment output;
  Window window;
  int32_t relu, average;
  int32_t stored_channels;  // of the output: its own, and zeros up to whole groups
  int32_t weight_columns;
  Configuration configuration;                                 // convolution only
  int64_t weight_index, bias_index, scale_index, shift_index;  // into the list of weights, -1: none
  int64_t weight, bias, scale, shift;                          // bytes into the packed weights
};

struct ProgramHeader {
  int64_t magic, version, bytes;
  uint64_t seal;  // of all behind it
  int64_t dtype;
  int64_t batch, input_channels, input_height, input_width;
  int64_t output_channels, output_height, output_width;
  int64_t weight_count;
  int64_t arena_bytes, partial_bytes, packed_bytes;
  int64_t buffers, buffer_count, segments, segment_count, steps, step_count;
};

// A checked view of a program's bytes.
class THRESHNET_FAST_EXPORT Program {
 public:
  // Throws std::invalid_argument where this process compiled no such program, or a byte of it was
  // changed since.
  Program(const void* bytes, int64_t size);

  const ProgramHeader& header() const { return *at<ProgramHeader>(0); }
  DType dtype() const { return static_cast<DType>(header().dtype); }
  const Buffer& buffer(int64_t i) const { return at<Buffer>(header().buffers)[i]; }
  const BufferSegment& segment(int64_t i) const { return at<BufferSegment>(header().segments)[i]; }
  const Step& step(int64_t i) const { return at<Step>(header().steps)[i]; }
  int64_t workspace_bytes() const { return header().arena_bytes + header().partial_bytes; }

 private:
  template <typename T>
  const T* at(int64_t offset) const {
    return reinterpret_cast<const T*>(bytes_ + offset);
  }

  const std::byte* bytes_;
};

// Compiles a plan's description. Throws std::invalid_argument where it is inconsistent, or is a
// plan that these kernels cannot run. Packed weights depend on the network and the dtype alone, not
// on the input's shape or the device.
THRESHNET_FAST_EXPORT std::vector<std::byte> compile(const int64_t* description, int64_t length,
                                                     DType dtype, const Device& device);

// Of a step: what computes it, and the tile of its convolution.
struct Algorithm {
  StepKind kind;
  int64_t pixels, columns, depth, parts;
};

// One for each step of the plan; a head has two.
THRESHNET_FAST_EXPORT std::vector<Algorithm> algorithms_of(const Program& program);

// One of a network's weights, on the device.
struct Weight {
  const void* data;
  int64_t count;
  DType dtype;  // float32, or that of the program
};

// Packs a plan's weights into `packed`, header().packed_bytes bytes aligned to 16.
THRESHNET_FAST_EXPORT void pack(const Program& program, const std::vector<Weight>& weights,
                                void* packed, Stream stream);

struct StridedInput {
  const void* data = nullptr;
  int64_t batch_stride = 0, channel_stride = 0, height_stride = 0, width_stride = 0;
};

// Launches all kernels of a network. `workspace` has workspace_bytes() bytes, aligned to 16,
// `output` is dense NHWC. Calls that share a workspace must be on one stream.
THRESHNET_FAST_EXPORT void run(const Program& program, const void* packed, void* workspace,
                               const StridedInput& input, void* output, Stream stream);

}  // namespace threshnet_fast::cuda
