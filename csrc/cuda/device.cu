#include "device.h"
#include "launch.cuh"

namespace threshnet_fast::cuda {
namespace {

int attribute(cudaDeviceAttr which, int index) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, index),
        "a device cannot be asked for its properties");
  return value;
}

}  // namespace

DeviceGuard::DeviceGuard(int index) : before_(0) {
  check(cudaGetDevice(&before_), "there is no CUDA device");
  check(cudaSetDevice(index), "a CUDA device cannot be selected");
}

// A failure to go back would have shown on the way there.
DeviceGuard::~DeviceGuard() { static_cast<void>(cudaSetDevice(before_)); }

Device properties_of(int index) {
  const int major = attribute(cudaDevAttrComputeCapabilityMajor, index);
  const int minor = attribute(cudaDevAttrComputeCapabilityMinor, index);
  return {10 * major + minor, attribute(cudaDevAttrMultiProcessorCount, index),
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index)};
}

}  // namespace threshnet_fast::cuda
