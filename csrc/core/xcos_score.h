// Parameters of the pair operators. CPU and CUDA kernels take the same structs, so that a caller fills one
// once.
#pragma once

#include "core/types.h"

namespace xcos {

// What decides cell cosines, attention and score of N pairs; common to forward and backward.
struct PairProblem {
  PairShape shape;
  Scalar scalar;  // of a and b
  FeatureView a;
  FeatureView b;
  Attention mode;
  AttentionView attention;
  double temperature;  // > 0; divides the logits
  double eps;          // > 0; lower bound of a cell's norm
};

// Norm attention: W_i = q_i / sum q with q_i = |a_i||b_i| (not clamped); a pair without any signal (sum q ==
// 0) gets uniform W and no gradient through W.
//
// score[n] = sum_i W[n,i] S[n,i]. Outputs are dense, of result_scalar(problem.scalar); null ones are skipped.
struct XcosScoreOutputs {
  void* score;       // [pairs]
  void* similarity;  // [pairs, cells]: S
  void* attention;   // [pairs, cells]: W
};

// Incoming gradients, of result_scalar; null means zero.
struct XcosScoreGradients {
  const void* score;  // [pairs], element stride score_stride (0 for an expanded scalar)
  int64_t score_stride;
  const void* similarity;  // [pairs, cells], dense
  const void* attention;   // [pairs, cells], dense
};

// Outgoing gradients. a and b are of problem.scalar, attention of result_scalar, [pairs, cells], dense, one
// row a pair even when the attention is shared (the caller adds the rows up); null ones are skipped.
struct XcosScoreGradientOutputs {
  MutableFeatureView a;
  MutableFeatureView b;
  void* attention;
};

}  // namespace xcos
