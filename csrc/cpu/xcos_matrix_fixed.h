// Scores of all pairs with attention that does not depend on the gallery, or on norms alone, on the CPU:
// products of rows.
#pragma once

#include "core/parallel.h"
#include "core/xcos_matrix.h"
#include "cpu/isa.h"

namespace xcos::cpu {

XCOS_CPU_KERNEL(xcos_matrix_fixed, (const FixedMatrixProblem&, void* scores, ParallelFor))

}  // namespace xcos::cpu
