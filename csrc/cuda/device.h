// Devices as CUDA's runtime knows them, without its headers.
#pragma once

#include "export.h"
#include "operands.h"

namespace threshnet_fast::cuda {

// Makes a device the current one until the end of a scope.
class THRESHNET_FAST_EXPORT DeviceGuard {
 public:
  // Throws std::runtime_error with CUDA's text where there is no such device.
  explicit DeviceGuard(int index);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_;
};

// What the choice of configurations has to know of a device.
THRESHNET_FAST_EXPORT Device properties_of(int index);

}  // namespace threshnet_fast::cuda
