// Learned attention and score of pairs, from grid features, on the CPU. See core/xcos_head.h.
#pragma once

#include "core/parallel.h"
#include "core/xcos_head.h"
#include "cpu/isa.h"

namespace xcos::cpu {

// Outputs are fp32.
XCOS_CPU_KERNEL(xcos_head, (const HeadProblem&, const XcosScoreOutputs&, ParallelFor))

}  // namespace xcos::cpu
