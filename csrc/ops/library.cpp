// The operators' schemas, all in one place: the registration order of separate files is not defined.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(xcos_ext, m) {
  m.def("grid_cosine(Tensor a, Tensor b, float eps) -> Tensor");
  m.def(
      "grid_cosine_backward(Tensor grad_similarity, Tensor a, Tensor b, float eps, bool need_a, bool need_b) "
      "-> (Tensor, "
      "Tensor)");
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
}
