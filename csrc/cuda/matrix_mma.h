// The tensor-core path of xcos_matrix; its launcher decides whether a call takes it.
#pragma once

#include "core/xcos_matrix.h"
#include "cuda/runtime.h"

namespace xcos::cuda {

// Whether the path takes this problem on the current device: sm_80 or later, halves, channels and hidden
// multiples of 16, at most 8 columns, features that 16-byte copies can reach, and a tile that fits shared
// memory.
bool matrix_mma_takes(const MatrixProblem& problem);

// Both sides have faces.
Status matrix_mma(const MatrixProblem& problem, void* scores, Stream stream);

}  // namespace xcos::cuda
