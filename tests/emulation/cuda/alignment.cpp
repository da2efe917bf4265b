// Misaligned accesses, which g++ looks for in builds without UndefinedBehaviorSanitizer's library:
// -fsanitize=alignment calls this function of that library.
#if !defined(EMULATION_UNDEFINED_SANITIZER)

#include <cstdint>
#include <string>

#include "host_cuda.h"

namespace {

struct Location {
  const char* file;
  uint32_t line, column;
};

struct Type {
  uint16_t kind, info;
  char name[1];  // and as many more as it has, until a null
};

struct Mismatch {
  Location location;
  const Type* type;
  unsigned char log_alignment, access;
};

}  // namespace

extern "C" void __ubsan_handle_type_mismatch_v1(const Mismatch* mismatch, const void*) {
  if (!emulation::in_kernel()) return;
  const std::string what = std::string("an access to ") + mismatch->type->name +
                           " is not aligned to " + std::to_string(1u << mismatch->log_alignment) +
                           " bytes";
  emulation::fail(what.c_str(), mismatch->location.file, static_cast<int>(mismatch->location.line));
}

#endif
