// xCos score of pairs on the GPU. Needs no CUDA headers.
//
// Every function enqueues one kernel on the stream and returns: no synchronisation, no allocation, capturable
// in a CUDA graph. Pointers are device pointers of the current device; any alignment that suits the element
// type, any strides, more than 2^31 elements. Results do not depend on timing: the same input gives the same
// bits.
#pragma once

#include "core/xcos_score.h"
#include "cuda/runtime.h"

namespace xcos::cuda {

Status xcos_score(const PairProblem& problem, const XcosScoreOutputs& outputs, Stream stream);

// Recomputes what it needs from the features; nothing is saved by the forward pass.
Status xcos_score_backward(const PairProblem& problem, const XcosScoreGradients& gradients,
                           const XcosScoreGradientOutputs& outputs, Stream stream);

}  // namespace xcos::cuda
