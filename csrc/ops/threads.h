// CPU threads are torch's own, so torch.set_num_threads governs every kernel.
#pragma once

#include <torch/csrc/stable/c/shim.h>

#include <stdexcept>

#include "core/parallel.h"

namespace xcos::ops {

inline void torch_threads(int64_t begin, int64_t end, int64_t grain, RangeFunction function, void* context) {
  if (torch_parallel_for(begin, end, grain, function, context) != 0)
    throw std::runtime_error("xcos_ext: a parallel loop failed in a worker thread");
}

}  // namespace xcos::ops
