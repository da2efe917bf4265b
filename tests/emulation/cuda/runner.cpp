// A process of its own for one call of a launcher, for the builds with a sanitizer: what it is
// given and what it gives back is in two files, which cuda_library.py writes and reads.
//
//   input:   order, seed, architecture, multiprocessors, shared bytes
//            buffers; of each: bytes, and the bytes themselves
//            length of the launcher's name, and the name
//            arguments; of each: bytes, and the bytes themselves
//            pointers; of each: argument, offset in it, buffer, offset in the buffer
//            bytes of the result
//   output:  outcome, length of its text, and the text; the result; each buffer's bytes
//
// All numbers are uint64_t.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "host_cuda.h"
#include "testing.h"

namespace {

constexpr size_t kAlignment = 256;
constexpr size_t kTextBytes = 4096;

// Of exactly the bytes asked for, so that AddressSanitizer sees what is accessed behind them.
struct Buffer {
  unsigned char* data;
  size_t bytes;
};

class Reader {
 public:
  explicit Reader(const char* path) : file_(std::fopen(path, "rb")) {
    if (file_ == nullptr) std::exit(2);
  }
  ~Reader() { std::fclose(file_); }

  void read(void* data, size_t bytes) {
    if (bytes > 0 && std::fread(data, 1, bytes, file_) != bytes) std::exit(2);
  }

  uint64_t number() {
    uint64_t value;
    read(&value, sizeof(value));
    return value;
  }

 private:
  std::FILE* file_;
};

}  // namespace

int main(int count, char** paths) {
  if (count != 3) return 2;
  Reader input(paths[1]);
  const int order = static_cast<int>(input.number());
  emulation_set_schedule(order, input.number());
  const int architecture = static_cast<int>(input.number());
  const int multiprocessors = static_cast<int>(input.number());
  emulation_set_device(architecture, multiprocessors, static_cast<int>(input.number()));

  std::vector<Buffer> buffers(input.number());
  for (Buffer& buffer : buffers) {
    buffer.bytes = input.number();
    void* data = nullptr;
    if (posix_memalign(&data, kAlignment, buffer.bytes) != 0) return 2;
    buffer.data = static_cast<unsigned char*>(data);
    input.read(buffer.data, buffer.bytes);
  }

  std::string name(input.number(), '\0');
  input.read(name.data(), name.size());
  std::vector<std::vector<uint64_t>> arguments(input.number());
  std::vector<size_t> argument_bytes;
  std::vector<const void*> addresses;
  for (std::vector<uint64_t>& argument : arguments) {
    argument_bytes.push_back(input.number());
    argument.resize((argument_bytes.back() + sizeof(uint64_t) - 1) / sizeof(uint64_t));
    input.read(argument.data(), argument_bytes.back());
    addresses.push_back(argument.data());
  }
  for (uint64_t pointers = input.number(); pointers > 0; --pointers) {
    auto* argument = reinterpret_cast<unsigned char*>(arguments[input.number()].data());
    unsigned char* place = argument + input.number();
    const Buffer& buffer = buffers[input.number()];
    const unsigned char* address = buffer.data + input.number();
    std::memcpy(place, &address, sizeof(address));
  }
  std::vector<unsigned char> result(input.number());

  std::vector<char> text(kTextBytes, '\0');
  const int outcome =
      emulation_call(name.c_str(), addresses.data(), argument_bytes.data(), addresses.size(),
                     result.data(), result.size(), text.data(), text.size());

  std::FILE* output = std::fopen(paths[2], "wb");
  if (output == nullptr) return 2;
  const uint64_t head[] = {static_cast<uint64_t>(outcome), std::strlen(text.data())};
  std::fwrite(head, sizeof(head), 1, output);
  std::fwrite(text.data(), 1, head[1], output);
  if (!result.empty()) std::fwrite(result.data(), 1, result.size(), output);
  for (const Buffer& buffer : buffers) {
    std::fwrite(buffer.data, 1, buffer.bytes, output);
    std::free(buffer.data);
  }
  return std::fclose(output) == 0 ? 0 : 2;
}
