#include <algorithm>
#include <type_traits>

#include "checks.h"
#include "dispatch.cuh"
#include "launch.cuh"
#include "packing.cuh"

namespace threshnet_fast::cuda {

namespace {

// Far more than any weight has, and few enough to be counted in 32 bits with a tile's padding.
constexpr int64_t kMaxExtent = int64_t{1} << 30;

struct Extents {
  int64_t channels;  // of all segments
  int64_t packed;    // with the padding between and behind them
  int64_t used;      // without what is behind the last one
};

// The segments of a packing, checked.
Extents extents_of(const SegmentMap& segments, const Checker& check) {
  check.positive(segments.count, "segment_count");
  check.at_most(segments.count, kMaxSegments, "segment_count");
  Extents extents = {};
  for (int segment = 0; segment < segments.count; ++segment) {
    const int64_t channels = segments.channels[segment];
    check.positive(channels, "channels of a segment");
    extents.used = extents.packed + channels;
    extents.channels += channels;
    extents.packed += round_up(channels, int64_t{segments.padded_in});
  }
  check.at_most(extents.packed, kMaxExtent, "channels of all segments");
  return extents;
}

}  // namespace

void pack_weight(const Packing& packing, Stream stream) {
  const Checker check("pack_weight");
  check.that(packing.padded_in == 1 || packing.padded_in == kGroup,
             "padded_in is neither 1 nor 16");
  PackWeightParameters parameters;
  parameters.source = packing.source;
  parameters.output = packing.output;
  parameters.segments.count = packing.segment_count;
  std::copy(packing.channels, packing.channels + kMaxSegments, parameters.segments.channels);
  parameters.segments.padded_in = packing.padded_in;
  const Extents extents = extents_of(parameters.segments, check);
  check.positive(packing.taps, "taps");
  if (packing.rows_are_outputs) check.equal(packing.taps, 1, "taps");
  check.at_most(extents.packed * packing.taps, kMaxExtent, "channels of all segments and taps");
  check.positive(packing.out_channels, "out_channels");
  check.at_least(packing.columns, packing.out_channels, "columns");
  check.at_most(packing.columns, kMaxExtent, "columns");
  check.one_of(packing.source_dtype, DType::kFloat32, packing.dtype, "source_dtype");
  check.pointer(packing.source, bytes_of(packing.source_dtype), "source");
  check.pointer(packing.output, bytes_of(packing.dtype), "output");
  parameters.taps = packing.taps;
  parameters.in_channels = static_cast<int32_t>(extents.channels);
  parameters.out_channels = packing.out_channels;
  parameters.rows = static_cast<int32_t>(extents.packed);
  parameters.columns = packing.columns;

  const auto start = [&](auto source, auto type) {
    using Source = typename decltype(source)::type;
    using T = typename decltype(type)::type;
    if (packing.rows_are_outputs) {
      launch(pack_rows_kernel<Source, T>,
             divide_up(extents.packed * packing.columns, int64_t{kPackingThreads}), 1,
             kPackingThreads, 0, stream, parameters);
    } else {
      launch(pack_weight_kernel<Source, T>,
             divide_up(extents.packed * packing.taps, int64_t{kPackingTile}),
             divide_up(packing.columns, kPackingTile), kPackingThreads,
             kPackingTile * (kPackingTile + 1) * static_cast<int>(sizeof(float)), stream,
             parameters);
    }
  };
  with_type(packing.dtype, [&](auto type) {
    if (packing.source_dtype == DType::kFloat32)
      start(Type<float>{}, type);
    else
      start(type, type);
  });
}

void pack_vector(const VectorPacking& packing, Stream stream) {
  const Checker check("pack_vector");
  PackVectorParameters parameters;
  parameters.source = packing.source;
  parameters.output = packing.output;
  parameters.segments.count = packing.segment_count;
  std::copy(packing.channels, packing.channels + kMaxSegments, parameters.segments.channels);
  parameters.segments.padded_in = kGroup;
  const Extents extents = extents_of(parameters.segments, check);
  check.at_least(packing.length, extents.used, "length");
  check.pointer(packing.source, bytes_of(packing.source_dtype), "source");
  check.pointer(packing.output, alignof(float), "output");
  parameters.length = packing.length;
  with_type(packing.source_dtype, [&](auto type) {
    launch(pack_vector_kernel<typename decltype(type)::type>,
           divide_up(int64_t{packing.length}, int64_t{kPackingThreads}), 1, kPackingThreads, 0,
           stream, parameters);
  });
}

}  // namespace threshnet_fast::cuda
