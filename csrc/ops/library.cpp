// The operators' schemas, all in one place: the registration order of separate files is not defined.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(xcos_ext, m) {
  m.def("grid_cosine(Tensor a, Tensor b, float eps) -> Tensor");
  m.def(
      "grid_cosine_backward(Tensor grad_similarity, Tensor a, Tensor b, float eps, bool need_a, bool need_b) "
      "-> (Tensor, "
      "Tensor)");
  m.def(
      "grid_match(Tensor a, Tensor b, int radius, int match, float temperature, bool symmetric, float eps) "
      "-> "
      "Tensor");
  m.def(
      "grid_match.offsets(Tensor a, Tensor b, int radius, int match, float temperature, bool symmetric, "
      "float "
      "eps) -> (Tensor, Tensor)");
  m.def(
      "grid_match_backward(Tensor grad_similarity, Tensor a, Tensor b, int radius, int match, float "
      "temperature, "
      "bool symmetric, float eps, bool need_a, bool need_b) -> (Tensor, Tensor)");
  m.def(
      "xcos_score(Tensor a, Tensor b, Tensor? attention, int mode, float temperature, float eps) -> Tensor");
  m.def(
      "xcos_score.maps(Tensor a, Tensor b, Tensor? attention, int mode, float temperature, float eps) -> "
      "(Tensor, "
      "Tensor, Tensor)");
  m.def(
      "xcos_score_backward(Tensor? grad_score, Tensor? grad_similarity, Tensor? grad_attention, Tensor a, "
      "Tensor b, "
      "Tensor? attention, int mode, float temperature, float eps, bool need_a, bool need_b, bool "
      "need_attention) -> "
      "(Tensor, Tensor, Tensor)");
  // parameters and norm_eps: see kParameterNames in csrc/ops/xcos_head.cpp.
  m.def(
      "xcos_head(Tensor a, Tensor b, Tensor[] parameters, float[] norm_eps, float temperature, bool "
      "symmetric, bool residual, float eps) -> Tensor");
  m.def(
      "xcos_head.maps(Tensor a, Tensor b, Tensor[] parameters, float[] norm_eps, float temperature, bool "
      "symmetric, bool residual, float eps) -> (Tensor, Tensor, Tensor)");
  // All pairs: both sides' features, projections and biases, then what all pairs share.
  m.def(
      "xcos_matrix(Tensor probe_features, Tensor probe_projection, Tensor probe_bias, Tensor "
      "gallery_features, Tensor gallery_projection, Tensor gallery_bias, Tensor weight, Tensor slope, int "
      "height, int width, int normalize, float temperature) -> Tensor");
  m.def(
      "xcos_matrix_backward(Tensor grad, Tensor probe_features, Tensor probe_projection, Tensor probe_bias, "
      "Tensor gallery_features, Tensor gallery_projection, Tensor gallery_bias, Tensor weight, Tensor slope, "
      "int height, int width, int normalize, float temperature, int need_mask) -> (Tensor, Tensor, Tensor, "
      "Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "xcos_matrix_fixed(Tensor probe_rows, Tensor gallery_features, Tensor? probe_norms, Tensor? "
      "gallery_norms) -> Tensor");
  m.def(
      "xcos_topk_update(Tensor(a!) values, Tensor(b!) indices, Tensor scores, int first_index, float "
      "min_score, Tensor? exclude_indices, Tensor? exclude_mask) -> ()");
}
