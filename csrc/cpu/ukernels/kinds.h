// The kinds of micro-kernels that there are: one for an instruction set and what it multiplies.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/costs.h"
#include "peak_loop.h"
#include "training.h"
#include "ukernels.h"

namespace threshnet_fast::cpu {

// What features and weights are stored in.
enum class DType : int64_t { kFloat32, kBfloat16 };

template <typename Element>
constexpr DType kDTypeOf = DType::kFloat32;
template <>
constexpr DType kDTypeOf<Bfloat16> = DType::kBfloat16;

// Calls body with an element of a dtype.
template <typename Body>
auto with_element(DType dtype, const Body& body) {
  return dtype == DType::kBfloat16 ? body(Bfloat16{}) : body(float{});
}

struct UkernelKind {
  Isa isa;
  DType dtype;          // weights are packed in words of so many elements
  bool (*runs_here)();  // whether this processor has the instructions
  const Tiling* tiling;
  const void* kernels;            // a UkernelTable of the dtype's elements
  const TrainingTable* training;  // null: it does not train
  Costs costs;
  PeakLoop peak_loop;  // the most floating-point operations, by the instructions of the kernels

  template <typename Element>
  const UkernelTable<Element>& table() const {
    return *static_cast<const UkernelTable<Element>*>(kernels);
  }
  int64_t element_bytes() const {
    return with_element(dtype, [](auto element) { return int64_t{sizeof(element)}; });
  }
};

// The kind of an instruction set, or nullptr where the build or the processor lacks it.
const UkernelKind* kind_of(int64_t isa);

// The instruction sets for a dtype that both this build and this processor have, the best last.
std::vector<int64_t> isas_of(DType dtype);

// The best of those for float32.
Isa best_isa();

// The tiling of an instruction set, or nullptr where there is no such kind.
const Tiling* tiling_of(int64_t isa);

// Bytes of an element of features and weights; of a kind that is not there, those of float32.
int64_t element_bytes(int64_t isa);

// Of an instruction set that has a kind, which computes in Element.
template <typename Element>
const UkernelTable<Element>& ukernel_table(int64_t isa) {
  return kind_of(isa)->table<Element>();
}

// Of one that trains.
inline const TrainingTable& training_table(int64_t isa) { return *kind_of(isa)->training; }

}  // namespace threshnet_fast::cpu
