// Cell cosines of pairs on the GPU. Needs no CUDA headers; see xcos_score.h for what holds for every
// launcher.
#pragma once

#include "core/xcos_score.h"
#include "cuda/runtime.h"

namespace xcos::cuda {

// similarity: [pairs, cells], dense, of result_scalar(problem.scalar). The problem's attention is not looked
// at.
Status grid_cosine(const PairProblem& problem, void* similarity, Stream stream);

// grad_similarity: [pairs, cells], dense, of result_scalar. Views whose data is null are skipped.
Status grid_cosine_backward(const PairProblem& problem, const void* grad_similarity,
                            MutableFeatureView grad_a, MutableFeatureView grad_b, Stream stream);

}  // namespace xcos::cuda
