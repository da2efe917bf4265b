// How a thread's floating-point unit rounds and what it does with denormal numbers.
#pragma once

#include <cstdint>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace threshnet_fast::cpu {

#if defined(__x86_64__) || defined(_M_X64)
using FloatMode = uint32_t;

// The lowest six bits of MXCSR are no mode: they record what has happened.
inline FloatMode float_mode() { return _mm_getcsr() & ~FloatMode{0x3f}; }
inline void set_float_mode(FloatMode mode) { _mm_setcsr(mode); }
#elif defined(__aarch64__)
using FloatMode = uint64_t;

inline FloatMode float_mode() {
  FloatMode mode;
  __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
  return mode;
}
inline void set_float_mode(FloatMode mode) {
  __asm__ volatile("msr fpcr, %0" : : "r"(mode) : "memory");
}
#else
using FloatMode = uint32_t;

inline FloatMode float_mode() { return 0; }
inline void set_float_mode(FloatMode) {}
#endif

// Gives the thread that it is made on a mode for as long as it lives.
class FloatModeScope {
 public:
  explicit FloatModeScope(FloatMode mode) : before_(float_mode()), changed_(mode != before_) {
    if (changed_) set_float_mode(mode);
  }
  FloatModeScope(const FloatModeScope&) = delete;
  FloatModeScope& operator=(const FloatModeScope&) = delete;
  ~FloatModeScope() {
    if (changed_) set_float_mode(before_);
  }

 private:
  FloatMode before_;
  bool changed_;
};

}  // namespace threshnet_fast::cpu
