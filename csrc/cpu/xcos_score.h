// Cell cosines, attention and score of N pairs, and their gradients, on the CPU.
#pragma once

#include "core/parallel.h"
#include "core/xcos_score.h"
#include "cpu/isa.h"

namespace xcos::cpu {

XCOS_CPU_KERNEL(xcos_score, (const PairProblem&, const XcosScoreOutputs&, ParallelFor))
XCOS_CPU_KERNEL(xcos_score_backward,
                (const PairProblem&, const XcosScoreGradients&, const XcosScoreGradientOutputs&, ParallelFor))

}  // namespace xcos::cpu
