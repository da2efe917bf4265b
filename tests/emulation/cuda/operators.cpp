// The launchers of csrc/cuda under their names, those whose source is part of the library.
#include <cstring>

#include "cuda/operands.h"
#include "testing.h"

namespace threshnet_fast::cuda {

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wredundant-decls"
[[gnu::weak]] int tile_count(DType dtype);
[[gnu::weak]] Tile tile_of(DType dtype, int tile);
[[gnu::weak]] Configuration choose(const Convolution& convolution, const Device& device);
[[gnu::weak]] const char* objection(DType dtype, int architecture);
[[gnu::weak]] int64_t partial_floats(const Convolution& convolution,
                                     const Configuration& configuration);
[[gnu::weak]] void convolve(const Convolution& convolution, const Configuration& configuration,
                            Stream stream);
[[gnu::weak]] void convolve_stem(const StemConvolution& convolution, Stream stream);
[[gnu::weak]] void pool(const Pool& pool, Stream stream);
[[gnu::weak]] void head(const Head& head, Stream stream);
[[gnu::weak]] void gather(const Gather& gather, Stream stream);
[[gnu::weak]] void pack_weight(const Packing& packing, Stream stream);
[[gnu::weak]] void pack_vector(const VectorPacking& packing, Stream stream);
#pragma GCC diagnostic pop

namespace {

// A text of any process, unlike a pointer.
struct Text {
  char characters[256];
};

Text objection_text(DType dtype, int architecture) {
  Text text{};
  const char* reason = objection(dtype, architecture);
  if (reason != nullptr) std::strncpy(text.characters, reason, sizeof(text.characters) - 1);
  return text;
}

#define EXPORTED(function) const emulation::Exported function##_(#function, function)
EXPORTED(tile_count);
EXPORTED(tile_of);
EXPORTED(choose);
const emulation::Exported objection_("objection", objection == nullptr ? nullptr : objection_text);
EXPORTED(partial_floats);
EXPORTED(convolve);
EXPORTED(convolve_stem);
EXPORTED(pool);
EXPORTED(head);
EXPORTED(gather);
EXPORTED(pack_weight);
EXPORTED(pack_vector);
#undef EXPORTED

}  // namespace
}  // namespace threshnet_fast::cuda
