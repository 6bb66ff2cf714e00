// How a CPU kernel asks its caller for threads, without knowing whose threads they are.
#pragma once

#include <cstdint>

namespace xcos {

using RangeFunction = void (*)(int64_t begin, int64_t end, void* context);

// Calls function(begin', end', context) over a partition of [begin, end), pieces of at least grain, and
// waits.
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain, RangeFunction function,
                             void* context);

}  // namespace xcos
