#include "training.h"
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

Isa best_bfloat16_isa() {
#if defined(__x86_64__) || defined(_M_X64)
  if (best_isa() == kAvx512 && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512bf16"))
    return kAvx512Bf16;
#endif
  return kScalar;
}

template <>
const UkernelTable<float>& ukernel_table(int64_t isa) {
#if defined(__x86_64__) || defined(_M_X64)
  if (isa == kAvx512) return kAvx512Table;
  if (isa == kAvx2) return kAvx2Table;
#elif defined(__aarch64__)
  if (isa == kNeon) return kNeonTable;
#endif
  (void)isa;
  return kScalarTable;
}

template <>
const UkernelTable<Bfloat16>& ukernel_table(int64_t) {
#if defined(__x86_64__) || defined(_M_X64)
  return kAvx512Bf16Table;
#else
  __builtin_unreachable();
#endif
}

const TrainingTable& training_table(int64_t isa) {
#if defined(__x86_64__) || defined(_M_X64)
  if (isa == kAvx512) return kAvx512Training;
  if (isa == kAvx2) return kAvx2Training;
#elif defined(__aarch64__)
  if (isa == kNeon) return kNeonTraining;
#endif
  (void)isa;
  return kScalarTraining;
}

const Tiling* tiling_of(int64_t isa) {
#if defined(__x86_64__) || defined(_M_X64)
  if (isa == kAvx512Bf16)
    return best_bfloat16_isa() == kAvx512Bf16 ? &kAvx512Bf16Table.tiling : nullptr;
  const bool available = isa <= best_isa();
#elif defined(__aarch64__)
  const bool available = isa == kNeon || isa == kScalar;
#else
  const bool available = isa == kScalar;
#endif
  return isa >= 0 && available ? &ukernel_table<float>(isa).tiling : nullptr;
}

}  // namespace threshnet_fast::cpu
