#include <cstring>
#include <fstream>
#include <limits>
#include <memory>
#include <new>

#include "device.h"
#include "launch.cuh"
#include "program.h"
#include "threshnet_fast.h"

namespace threshnet_fast::cuda {
namespace {

constexpr char kFileMagic[8] = {'T', 'N', 'F', 'P', 'L', 'A', 'N', '1'};

struct Free {
  void operator()(void* pointer) const { static_cast<void>(cudaFree(pointer)); }
};

using DeviceMemory = std::unique_ptr<void, Free>;

DeviceMemory allocate(int64_t bytes) {
  void* pointer = nullptr;
  check(cudaMalloc(&pointer, static_cast<size_t>(bytes > 0 ? bytes : 1)),
        "the device's memory cannot be allocated");
  return DeviceMemory(pointer);
}

// A file as threshnet_fast/plan/file.py writes it: its magic number, the number of entries of the
// description and of weights, the description, the weights' elements, then those elements in
// float32; all numbers int64, all little-endian.
struct PlanFile {
  std::vector<int64_t> description;
  std::vector<int64_t> counts;
  std::vector<float> elements;
};

class FileReader {
 public:
  explicit FileReader(const char* path) : file_(path, std::ios::binary | std::ios::ate) {
    if (!file_) throw std::runtime_error(std::string("threshnet_fast: cannot open ") + path);
    left_ = file_.tellg();
    file_.seekg(0);
  }

  PlanFile read() {
    char magic[sizeof kFileMagic] = {};
    read(magic, sizeof magic);
    require(std::memcmp(magic, kFileMagic, sizeof magic) == 0, "the file is not a saved plan");
    int64_t sizes[2] = {};
    read(sizes, 2);
    PlanFile file;
    read(file.description, sizes[0]);
    read(file.counts, sizes[1]);
    int64_t elements = 0;
    for (const int64_t count : file.counts) {
      require(count > 0 && count <= std::numeric_limits<int64_t>::max() - elements,
              "the file's sizes of weights are wrong");
      elements += count;
    }
    read(file.elements, elements);
    require(left_ == 0, "the file is longer than its weights");
    return file;
  }

 private:
  template <typename T>
  void read(T* to, int64_t count) {
    // Before anything of that size is allocated or read.
    require(count >= 0 && count <= left_ / static_cast<int64_t>(sizeof(T)),
            "the file ends too early");
    const auto bytes = static_cast<std::streamsize>(count * static_cast<int64_t>(sizeof(T)));
    file_.read(reinterpret_cast<char*>(to), bytes);
    if (!file_) throw std::runtime_error("threshnet_fast: the file cannot be read");
    left_ -= bytes;
  }

  template <typename T>
  void read(std::vector<T>& to, int64_t count) {
    require(count >= 0 && count <= left_ / static_cast<int64_t>(sizeof(T)),
            "the file ends too early");
    to.resize(static_cast<size_t>(count));
    read(to.data(), count);
  }

  std::ifstream file_;
  std::streamoff left_ = 0;
};

// The weights on the device, as they are in the file, and where each begins.
DeviceMemory upload(const PlanFile& file, std::vector<Weight>& weights) {
  constexpr int64_t kAlignment = 16;
  std::vector<int64_t> offsets;
  int64_t bytes = 0;
  for (const int64_t count : file.counts) {
    offsets.push_back(bytes);
    bytes = round_up(bytes + count * static_cast<int64_t>(sizeof(float)), kAlignment);
  }
  DeviceMemory memory = allocate(bytes);
  const float* from = file.elements.data();
  for (size_t i = 0; i < offsets.size(); ++i) {
    char* to = static_cast<char*>(memory.get()) + offsets[i];
    check(cudaMemcpy(to, from, static_cast<size_t>(file.counts[i]) * sizeof(float),
                     cudaMemcpyHostToDevice),
          "weights cannot be copied to the device");
    weights.push_back({to, file.counts[i], DType::kFloat32});
    from += file.counts[i];
  }
  return memory;
}

class Network {
 public:
  Network(const char* path, DType dtype, int device) : device_(device) {
    const PlanFile file = FileReader(path).read();
    const DeviceGuard guard(device);
    program_ = compile(file.description.data(), static_cast<int64_t>(file.description.size()),
                       dtype, properties_of(device));
    const Program program = view();
    std::vector<Weight> weights;
    const DeviceMemory raw = upload(file, weights);
    packed_ = allocate(program.header().packed_bytes);
    workspace_ = allocate(program.workspace_bytes());
    pack(program, weights, packed_.get(), nullptr);
    check(cudaStreamSynchronize(nullptr), "weights cannot be packed");
  }

  ~Network() {
    try {
      const DeviceGuard guard(device_);
      packed_.reset();
      workspace_.reset();
    } catch (const std::exception&) {
      // The device is gone, and its memory with it.
    }
  }

  Program view() const { return Program(program_.data(), static_cast<int64_t>(program_.size())); }

  void run(const void* input, void* output, Stream stream) const {
    const DeviceGuard guard(device_);
    const Program program = view();
    const ProgramHeader& header = program.header();
    const int64_t image = header.input_height * header.input_width;
    const StridedInput strided{input, header.input_channels * image, image, header.input_width, 1};
    cuda::run(program, packed_.get(), workspace_.get(), strided, output, stream);
  }

 private:
  int device_;
  std::vector<std::byte> program_;
  DeviceMemory packed_;
  DeviceMemory workspace_;
};

std::string& last_error() {
  thread_local std::string text;
  return text;
}

// Calls a function and keeps the text of what it throws: no exception crosses the C interface.
template <typename Function>
int guarded(Function&& function) {
  try {
    function();
    return THRESHNET_FAST_SUCCESS;
  } catch (const std::invalid_argument& error) {
    last_error() = error.what();
    return THRESHNET_FAST_INVALID_ARGUMENT;
  } catch (const std::exception& error) {
    last_error() = error.what();
    return THRESHNET_FAST_FAILURE;
  }
}

}  // namespace
}  // namespace threshnet_fast::cuda

using threshnet_fast::cuda::DType;
using threshnet_fast::cuda::guarded;
using threshnet_fast::cuda::last_error;
using threshnet_fast::cuda::Network;
using threshnet_fast::cuda::ProgramHeader;
using threshnet_fast::cuda::require;

struct threshnet_fast_network {
  Network network;
};

const char* threshnet_fast_version(void) { return THRESHNET_FAST_VERSION; }

const char* threshnet_fast_last_error(void) { return last_error().c_str(); }

int threshnet_fast_load(const char* path, int dtype, int device, threshnet_fast_network** network) {
  return guarded([&] {
    require(network != nullptr, "network is NULL, expected where to store it");
    *network = nullptr;
    require(path != nullptr, "path is NULL, expected the name of a file");
    require(dtype >= THRESHNET_FAST_FLOAT32 && dtype <= THRESHNET_FAST_BFLOAT16,
            "dtype is unknown, expected one of enum threshnet_fast_dtype");
    *network = new threshnet_fast_network{Network(path, static_cast<DType>(dtype), device)};
  });
}

int threshnet_fast_shapes(const threshnet_fast_network* network, int64_t input[4],
                          int64_t output[4]) {
  return guarded([&] {
    require(network != nullptr && input != nullptr && output != nullptr,
            "an argument of threshnet_fast_shapes is NULL");
    const auto program = network->network.view();
    const ProgramHeader& header = program.header();
    const int64_t in[] = {header.batch, header.input_channels, header.input_height,
                          header.input_width};
    const int64_t out[] = {header.batch, header.output_channels, header.output_height,
                           header.output_width};
    std::memcpy(input, in, sizeof in);
    std::memcpy(output, out, sizeof out);
  });
}

int threshnet_fast_run(threshnet_fast_network* network, const void* input, void* output,
                       void* stream) {
  return guarded([&] {
    require(network != nullptr && input != nullptr && output != nullptr,
            "an argument of threshnet_fast_run is NULL");
    network->network.run(input, output, stream);
  });
}

void threshnet_fast_free(threshnet_fast_network* network) { delete network; }
