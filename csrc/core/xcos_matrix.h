// Parameters of the all-pairs operators: P probes against G gallery faces with learned, pair-dependent
// attention. CPU and CUDA kernels take the same structs.
//
// For every pair (p, g), with cells i of the H x W grid and hidden channels c:
//
//   h_o[c,i] = max(projection_p[o,c,i], projection_g[o,c,i])
//   y_o[i]   = bias_p[o,i] + bias_g[o,i] + sum_{c,k} weight[c,k] h_o[c, i+k]
//              (3x3; cells outside the grid count nothing)
//   z_o[i]   = y_o[i] > 0 ? y_o[i] : slope * y_o[i]
//   W_o      = softmax(z_o / temperature) over the cells, or
//              min-shift: (z - min z) / sum (z - min z), uniform where that sum is 0
//   S[i]     = features_p[i] . features_g[i]
//   score    = sum_i mean_o(W_o[i]) S[i]
//
// This is the attention network of xCos (arXiv 2003.05383) exactly: its first convolution is linear over the
// concatenated embeddings, so it splits into a part u of the first face and a part v of the second (batch
// norm folded in), and with a = the slope of the activation between the two convolutions
//   prelu(u + v) = a u + v + (1 - a) max(u, -v),
// of which only the maximum depends on the pair: the rest is a convolution per face, kept as its bias. The
// first face keeps u, the second -v; weight holds (1 - a) times the second convolution. Orders: 1, or 2 for
// symmetric attention, where order 1 has the faces' parts exchanged.
#pragma once

#include "core/types.h"

namespace xcos {

enum class Normalize : int32_t { softmax = 0, min_shift = 1 };

// One side's faces. A face's own values are dense; strides lead from face to face, in elements.
struct TemplateView {
  int64_t faces;         // may be 0
  const void* features;  // [faces, cells, channels], unit length per cell, of the problem's scalar
  int64_t features_stride;
  const void* projection;  // [faces, orders, hidden, cells], of the problem's scalar
  int64_t projection_stride;
  const void* bias;  // [faces, orders, cells], of result_scalar
  int64_t bias_stride;
};

struct MatrixProblem {
  int64_t channels;  // C >= 1
  int64_t hidden;    // >= 1
  int64_t height;    // >= 1
  int64_t width;     // >= 1
  int64_t orders;    // 1 or 2
  Scalar scalar;     // of features and projections
  TemplateView probes;
  TemplateView gallery;
  const void* weight;  // [hidden, 3, 3], of result_scalar, where the features live
  const void* slope;   // [1], of result_scalar, where the features live
  double temperature;  // > 0; softmax only
  Normalize normalize;
};

// Gradients of sum_{p,g} grad[p,g] score[p,g]. Outputs are dense, shaped like their inputs; null ones are not
// wanted. At a tie of the maximum the second face's part (-v) takes the gradient: the gallery's in order 0,
// the probe's in order 1; so the slope at 0 is that of torch's PReLU. Equal smallest logits share min-shift's
// gradient. At y == 0 the activation's gradient is `slope`, as torch's.
struct MatrixGradients {
  const void* grad;        // [probes, gallery], dense, of result_scalar
  void* probe_features;    // of scalar
  void* probe_projection;  // of scalar
  void* probe_bias;        // of result_scalar
  void* gallery_features;
  void* gallery_projection;
  void* gallery_bias;
  void* weight;  // of result_scalar
  void* slope;   // of result_scalar
};

// All pairs whose attention is gallery-independent: score = sum_k probe[k] gallery[k], the probe's rows
// holding the attention already. With norms: the same sum over gallery cells scaled by their norms, divided
// by sum_i probe_norms[i] gallery_norms[i]; 0 where that is 0. That is attention proportional to |a_i||b_i|.
struct FixedMatrixProblem {
  int64_t cells;
  int64_t channels;
  Scalar scalar;  // of the gallery
  int64_t probes;
  const void* probe_rows;  // [probes, cells, channels] of result_scalar, a probe's values dense
  int64_t probe_stride;
  int64_t gallery;
  const void* gallery_features;  // [gallery, cells, channels], a face's values dense
  int64_t gallery_stride;
  const void* probe_norms;  // [probes, cells], of result_scalar; null: no norms
  int64_t probe_norms_stride;
  const void* gallery_norms;  // [gallery, cells]
  int64_t gallery_norms_stride;
};

// Merges a block of scores into running top-k lists, best first. A list's order: higher score first, among
// equal scores the lower index; NaN is no candidate. Empty places hold -inf and index -1.
struct TopkUpdate {
  Scalar scalar;  // of scores and values: f32 or f64
  int64_t probes;
  int64_t count;          // columns of the block
  const void* scores;     // [probes, count]
  int64_t scores_stride;  // from probe to probe, in elements; columns are dense
  int64_t first_index;    // gallery index of column 0
  int64_t k;              // 1 .. 2048
  double min_score;       // scores below it are no candidates; -inf for none
  void* values;           // [probes, k], dense, in and out
  int64_t* indices;       // [probes, k], dense, in and out
  // Gallery indices that a probe must not get, [probes, exclude_count]; null: none.
  const int64_t* exclude_indices;
  int64_t exclude_count;
  int64_t exclude_stride;
  // True: not a candidate. Probe p's column j is at [p * exclude_mask_stride + j * exclude_mask_step]; null:
  // none.
  const bool* exclude_mask;
  int64_t exclude_mask_stride;  // 0: one mask for all probes
  int64_t exclude_mask_step;
};

}  // namespace xcos
