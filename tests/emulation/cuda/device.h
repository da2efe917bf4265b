// The device that the emulation claims to be.
#pragma once

#include <cstddef>

namespace emulation {

struct Device {
  int architecture = 90;
  int multiprocessors = 132;
  size_t shared_bytes = 227 * 1024;  // that one block may have
};

const Device& device();

}  // namespace emulation
