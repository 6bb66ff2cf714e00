#include "cuda/grid_cosine.h"
#include "cuda/xcos_score.h"

namespace xcos::cuda {
namespace {

// Cell cosines are the pair operator with nothing asked for but S: the same kernels, no code of their own.
PairProblem without_attention(PairProblem problem) {
  problem.mode = Attention::uniform;
  problem.attention = {};
  problem.temperature = 1.0;
  return problem;
}

}  // namespace

Status grid_cosine(const PairProblem& problem, void* similarity, Stream stream) {
  XcosScoreOutputs outputs = {};
  outputs.similarity = similarity;
  return xcos_score(without_attention(problem), outputs, stream);
}

Status grid_cosine_backward(const PairProblem& problem, const void* grad_similarity,
                            MutableFeatureView grad_a, MutableFeatureView grad_b, Stream stream) {
  XcosScoreGradients gradients = {};
  gradients.similarity = grad_similarity;
  XcosScoreGradientOutputs outputs = {};
  outputs.a = grad_a;
  outputs.b = grad_b;
  return xcos_score_backward(without_attention(problem), gradients, outputs, stream);
}

}  // namespace xcos::cuda
