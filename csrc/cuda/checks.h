// Checks of what launchers are given. What is wrong is named with its value and what was expected.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "operands.h"

namespace threshnet_fast::cuda {

// Throws std::invalid_argument with a text such as
// "threshnet_fast: pool: out_channels is 40, expected at most 32".
class Checker {
 public:
  explicit Checker(const char* operation) : operation_(operation) {}

  void that(bool condition, const char* what) const {
    if (!condition) fail(what);
  }

  void positive(int64_t value, const char* name) const {
    if (value <= 0) fail(name, value, "expected a positive number");
  }

  void at_least(int64_t value, int64_t limit, const char* name) const {
    if (value < limit) fail(name, value, "expected at least " + std::to_string(limit));
  }

  void at_most(int64_t value, int64_t limit, const char* name) const {
    if (value > limit) fail(name, value, "expected at most " + std::to_string(limit));
  }

  void equal(int64_t value, int64_t expected, const char* name) const {
    if (value != expected) fail(name, value, "expected " + std::to_string(expected));
  }

  void multiple(int64_t value, int64_t of, const char* name) const {
    if (value % of != 0) fail(name, value, "expected a multiple of " + std::to_string(of));
  }

  // Not null, and aligned to some bytes.
  void pointer(const void* address, int64_t alignment, const char* name) const {
    if (address == nullptr) fail(std::string(name) + " is null");
    if (reinterpret_cast<uintptr_t>(address) % static_cast<uintptr_t>(alignment) != 0)
      fail(std::string(name) + " is not aligned to " + std::to_string(alignment) + " bytes");
  }

  void optional(const void* address, int64_t alignment, const char* name) const {
    if (address != nullptr) pointer(address, alignment, name);
  }

  void one_of(DType value, DType first, DType second, const char* name) const {
    if (value != first && value != second)
      fail(name, static_cast<int64_t>(value),
           "expected " + std::to_string(static_cast<int64_t>(first)) + " or " +
               std::to_string(static_cast<int64_t>(second)));
  }

  // The pixels of a batch, few enough to be counted in 32 bits.
  void pixels(int64_t batch, int64_t height, int64_t width, const char* name) const {
    positive(batch, "batch");
    positive(height, "height");
    positive(width, "width");
    if (height > kMostPixels || width > kMostPixels / height ||
        batch > kMostPixels / (height * width))
      fail(std::string(name) + " has more than " + std::to_string(kMostPixels) + " pixels");
  }

  // Whole groups of channels, read in vectors of 16 bytes.
  void segment(const Segment& segment) const {
    pointer(segment.data, 16, "input");
    positive(segment.channels, "channels of the input");
    multiple(segment.channels, kGroup, "channels of the input");
    at_least(segment.pitch, segment.channels, "pitch of the input");
    multiple(segment.pitch, 8, "pitch of the input");
  }

  void window(const Window& window) const {
    pixels(window.batch, window.in_height, window.in_width, "input");
    pixels(window.batch, window.out_height, window.out_width, "output");
    positive(window.kernel_height, "kernel_height");
    positive(window.kernel_width, "kernel_width");
    at_most(int64_t{window.kernel_height} * window.kernel_width, kMostPixels, "kernel's extent");
    positive(window.stride, "stride");
    at_least(window.padding, 0, "padding");
    extent(window.in_height, window.kernel_height, window, window.out_height, "out_height");
    extent(window.in_width, window.kernel_width, window, window.out_width, "out_width");
  }

 private:
  void extent(int64_t in, int64_t kernel, const Window& window, int64_t out,
              const char* name) const {
    const int64_t padded = in + 2 * int64_t{window.padding};
    at_most(padded, kMostPixels, "extent of the padded input");
    at_most(kernel, padded, "extent of the kernel");
    equal(out, (padded - kernel) / window.stride + 1, name);
  }

  [[noreturn]] void fail(const char* name, int64_t value, const std::string& expected) const {
    fail(std::string(name) + " is " + std::to_string(value) + ", " + expected);
  }

  [[noreturn]] void fail(const std::string& what) const {
    throw std::invalid_argument(std::string("threshnet_fast: ") + operation_ + ": " + what);
  }

  const char* operation_;
};

}  // namespace threshnet_fast::cuda
