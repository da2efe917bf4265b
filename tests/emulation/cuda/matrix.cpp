#include "matrix.h"

#include <cstring>

namespace emulation {
namespace {

constexpr int kLanes = 32, kRows = 16, kColumns = 8, kDepth = 16;

// Exact; written so that it is vectorised.
inline float from_float16(uint16_t half) {
  constexpr uint32_t kInfinity = 0x7F800000u, kRescale = (127u + 112u) << 23;
  const uint32_t magnitude = (half & 0x7FFFu) << 13;
  float rescale, value;
  std::memcpy(&rescale, &kRescale, sizeof(float));
  std::memcpy(&value, &magnitude, sizeof(float));
  value *= rescale;
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(float));
  bits |= (half & 0x7C00u) == 0x7C00u ? kInfinity : 0u;
  bits |= (half & 0x8000u) << 16;
  std::memcpy(&value, &bits, sizeof(float));
  return value;
}

inline float from_bfloat16(uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(float));
  return value;
}

template <float (*convert)(uint16_t)>
void multiply(const MatrixOperands& operands) {
  alignas(64) uint16_t a_bits[kRows * kDepth], b_bits[kDepth * kColumns];
  for (int lane = 0; lane < kLanes; ++lane) {
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      const int row = group + i % 2 * 8, column = pair + i / 2 * 8;
      std::memcpy(a_bits + row * kDepth + column, operands.a[lane] + i, sizeof(uint32_t));
    }
    for (int i = 0; i < 2; ++i) {
      const uint32_t two = operands.b[lane][i];
      b_bits[(pair + i * 8) * kColumns + group] = static_cast<uint16_t>(two);
      b_bits[(pair + i * 8 + 1) * kColumns + group] = static_cast<uint16_t>(two >> 16);
    }
  }
  alignas(64) float a[kRows * kDepth], b[kDepth * kColumns], sums[kRows][kColumns];
  for (int i = 0; i < kRows * kDepth; ++i) a[i] = convert(a_bits[i]);
  for (int i = 0; i < kDepth * kColumns; ++i) b[i] = convert(b_bits[i]);
  for (int lane = 0; lane < kLanes; ++lane)
    for (int i = 0; i < 4; ++i)
      sums[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2] = operands.sums[lane][i];
  for (int row = 0; row < kRows; ++row) {
    float total[kColumns];
    for (int column = 0; column < kColumns; ++column) total[column] = sums[row][column];
    for (int k = 0; k < kDepth; ++k)
      for (int column = 0; column < kColumns; ++column)
        total[column] += a[row * kDepth + k] * b[k * kColumns + column];
    for (int column = 0; column < kColumns; ++column) sums[row][column] = total[column];
  }
  for (int lane = 0; lane < kLanes; ++lane)
    for (int i = 0; i < 4; ++i)
      operands.sums[lane][i] = sums[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
}

}  // namespace

void multiply_float16(const MatrixOperands& operands) { multiply<from_float16>(operands); }

void multiply_bfloat16(const MatrixOperands& operands) { multiply<from_bfloat16>(operands); }

void load_rows(const void* const* rows, uint32_t* const* fragments) {
  for (int lane = 0; lane < kLanes; ++lane)
    for (int matrix = 0; matrix < 4; ++matrix) {
      const auto* row = static_cast<const unsigned char*>(rows[matrix * 8 + lane / 4]);
      std::memcpy(fragments[lane] + matrix, row + lane % 4 * sizeof(uint32_t), sizeof(uint32_t));
    }
}

void load_columns(const void* const* rows, uint32_t* const* fragments) {
  for (int lane = 0; lane < kLanes; ++lane)
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t pair[2];
      for (int i = 0; i < 2; ++i) {
        const auto* row = static_cast<const unsigned char*>(rows[matrix * 8 + lane % 4 * 2 + i]);
        std::memcpy(pair + i, row + lane / 4 * sizeof(uint16_t), sizeof(uint16_t));
      }
      std::memcpy(fragments[lane] + matrix, pair, sizeof(uint32_t));
    }
}

}  // namespace emulation
