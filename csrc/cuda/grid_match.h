// Cell cosines that tolerate misalignment, on the GPU. Needs no CUDA headers; see core/grid_match.h for what
// is computed, and xcos_score.h for what holds for every launcher.
#pragma once

#include "core/grid_match.h"
#include "cuda/runtime.h"

namespace xcos::cuda {

Status grid_match(const MatchProblem& problem, const MatchOutputs& outputs, Stream stream);

// Bytes of device memory that grid_match_backward needs besides its outputs; host arithmetic only. 0 for
// usual grids, at most 128 MB, or one pair's share if that is larger.
int64_t grid_match_backward_workspace(const MatchProblem& problem);

// grad_similarity: [pairs, cells], dense, of result_scalar. Views whose data is null are skipped. workspace:
// as many bytes as the function above says, 16-byte aligned, contents of no matter; may be null where that is
// 0.
Status grid_match_backward(const MatchProblem& problem, const void* grad_similarity,
                           MutableFeatureView grad_a, MutableFeatureView grad_b, void* workspace,
                           Stream stream);

}  // namespace xcos::cuda
