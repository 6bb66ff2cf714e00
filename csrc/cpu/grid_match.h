// Cell cosines that tolerate misalignment, and their gradient, on the CPU. See core/grid_match.h.
#pragma once

#include "core/grid_match.h"
#include "core/parallel.h"
#include "cpu/isa.h"

namespace xcos::cpu {

XCOS_CPU_KERNEL(grid_match, (const MatchProblem&, const MatchOutputs&, ParallelFor))

// grad_similarity: [pairs, cells], dense, of result_scalar.
XCOS_CPU_KERNEL(grid_match_backward, (const MatchProblem&, const void* grad_similarity,
                                      MutableFeatureView grad_a, MutableFeatureView grad_b, ParallelFor))

}  // namespace xcos::cpu
