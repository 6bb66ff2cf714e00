// Learned attention and score of pairs, from grid features, on the GPU. Needs no CUDA headers; see
// core/xcos_head.h for what is computed, and xcos_score.h for what holds for every launcher.
#pragma once

#include "core/xcos_head.h"
#include "cuda/runtime.h"

namespace xcos::cuda {

// Outputs are fp32. One launch, no workspace.
Status xcos_head(const HeadProblem& problem, const XcosScoreOutputs& outputs, Stream stream);

}  // namespace xcos::cuda
