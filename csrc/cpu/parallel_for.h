// How the engine is given threads. Free of torch.
#pragma once

#include <cstdint>

namespace threshnet_fast::cpu {

// body(context, begin, end) over disjoint ranges that cover [0, count), perhaps in parallel.
using ParallelFor = void (*)(int64_t count, void (*body)(void* context, int64_t begin, int64_t end),
                             void* context);

}  // namespace threshnet_fast::cpu
