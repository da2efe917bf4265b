// What the emulation tells the sanitizers; nothing in other builds. EMULATION_..._SANITIZER is
// defined by the build rather than taken from the compiler, as the emulation itself is compiled
// without -fsanitize=thread: ThreadSanitizer has to see the accesses of the kernels alone.
#pragma once

#include <cstddef>

#if defined(EMULATION_ADDRESS_SANITIZER)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(EMULATION_THREAD_SANITIZER)
#include <sanitizer/tsan_interface.h>
extern "C" {
void __tsan_read_range(void* address, unsigned long bytes);
void __tsan_write_range(void* address, unsigned long bytes);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

namespace emulation {

#if defined(EMULATION_ADDRESS_SANITIZER)
constexpr bool kAddressSanitizer = true;
#else
constexpr bool kAddressSanitizer = false;
#endif
#if defined(EMULATION_THREAD_SANITIZER)
constexpr bool kThreadSanitizer = true;
#else
constexpr bool kThreadSanitizer = false;
#endif

// Everything before a release() of a key happens before what follows an acquire() of it.
inline void release([[maybe_unused]] void* key) {
#if defined(EMULATION_THREAD_SANITIZER)
  __tsan_release(key);
#endif
}

inline void acquire([[maybe_unused]] void* key) {
#if defined(EMULATION_THREAD_SANITIZER)
  __tsan_acquire(key);
#endif
}

// A kernel's accesses that the emulation makes in its place.
inline void note_read([[maybe_unused]] const void* address, [[maybe_unused]] size_t bytes) {
#if defined(EMULATION_THREAD_SANITIZER)
  __tsan_read_range(const_cast<void*>(address), bytes);
#endif
}

inline void note_write([[maybe_unused]] void* address, [[maybe_unused]] size_t bytes) {
#if defined(EMULATION_THREAD_SANITIZER)
  __tsan_write_range(address, bytes);
#endif
}

// While one lives, what is allocated, freed, copied and set is the emulation's own.
class Unobserved {
 public:
#if defined(EMULATION_THREAD_SANITIZER)
  Unobserved() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unobserved() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
#else
  Unobserved() {}
#endif
  Unobserved(const Unobserved&) = delete;
  Unobserved& operator=(const Unobserved&) = delete;
};

// Makes any access to a range an error, until it is allowed again.
inline void forbid([[maybe_unused]] void* address, [[maybe_unused]] size_t bytes) {
#if defined(EMULATION_ADDRESS_SANITIZER)
  __asan_poison_memory_region(address, bytes);
#endif
}

inline void allow([[maybe_unused]] void* address, [[maybe_unused]] size_t bytes) {
#if defined(EMULATION_ADDRESS_SANITIZER)
  __asan_unpoison_memory_region(address, bytes);
#endif
}

}  // namespace emulation
