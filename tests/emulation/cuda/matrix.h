// What the warp-wide functions on matrices compute, for all lanes at once.
#pragma once

#include <array>
#include <cstdint>

namespace emulation {

// The operands that each lane gives to mma.m16n8k16: see multiply_add in csrc/cuda/primitives.cuh.
struct MatrixOperands {
  std::array<float*, 32> sums;
  std::array<const uint32_t*, 32> a;
  std::array<std::array<uint32_t, 2>, 32> b;
};

void multiply_float16(const MatrixOperands& operands);
void multiply_bfloat16(const MatrixOperands& operands);

// ldmatrix.x4, and with .trans: from the address of a row that each lane gives, its fragment.
void load_rows(const void* const* rows, uint32_t* const* fragments);
void load_columns(const void* const* rows, uint32_t* const* fragments);

}  // namespace emulation
