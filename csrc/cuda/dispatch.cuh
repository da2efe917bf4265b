// From a dtype known at run time to a type known at compile time.
#pragma once

#include <stdexcept>
#include <string>

#include "operands.h"
#include "primitives.cuh"

namespace threshnet_fast::cuda {

template <typename T>
struct Type {
  using type = T;
};

// Calls function(Type<T>{}) with the T of a dtype; throws std::invalid_argument for others.
template <typename Function>
void with_type(DType dtype, Function&& function) {
  switch (dtype) {
    case DType::kFloat32:
      return function(Type<float>{});
    case DType::kFloat16:
      return function(Type<__half>{});
    case DType::kBFloat16:
      return function(Type<__nv_bfloat16>{});
  }
  throw std::invalid_argument("threshnet_fast: dtype is " +
                              std::to_string(static_cast<int32_t>(dtype)) +
                              ", expected 0 (float32), 1 (float16) or 2 (bfloat16)");
}

}  // namespace threshnet_fast::cuda
