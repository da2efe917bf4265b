// Fibers: stacks that one thread of the operating system switches between, and says so to the
// sanitizers.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulation {

struct Stack {
  unsigned char* bottom;
  size_t bytes;
};

class Fiber {
 public:
  // Has the next resume() call `entry` on `stack`. `entry` never returns: its last act is
  // finish().
  void start(Stack stack, void (*entry)());
  // Runs the fiber until it suspends or finishes. To be called from outside of all fibers.
  void resume();
  // Goes back to who called resume(). To be called from this fiber.
  void suspend();
  [[noreturn]] void finish();
  // Frees what a sanitizer keeps of a fiber that finished, or is never resumed again.
  void destroy();

 private:
  friend void enter_fiber();

#if defined(__x86_64__)
  void* context_ = nullptr;  // its stack pointer
#else
  ucontext_t context_;
#endif
  void (*entry_)() = nullptr;
  Stack stack_{};
  void* sanitizer_ = nullptr;   // ThreadSanitizer's fiber
  void* fake_stack_ = nullptr;  // AddressSanitizer's
};

}  // namespace emulation
