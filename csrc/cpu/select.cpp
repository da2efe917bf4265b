#include "ukernels.h"

namespace threshnet_fast::cpu {

Isa best_isa() {
#if defined(__x86_64__) || defined(_M_X64)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl")) return kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
#elif defined(__aarch64__)
  // Part of the baseline.
  return kNeon;
#endif
  return kScalar;
}

const UkernelTable* ukernel_table(int64_t isa) {
  if (isa < 0 || isa > best_isa()) return nullptr;
#if defined(__x86_64__) || defined(_M_X64)
  if (isa == kAvx512) return &kAvx512Table;
  if (isa == kAvx2) return &kAvx2Table;
#elif defined(__aarch64__)
  if (isa == kNeon) return &kNeonTable;
  if (isa != kScalar) return nullptr;
#endif
  return &kScalarTable;
}

}  // namespace threshnet_fast::cpu
