// Scores of all pairs of P probes and G gallery faces, and their gradients, on the CPU.
#pragma once

#include "core/parallel.h"
#include "core/xcos_matrix.h"
#include "cpu/isa.h"

namespace xcos::cpu {

// scores: [probes, gallery], dense, of result_scalar(problem.scalar).
XCOS_CPU_KERNEL(xcos_matrix, (const MatrixProblem&, void* scores, ParallelFor))
XCOS_CPU_KERNEL(xcos_matrix_backward, (const MatrixProblem&, const MatrixGradients&, ParallelFor))

}  // namespace xcos::cpu
