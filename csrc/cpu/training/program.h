// A program of training: a raw plan compiled for one shape, one instruction set and one number of
// threads. It is one flat block of plain data with offsets instead of pointers, under a seal, so
// that it can live in a tensor and be run by any number of threads at once. Free of torch.
//
// Memory of a pass. What the pass backward needs of the one forward is kept in one piece:
// statistics, prologues and the maps between input and output. What only the pass backward needs,
// scratch memory, is the continuation of that piece, planned by lifetimes: gradients lie where maps
// are no longer needed, which is at negative offsets. Of a pass that may be run back again it is a
// piece of its own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "raw_plan.h"
#include "steps.h"

namespace threshnet_fast::cpu {

constexpr int64_t kTrainingMagic = 0x4e5254464e54;  // "TNFTRN"
constexpr int64_t kTrainingVersion = 1;

// What a program is compiled for.
struct TrainingTarget {
  int64_t batch, height, width;
  int64_t winograd;  // see ConvolutionForward
  int64_t threads, isa;
  bool backward;        // whether there is a pass backward
  bool checkpoint;      // whether that calculates temporary maps again
  bool repeatable;      // whether it leaves all as it is, so that it can be run again
  bool input_gradient;  // whether the gradient of the input is wanted
};

enum class Memory : int64_t { kNone, kInput, kOutput, kKept, kScratch, kInputGradient, kGradient };

// Floats from the beginning of the memory; of scratch memory perhaps before it.
struct Place {
  Memory memory;
  int64_t offset;
};

// Offsets in floats, of kept memory where not said otherwise.
struct TrainingBuffer {
  int64_t channels, pixels;
  Place map;       // on the way forward
  Place map_back;  // on the way back
  Place gradient;
  int64_t statistics;  // [2][channels]
  int64_t correction;  // [2][channels], of the pass backward's work
};

struct TrainingNorm {
  int64_t buffer, channel, channels;
  int64_t fixed;  // [2][channels], running statistics where those are taken
  int64_t sums;   // [2][channels], of the pass backward's work
};

struct TrainingRead {
  int64_t buffer, channel, channels, norm;
  int64_t start;                // among the channels that the node reads
  int64_t prologue;             // of the first read through the same norm, -1: this is it
  int64_t pitch;                // between that prologue's rows
  int64_t accumulate;           // whether the gradient is added to what is there
  int64_t first_sum, last_sum;  // whether it is the first or last on the way back of its norm
};

struct TrainingNode {
  RawKind kind;
  int64_t activation;
  int64_t buffer, channel, channels;
  Window window;
  int64_t input_channels;
  int64_t weight;              // index among the parameters, -1: none
  int64_t prologue;            // [3][input_channels]: scale, shift, mean
  int64_t wants_inputs;        // whether it leads the gradient back
  int64_t reads, read_count;   // offset in bytes into the program, and how many
  int64_t zeros, zero_count;   // segments of gradients that are cleared before it goes back
  int64_t rerun, rerun_count;  // nodes that run again before it goes back
};

struct TrainingHeader {
  int64_t magic, version, bytes;
  uint64_t seal;  // of all behind it
  int64_t isa, threads, winograd;
  int64_t batch, height, width, input_channels;
  int64_t output, output_height, output_width;
  int64_t backward, repeatable, input_gradient;
  int64_t weight_count, parameter_count;
  int64_t kept_floats, scratch_floats, workspace_floats;
  int64_t work;               // in scratch memory, what the pass backward works with all the time
  int64_t correction_floats;  // at the beginning of that
  int64_t sums;               // of a node, there
  int64_t buffers, buffer_count, norms, norm_count, nodes, node_count;
};

// A checked view of a program's bytes.
class TrainingProgram {
 public:
  // Throws std::invalid_argument where this process compiled no such program, or a byte of it was
  // changed since.
  TrainingProgram(const void* bytes, int64_t size);

  const TrainingHeader& header() const { return *at<TrainingHeader>(0); }
  const TrainingBuffer& buffer(int64_t i) const { return at<TrainingBuffer>(header().buffers)[i]; }
  const TrainingNorm& norm(int64_t i) const { return at<TrainingNorm>(header().norms)[i]; }
  const TrainingNode& node(int64_t i) const { return at<TrainingNode>(header().nodes)[i]; }
  template <typename T>
  const T* at(int64_t offset) const {
    return reinterpret_cast<const T*>(bytes_ + offset);
  }

 private:
  const std::byte* bytes_;
};

// Compiles a description (see threshnet_fast/plan/serialize_raw.py for its layout) after checking
// it. Throws std::invalid_argument where anything is inconsistent.
std::vector<std::byte> compile_training(const int64_t* description, int64_t length,
                                        const TrainingTarget& target);

// Floats of workspace that a node needs, forward and back.
int64_t convolution_workspace(const Window& window, int64_t input_channels, int64_t output_channels,
                              bool input_gradients, int64_t winograd, const Workers& workers);
int64_t depthwise_workspace(const Window& window, int64_t channels, const Workers& workers);
int64_t pool_workspace(const Window& window, int64_t channels, const Workers& workers);

// A weight [Co, Ci, kh, kw] and where its gradient goes, null where it is not wanted.
struct TrainingWeight {
  const float* data;
  WeightStrides strides;
  float* gradient;
  WeightStrides gradient_strides;
};

// A vector that a norm's running statistics lie in, in any strides.
struct RunningVector {
  float* data;
  int64_t stride;
};

struct TrainingNormParameters {
  const float* gamma;  // null: 1
  const float* beta;   // null: 0
  float* gamma_gradient;
  float* beta_gradient;
  bool from_batch;  // whether it takes the batch's statistics
  double eps;
  // Forward only: running statistics, null where there are none, and by how much they follow the
  // batch's; NaN: not at all.
  RunningVector running_mean, running_variance;
  double momentum;
};

// The tensors of a pass; of one forward, without what is there for the way back.
struct TrainingPass {
  std::vector<TrainingWeight> weights;
  std::vector<TrainingNormParameters> norms;
  const float* input;     // [pixels, channels], as all maps
  float* output;          // read on the way back
  float* gradient;        // of the output; added to where nodes read the output
  float* input_gradient;  // null where it is not wanted
  float* kept;
  float* scratch;    // behind what is kept, or, of a repeatable pass, elsewhere
  float* workspace;  // aligned to 64 bytes
};

// The statistics of the input, where a norm takes them from the batch, are in kept memory.
void run_forward(const TrainingProgram& program, const TrainingPass& pass,
                 ParallelFor parallel_for);
void run_backward(const TrainingProgram& program, const TrainingPass& pass,
                  ParallelFor parallel_for);

}  // namespace threshnet_fast::cpu
