#include "kinds.h"

namespace threshnet_fast::cpu {
namespace {

bool always() { return true; }

#if defined(__x86_64__) || defined(_M_X64)
bool has_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
bool has_avx512() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_bf16() {
  return has_avx512() && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512bf16");
}
#endif

template <typename Element>
constexpr UkernelKind kind(Isa isa, bool (*runs_here)(), const UkernelTable<Element>& table,
                           const TrainingTable* training, const Costs& costs, PeakLoop peak_loop) {
  return {isa, kDTypeOf<Element>, runs_here, &table.tiling, &table, training, costs, peak_loop};
}

// Of each dtype, the best last.
constexpr UkernelKind kKinds[] = {
    kind(kScalar, always, kScalarTable, &kScalarTraining, {25, 20, 12, 8, 35, 29, 1000},
         peak_loop_scalar),
#if defined(__x86_64__) || defined(_M_X64)
    kind(kAvx2, has_avx2, kAvx2Table, &kAvx2Training, {65, 25, 10, 8, 35, 29, 1000},
         peak_loop_avx2),
    kind(kAvx512, has_avx512, kAvx512Table, &kAvx512Training, {130, 25, 13, 9, 31, 28, 1000},
         peak_loop_avx512),
    kind(kAvx512Bf16, has_avx512_bf16, kAvx512Bf16Table, nullptr, {250, 25, 10, 9, 25, 28, 1000},
         peak_loop_avx512_bf16),
#elif defined(__aarch64__)
    kind(kNeon, always, kNeonTable, &kNeonTraining, {5, 3, 40, 25, 120, 90, 2000}, peak_loop_neon),
#endif
};

}  // namespace

std::vector<int64_t> isas_of(DType dtype) {
  std::vector<int64_t> found;
  for (const UkernelKind& kind : kKinds) {
    if (kind.dtype == dtype && kind.runs_here()) found.push_back(kind.isa);
  }
  return found;
}

const UkernelKind* kind_of(int64_t isa) {
  for (const UkernelKind& kind : kKinds) {
    if (kind.isa == isa) return kind.runs_here() ? &kind : nullptr;
  }
  return nullptr;
}

Isa best_isa() { return static_cast<Isa>(isas_of(DType::kFloat32).back()); }

const Tiling* tiling_of(int64_t isa) {
  const UkernelKind* const kind = kind_of(isa);
  return kind == nullptr ? nullptr : kind->tiling;
}

int64_t element_bytes(int64_t isa) {
  const UkernelKind* const kind = kind_of(isa);
  return kind == nullptr ? int64_t{sizeof(float)} : kind->element_bytes();
}

}  // namespace threshnet_fast::cpu
