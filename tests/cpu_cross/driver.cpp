// Runs one plan by the CPU engine, without torch: built for another architecture, it runs there or
// in an emulator of it.
//
//   driver                                        prints the instruction sets, the best one last
//   driver ISA THREADS EXACT INPUT OUTPUT         prints how each step was computed
//
// INPUT: the description, the weights, the network's input with its four strides, the external
// inputs; each array is its length as an int64 and then its elements, each list its length and then
// its arrays. OUTPUT: the result and the arena. Everything that the engine reads or writes ends
// where a page begins that nobody may touch, and what it has not written is NaN.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cpu/inference/program.h"

namespace {

using namespace threshnet_fast::cpu;

// Floats that end where the accessible memory ends.
class GuardedFloats {
 public:
  explicit GuardedFloats(int64_t count) : count_(count) {
    const int64_t page = sysconf(_SC_PAGESIZE);
    const int64_t bytes = count * static_cast<int64_t>(sizeof(float));
    accessible_ = (bytes + page - 1) / page * page;
    size_ = accessible_ + page;
    void* const memory =
        mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("no memory");
    start_ = static_cast<char*>(memory);
    if (mprotect(start_ + accessible_, page, PROT_NONE) != 0)
      throw std::runtime_error("no guard page");
    std::fill_n(data(), count, std::numeric_limits<float>::quiet_NaN());
  }
  GuardedFloats(const GuardedFloats&) = delete;
  GuardedFloats& operator=(const GuardedFloats&) = delete;
  ~GuardedFloats() { munmap(start_, size_); }

  float* data() const { return reinterpret_cast<float*>(start_ + accessible_) - count_; }
  int64_t count() const { return count_; }

 private:
  int64_t count_, accessible_, size_;
  char* start_;
};

using Floats = std::unique_ptr<GuardedFloats>;

class File {
 public:
  File(const char* path, const char* mode) : file_(std::fopen(path, mode)) {
    if (file_ == nullptr) throw std::runtime_error(std::string("cannot open ") + path);
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  ~File() { std::fclose(file_); }

  template <typename T>
  void read(T* to, int64_t count) {
    if (std::fread(to, sizeof(T), count, file_) != static_cast<size_t>(count))
      throw std::runtime_error("the input file ends too early");
  }
  int64_t read_length() {
    int64_t length = 0;
    read(&length, 1);
    return length;
  }
  Floats read_floats() {
    Floats floats = std::make_unique<GuardedFloats>(read_length());
    read(floats->data(), floats->count());
    return floats;
  }
  std::vector<Floats> read_list() {
    std::vector<Floats> list(read_length());
    for (Floats& floats : list) floats = read_floats();
    return list;
  }
  void write(const float* from, int64_t count) {
    if (std::fwrite(from, sizeof(float), count, file_) != static_cast<size_t>(count))
      throw std::runtime_error("cannot write the output file");
  }

 private:
  std::FILE* file_;
};

int64_t thread_count = 1;

// As torch's does: [0, count) in one part for each thread.
void parallel_for(int64_t count, void (*body)(void*, int64_t, int64_t), void* context) {
  const int64_t parts = std::min(count, thread_count);
  std::vector<std::thread> threads;
  for (int64_t i = 1; i < parts; ++i)
    threads.emplace_back(body, context, count * i / parts, count * (i + 1) / parts);
  if (parts > 0) body(context, 0, count / parts);
  for (std::thread& thread : threads) thread.join();
}

constexpr Isa kFloatIsas[] = {kScalar, kAvx2, kAvx512, kNeon};

int64_t isa_of(const std::string& name) {
  for (const int64_t isa : kFloatIsas) {
    const Tiling* tiling = tiling_of(isa);
    if (tiling != nullptr && tiling->name == name) return isa;
  }
  throw std::invalid_argument("no instruction set " + name);
}

void print_instruction_sets() {
  for (const int64_t isa : kFloatIsas) {
    const Tiling* tiling = tiling_of(isa);
    if (tiling != nullptr) std::printf("%s\n", tiling->name);
  }
  std::printf("%s\n", tiling_of(best_isa())->name);
}

void run_file(char** arguments) {
  const int64_t isa = isa_of(arguments[0]);
  thread_count = std::atoll(arguments[1]);
  const int64_t winograd = std::atoll(arguments[2]);
  File input(arguments[3], "rb");
  std::vector<int64_t> description(input.read_length());
  input.read(description.data(), static_cast<int64_t>(description.size()));
  const std::vector<Floats> weights = input.read_list();
  const Floats network_input = input.read_floats();
  Binding binding;
  binding.input.data = network_input->data();
  for (int64_t* stride : {&binding.input.batch_stride, &binding.input.channel_stride,
                          &binding.input.height_stride, &binding.input.width_stride})
    input.read(stride, 1);
  const std::vector<Floats> externals = input.read_list();
  for (const Floats& external : externals) binding.externals.push_back(external->data());

  const std::vector<std::byte> bytes = compile(
      description.data(), static_cast<int64_t>(description.size()), isa, thread_count, winograd);
  const Program program(bytes.data(), static_cast<int64_t>(bytes.size()));
  const ProgramHeader& header = program.header();
  if (header.external_count != static_cast<int64_t>(externals.size()))
    throw std::invalid_argument("wrong number of external inputs");
  for (int64_t i = 0; i < header.step_count; ++i) {
    const Step& step = program.step(i);
    if (is_planned(step)) std::printf("%lld\n", static_cast<long long>(algorithm_of(step)));
  }

  std::vector<Weight> list;
  for (const Floats& weight : weights) list.push_back({weight->data(), weight->count()});
  const GuardedFloats packed(header.packed_floats);
  pack(program, list, packed.data(), thread_count, parallel_for);
  const GuardedFloats workspace(program.workspace_floats(thread_count));
  const GuardedFloats output(header.batch * header.output_channels * header.output_height *
                             header.output_width);
  binding.output = output.data();
  run(program, packed.data(), workspace.data(), binding, thread_count, parallel_for);
  File result(arguments[4], "wb");
  result.write(output.data(), output.count());
  result.write(workspace.data(), header.arena_floats);
}

}  // namespace

int main(int count, char** arguments) {
  try {
    if (count == 1) {
      print_instruction_sets();
    } else if (count == 6) {
      run_file(arguments + 1);
    } else {
      throw std::invalid_argument("expected ISA THREADS EXACT INPUT OUTPUT, or nothing");
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
