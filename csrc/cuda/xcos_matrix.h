// All pairs of two sets of faces on the GPU, with learned attention. Needs no CUDA headers.
//
// Every function enqueues its kernels on the stream and returns: no synchronisation, no allocation,
// capturable in a CUDA graph. Pointers are device pointers of the current device; any alignment that suits
// the element type, any stride from face to face, more than 2^31 pairs. Results do not depend on timing: the
// same input gives the same bits.
#pragma once

#include "core/xcos_matrix.h"
#include "cuda/runtime.h"

namespace xcos::cuda {

// scores: [probes, gallery], dense, of result_scalar.
Status xcos_matrix(const MatrixProblem& problem, void* scores, Stream stream);

// Bytes of device memory that xcos_matrix_backward needs besides its outputs; host arithmetic only. May be 0.
int64_t xcos_matrix_backward_workspace(const MatrixProblem& problem, const MatrixGradients& gradients);

// Recomputes what it needs; nothing is saved by the forward pass, and nothing of the size of pairs times
// cells is written. workspace: as many bytes as the function above says, 16-byte aligned, contents of no
// matter; may be null where that is 0. Without pairs the gradients that are wanted are filled with zeros.
Status xcos_matrix_backward(const MatrixProblem& problem, const MatrixGradients& gradients, void* workspace,
                            Stream stream);

}  // namespace xcos::cuda
