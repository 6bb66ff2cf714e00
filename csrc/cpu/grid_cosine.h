// Cell cosines of N pairs, and their gradient, on the CPU. The problem's attention is not looked at.
#pragma once

#include "core/parallel.h"
#include "core/xcos_score.h"
#include "cpu/isa.h"

namespace xcos::cpu {

// similarity: [pairs, cells], dense, of result_scalar(problem.scalar).
XCOS_CPU_KERNEL(grid_cosine, (const PairProblem&, void* similarity, ParallelFor))
XCOS_CPU_KERNEL(grid_cosine_backward, (const PairProblem&, const void* grad_similarity,
                                       MutableFeatureView grad_a, MutableFeatureView grad_b, ParallelFor))

}  // namespace xcos::cpu
