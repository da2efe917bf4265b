#include "fiber.h"

#include <cstdint>
#include <cstdlib>
#include <deque>

#include "sanitizers.h"

namespace emulation {

#if defined(__x86_64__)

// Saves the registers that a call preserves and the stack pointer, and takes another's.
extern "C" void emulation_switch_stack(void** from, void* to);
asm(R"(
.text
.globl emulation_switch_stack
.hidden emulation_switch_stack
.type emulation_switch_stack, @function
emulation_switch_stack:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size emulation_switch_stack, . - emulation_switch_stack
)");
constexpr int kSavedRegisters = 6;
using Context = void*;

static inline void switch_context(Context& from, Context& to) { emulation_switch_stack(&from, to); }

#else

using Context = ucontext_t;

static inline void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }

#endif

namespace {

// Who called resume(), and the fiber that runs.
struct Home {
  Context context;
  void* sanitizer;
  const void* stack_bottom;
  size_t stack_bytes;
  void* fake_stack;
  Fiber* fiber;
};

Home home;

}  // namespace

void enter_fiber() {
#if defined(EMULATION_ADDRESS_SANITIZER)
  __sanitizer_finish_switch_fiber(nullptr, &home.stack_bottom, &home.stack_bytes);
#endif
  home.fiber->entry_();
  std::abort();
}

void Fiber::start(Stack stack, void (*entry)()) {
  stack_ = stack;
  entry_ = entry;
  fake_stack_ = nullptr;
#if defined(__x86_64__)
  auto* top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack.bottom + stack.bytes) &
                                       ~uintptr_t{15});
  // What a call would have left: the address to return to, where a debugger stops.
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(enter_fiber);
  for (int i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
  context_ = top;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack.bottom;
  context_.uc_stack.ss_size = stack.bytes;
  context_.uc_link = nullptr;
  makecontext(&context_, enter_fiber, 0);
#endif
#if defined(EMULATION_THREAD_SANITIZER)
  sanitizer_ = __tsan_create_fiber(0);
#endif
}

void Fiber::resume() {
  home.fiber = this;
#if defined(EMULATION_THREAD_SANITIZER)
  home.sanitizer = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(sanitizer_, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(EMULATION_ADDRESS_SANITIZER)
  __sanitizer_start_switch_fiber(&home.fake_stack, stack_.bottom, stack_.bytes);
#endif
  switch_context(home.context, context_);
#if defined(EMULATION_ADDRESS_SANITIZER)
  __sanitizer_finish_switch_fiber(home.fake_stack, nullptr, nullptr);
#endif
}

void Fiber::suspend() {
#if defined(EMULATION_THREAD_SANITIZER)
  __tsan_switch_to_fiber(home.sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(EMULATION_ADDRESS_SANITIZER)
  __sanitizer_start_switch_fiber(&fake_stack_, home.stack_bottom, home.stack_bytes);
#endif
  switch_context(context_, home.context);
#if defined(EMULATION_ADDRESS_SANITIZER)
  __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#endif
}

void Fiber::finish() {
#if defined(EMULATION_THREAD_SANITIZER)
  __tsan_switch_to_fiber(home.sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(EMULATION_ADDRESS_SANITIZER)
  __sanitizer_start_switch_fiber(nullptr, home.stack_bottom, home.stack_bytes);
#endif
  switch_context(context_, home.context);
  std::abort();
}

void Fiber::destroy() {
#if defined(EMULATION_THREAD_SANITIZER)
  // ThreadSanitizer reports no race with a fiber whose history it has forgotten.
  constexpr size_t kRemembered = 512;
  static std::deque<void*> remembered;
  if (sanitizer_ != nullptr) remembered.push_back(sanitizer_);
  sanitizer_ = nullptr;
  if (remembered.size() > kRemembered) {
    __tsan_destroy_fiber(remembered.front());
    remembered.pop_front();
  }
#endif
}

}  // namespace emulation
