// grid_cosine: S[n,h,w] = cos(a[n,:,h,w], b[n,:,h,w]) and its gradient.
#include "cpu/grid_cosine.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "ops/cuda_bridge.h"
#include "ops/tensors.h"
#if defined(XCOS_WITH_CUDA)
#include "cuda/grid_cosine.h"
#endif

namespace xcos::ops {
namespace {

constexpr const char* kName = "grid_cosine";
constexpr const char* kBackwardName = "grid_cosine_backward";

Tensor forward(const Tensor& a_in, const Tensor& b_in, double eps) {
  check_features(kName, a_in, b_in);
  check_positive(kName, "eps", eps);
  const Tensor a = readable_map(a_in), b = readable_map(b_in);
  const Tensor out = empty_like_device(a, {a.size(0), a.size(2), a.size(3)}, result_type(a.scalar_type()));
  const PairProblem problem = pair_problem(a, b, eps);
  if (a.is_cpu()) {
    cpu::grid_cosine(problem, out.mutable_data_ptr(), torch_threads);
    return out;
  }
#if defined(XCOS_WITH_CUDA)
  const CudaScope cuda(a);
  check_launch(kName, cuda::grid_cosine(problem, out.mutable_data_ptr(), cuda.stream()));
#endif
  return out;
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad_in, const Tensor& a_in, const Tensor& b_in, double eps,
                                    bool need_a, bool need_b) {
  check_features(kBackwardName, a_in, b_in);
  check_positive(kBackwardName, "eps", eps);
  check_gradient(kBackwardName, "grad_similarity", grad_in, a_in, true);
  const Tensor a = readable_map(a_in), b = readable_map(b_in);
  const Tensor grad = torch::stable::contiguous(grad_in);
  const Tensor grad_a = gradient_map(a, need_a), grad_b = gradient_map(b, need_b);
  const PairProblem problem = pair_problem(a, b, eps);
  const MutableFeatureView view_a = gradient_view(grad_a, need_a), view_b = gradient_view(grad_b, need_b);
  if (a.is_cpu()) {
    cpu::grid_cosine_backward(problem, grad.const_data_ptr(), view_a, view_b, torch_threads);
    return {grad_a, grad_b};
  }
#if defined(XCOS_WITH_CUDA)
  const CudaScope cuda(a);
  check_launch(kBackwardName,
               cuda::grid_cosine_backward(problem, grad.const_data_ptr(), view_a, view_b, cuda.stream()));
#endif
  return {grad_a, grad_b};
}

}  // namespace
}  // namespace xcos::ops

STABLE_TORCH_LIBRARY_IMPL(xcos_ext, CPU, m) {
  m.impl("grid_cosine", TORCH_BOX(&xcos::ops::forward));
  m.impl("grid_cosine_backward", TORCH_BOX(&xcos::ops::backward));
}

#if defined(XCOS_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(xcos_ext, CUDA, m) {
  m.impl("grid_cosine", TORCH_BOX(&xcos::ops::forward));
  m.impl("grid_cosine_backward", TORCH_BOX(&xcos::ops::backward));
}
#endif
