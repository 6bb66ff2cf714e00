// grid_match: cell cosines in which each cell finds its best neighbour, or a soft choice of them, within a
// radius.
#include "cpu/grid_match.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/grid_cosine.h"
#include "ops/cuda_bridge.h"
#include "ops/tensors.h"
#if defined(XCOS_WITH_CUDA)
#include "cuda/grid_cosine.h"
#include "cuda/grid_match.h"
#endif

namespace xcos::ops {
namespace {

constexpr const char* kName = "grid_match";
constexpr const char* kBackwardName = "grid_match_backward";

struct Problem {
  Tensor a, b;
  MatchProblem match;
};

Problem checked_problem(const char* op, const Tensor& a, const Tensor& b, int64_t radius, int64_t match,
                        double temperature, bool symmetric, double eps) {
  check_features(op, a, b);
  check(radius >= 0 && radius <= kMostRadius, op, ": radius: expected 0 to ", kMostRadius, ", got ", radius);
  check(match == 0 || match == 1, op, ": match: expected 0 (best) or 1 (soft), got ", match);
  check_positive(op, "temperature", temperature);
  check_positive(op, "eps", eps);
  Problem p{readable_map(a), readable_map(b), {}};
  p.match.pair = pair_problem(p.a, p.b, eps);
  p.match.height = a.size(2);
  p.match.width = a.size(3);
  p.match.radius = static_cast<int32_t>(radius);
  p.match.match = static_cast<Match>(match);
  p.match.temperature = temperature;
  p.match.symmetric = symmetric;
  return p;
}

// A neighbourhood of one cell: either kind of match is that cell's cosine, from grid_cosine's kernels to the
// bit.
bool is_cosine(const MatchProblem& p) { return p.radius == 0; }

void run(const Problem& p, const MatchOutputs& outputs) {
  const bool cosine = is_cosine(p.match) && outputs.offsets == nullptr;
  if (p.a.is_cpu()) {
    if (cosine) return cpu::grid_cosine(p.match.pair, outputs.similarity, torch_threads);
    return cpu::grid_match(p.match, outputs, torch_threads);
  }
#if defined(XCOS_WITH_CUDA)
  const CudaScope cuda(p.a);
  check_launch(kName, cosine ? cuda::grid_cosine(p.match.pair, outputs.similarity, cuda.stream())
                             : cuda::grid_match(p.match, outputs, cuda.stream()));
#endif
}

Tensor empty_similarity(const Tensor& a) {
  return empty_like_device(a, {a.size(0), a.size(2), a.size(3)}, result_type(a.scalar_type()));
}

Tensor forward(const Tensor& a, const Tensor& b, int64_t radius, int64_t match, double temperature,
               bool symmetric, double eps) {
  const Problem p = checked_problem(kName, a, b, radius, match, temperature, symmetric, eps);
  const Tensor similarity = empty_similarity(a);
  run(p, {similarity.mutable_data_ptr(), nullptr});
  return similarity;
}

std::tuple<Tensor, Tensor> forward_offsets(const Tensor& a, const Tensor& b, int64_t radius, int64_t match,
                                           double temperature, bool symmetric, double eps) {
  const Problem p = checked_problem(kName, a, b, radius, match, temperature, symmetric, eps);
  check(p.match.match == Match::best, kName, ": match: expected 0 (best) with offsets, got ", match);
  const Tensor similarity = empty_similarity(a);
  const Tensor offsets =
      empty_like_device(a, {a.size(0), symmetric ? 2 : 1, 2, a.size(2), a.size(3)}, ScalarType::Char);
  if (is_cosine(p.match)) {
    run(p, {similarity.mutable_data_ptr(), nullptr});
    return {similarity, torch::stable::fill_(offsets, 0)};
  }
  run(p, {similarity.mutable_data_ptr(), static_cast<int8_t*>(offsets.mutable_data_ptr())});
  return {similarity, offsets};
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad_in, const Tensor& a_in, const Tensor& b_in,
                                    int64_t radius, int64_t match, double temperature, bool symmetric,
                                    double eps, bool need_a, bool need_b) {
  const Problem p = checked_problem(kBackwardName, a_in, b_in, radius, match, temperature, symmetric, eps);
  check_gradient(kBackwardName, "grad_similarity", grad_in, a_in, true);
  const Tensor grad = torch::stable::contiguous(grad_in);
  const Tensor grad_a = gradient_map(p.a, need_a), grad_b = gradient_map(p.b, need_b);
  const MutableFeatureView view_a = gradient_view(grad_a, need_a), view_b = gradient_view(grad_b, need_b);
  if (p.a.is_cpu()) {
    if (is_cosine(p.match))
      cpu::grid_cosine_backward(p.match.pair, grad.const_data_ptr(), view_a, view_b, torch_threads);
    else
      cpu::grid_match_backward(p.match, grad.const_data_ptr(), view_a, view_b, torch_threads);
    return {grad_a, grad_b};
  }
#if defined(XCOS_WITH_CUDA)
  const CudaScope cuda(p.a);
  if (is_cosine(p.match)) {
    check_launch(kBackwardName, cuda::grid_cosine_backward(p.match.pair, grad.const_data_ptr(), view_a,
                                                           view_b, cuda.stream()));
    return {grad_a, grad_b};
  }
  const int64_t bytes = cuda::grid_match_backward_workspace(p.match);
  const Tensor workspace = empty_like_device(p.a, {bytes}, ScalarType::Byte);
  check_launch(kBackwardName,
               cuda::grid_match_backward(p.match, grad.const_data_ptr(), view_a, view_b,
                                         bytes > 0 ? workspace.mutable_data_ptr() : nullptr, cuda.stream()));
#endif
  return {grad_a, grad_b};
}

}  // namespace
}  // namespace xcos::ops

STABLE_TORCH_LIBRARY_IMPL(xcos_ext, CPU, m) {
  m.impl("grid_match", TORCH_BOX(&xcos::ops::forward));
  m.impl("grid_match.offsets", TORCH_BOX(&xcos::ops::forward_offsets));
  m.impl("grid_match_backward", TORCH_BOX(&xcos::ops::backward));
}

#if defined(XCOS_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(xcos_ext, CUDA, m) {
  m.impl("grid_match", TORCH_BOX(&xcos::ops::forward));
  m.impl("grid_match.offsets", TORCH_BOX(&xcos::ops::forward_offsets));
  m.impl("grid_match_backward", TORCH_BOX(&xcos::ops::backward));
}
#endif
