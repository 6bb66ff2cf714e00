// xcos_score: score[n] = sum_i W[n,i] S[n,i], with the maps on request, and the gradient of all three.
#include "cpu/xcos_score.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "ops/cuda_bridge.h"
#include "ops/tensors.h"
#if defined(XCOS_WITH_CUDA)
#include "cuda/xcos_score.h"
#endif

namespace xcos::ops {
namespace {

constexpr const char* kName = "xcos_score";
constexpr const char* kBackwardName = "xcos_score_backward";

Attention check_mode(const char* op, int64_t mode) {
  check(mode >= 0 && mode <= 3, op, ": mode: expected 0 (uniform), 1 (norm), 2 (weights) or 3 (logits), got ",
        mode);
  return static_cast<Attention>(mode);
}

void check_attention(const char* op, const std::optional<Tensor>& attention, Attention mode,
                     const Tensor& a) {
  const bool given = mode == Attention::weights || mode == Attention::logits;
  check(attention.has_value() == given, op, ": attention: expected ", given ? "a tensor" : "None",
        " for this mode, got ", attention.has_value() ? "a tensor" : "None");
  if (!given) return;
  const Tensor& w = *attention;
  const int64_t d = w.dim();
  const bool shape = (d == 2 || d == 3) && w.size(d - 2) == a.size(2) && w.size(d - 1) == a.size(3) &&
                     (d == 2 || w.size(0) == a.size(0));
  const std::string map = std::to_string(a.size(2)) + ", " + std::to_string(a.size(3)) + "]";
  check(shape, op, ": attention: expected shape [", map, " or [", a.size(0), ", ", map, ", got ",
        shape_string(w));
  check_dtype(op, "attention", w);
  check(device_string(w) == device_string(a), op, ": attention: expected device ", device_string(a),
        " like a, got ", device_string(w));
}

// Kernels read the cells of a pair side by side.
Tensor readable_attention(const Tensor& w) {
  const int64_t d = w.dim();
  const bool adjacent = (w.size(d - 1) == 1 || w.stride(d - 1) == 1) &&
                        (w.size(d - 2) == 1 || w.stride(d - 2) == w.size(d - 1));
  return adjacent ? w : torch::stable::contiguous(w);
}

AttentionView attention_view(const Tensor& w) {
  return {w.const_data_ptr(), to_scalar(w.scalar_type()), w.dim() == 3 ? w.stride(0) : 0};
}

struct Problem {
  Tensor a, b;
  std::optional<Tensor> attention;
  PairProblem pair;
};

Problem checked_problem(const char* op, const Tensor& a, const Tensor& b,
                        const std::optional<Tensor>& attention, int64_t mode_value, double temperature,
                        double eps) {
  check_features(op, a, b);
  const Attention mode = check_mode(op, mode_value);
  check_attention(op, attention, mode, a);
  check_positive(op, "temperature", temperature);
  check_positive(op, "eps", eps);
  Problem p{readable_map(a), readable_map(b), std::nullopt, {}};
  p.pair = pair_problem(p.a, p.b, eps);
  p.pair.mode = mode;
  p.pair.temperature = temperature;
  if (attention.has_value()) {
    p.attention = readable_attention(*attention);
    p.pair.attention = attention_view(*p.attention);
  }
  return p;
}

void run(const Problem& p, const XcosScoreOutputs& outputs) {
  if (p.a.is_cpu()) return cpu::xcos_score(p.pair, outputs, torch_threads);
#if defined(XCOS_WITH_CUDA)
  const CudaScope cuda(p.a);
  check_launch(kName, cuda::xcos_score(p.pair, outputs, cuda.stream()));
#endif
}

Tensor forward(const Tensor& a, const Tensor& b, const std::optional<Tensor>& attention, int64_t mode,
               double temperature, double eps) {
  const Problem p = checked_problem(kName, a, b, attention, mode, temperature, eps);
  const Tensor score = empty_like_device(a, {a.size(0)}, result_type(a.scalar_type()));
  run(p, {score.mutable_data_ptr(), nullptr, nullptr});
  return score;
}

std::tuple<Tensor, Tensor, Tensor> forward_maps(const Tensor& a, const Tensor& b,
                                                const std::optional<Tensor>& attention, int64_t mode,
                                                double temperature, double eps) {
  const Problem p = checked_problem(kName, a, b, attention, mode, temperature, eps);
  const ScalarType type = result_type(a.scalar_type());
  const Tensor score = empty_like_device(a, {a.size(0)}, type);
  const Tensor similarity = empty_like_device(a, {a.size(0), a.size(2), a.size(3)}, type);
  const Tensor weights = empty_like_device(a, {a.size(0), a.size(2), a.size(3)}, type);
  run(p, {score.mutable_data_ptr(), similarity.mutable_data_ptr(), weights.mutable_data_ptr()});
  return {score, similarity, weights};
}

Tensor cast(const Tensor& t, ScalarType type) {
  return torch::stable::to(t, type, std::nullopt, std::nullopt, std::nullopt, false, false, std::nullopt);
}

const void* dense_gradient(const char* name, const std::optional<Tensor>& grad, const Tensor& a,
                           Tensor& keep) {
  if (!grad.has_value()) return nullptr;
  check_gradient(kBackwardName, name, *grad, a, true);
  keep = torch::stable::contiguous(*grad);
  return keep.const_data_ptr();
}

std::tuple<Tensor, Tensor, Tensor> backward(const std::optional<Tensor>& grad_score,
                                            const std::optional<Tensor>& grad_similarity,
                                            const std::optional<Tensor>& grad_attention, const Tensor& a,
                                            const Tensor& b, const std::optional<Tensor>& attention,
                                            int64_t mode, double temperature, double eps, bool need_a,
                                            bool need_b, bool need_attention) {
  const Problem p = checked_problem(kBackwardName, a, b, attention, mode, temperature, eps);
  XcosScoreGradients in{nullptr, 0, nullptr, nullptr};
  Tensor keep_similarity = a, keep_attention = a;
  if (grad_score.has_value()) {
    check_gradient(kBackwardName, "grad_score", *grad_score, a, false);
    in.score = grad_score->const_data_ptr();
    in.score_stride = grad_score->stride(0);
  }
  in.similarity = dense_gradient("grad_similarity", grad_similarity, a, keep_similarity);
  in.attention = dense_gradient("grad_attention", grad_attention, a, keep_attention);

  need_attention = need_attention && attention.has_value();
  const Tensor grad_a = gradient_map(p.a, need_a), grad_b = gradient_map(p.b, need_b);
  const ScalarType type = result_type(a.scalar_type());
  Tensor grad_given = need_attention ? empty_like_device(a, {a.size(0), a.size(2), a.size(3)}, type)
                                     : empty_like_device(a, {0}, type);
  const XcosScoreGradientOutputs out{gradient_view(grad_a, need_a), gradient_view(grad_b, need_b),
                                     need_attention ? grad_given.mutable_data_ptr() : nullptr};
  if (a.is_cpu()) {
    cpu::xcos_score_backward(p.pair, in, out, torch_threads);
  } else {
#if defined(XCOS_WITH_CUDA)
    const CudaScope cuda(a);
    check_launch(kBackwardName, cuda::xcos_score_backward(p.pair, in, out, cuda.stream()));
#endif
  }
  if (need_attention) {
    // A map shared by all pairs gets the sum over them.
    if (attention->dim() == 2) {
      const int64_t pairs[] = {0};
      grad_given =
          torch::stable::sum(grad_given, torch::headeronly::IntHeaderOnlyArrayRef(pairs, 1), false, type);
    }
    if (attention->scalar_type() != type) grad_given = cast(grad_given, attention->scalar_type());
  }
  return {grad_a, grad_b, grad_given};
}

}  // namespace
}  // namespace xcos::ops

STABLE_TORCH_LIBRARY_IMPL(xcos_ext, CPU, m) {
  m.impl("xcos_score", TORCH_BOX(&xcos::ops::forward));
  m.impl("xcos_score.maps", TORCH_BOX(&xcos::ops::forward_maps));
  m.impl("xcos_score_backward", TORCH_BOX(&xcos::ops::backward));
}

#if defined(XCOS_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(xcos_ext, CUDA, m) {
  m.impl("xcos_score", TORCH_BOX(&xcos::ops::forward));
  m.impl("xcos_score.maps", TORCH_BOX(&xcos::ops::forward_maps));
  m.impl("xcos_score_backward", TORCH_BOX(&xcos::ops::backward));
}
#endif
