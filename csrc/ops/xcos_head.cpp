// xcos_head: learned attention and score of pairs of grid features, in evaluation mode.
#include "cpu/xcos_head.h"

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "ops/cuda_bridge.h"
#include "ops/tensors.h"
#if defined(XCOS_WITH_CUDA)
#include "cuda/xcos_head.h"
#endif

namespace xcos::ops {
namespace {

constexpr const char* kName = "xcos_head";

// What the list of parameters holds, in this order; with `residual` it ends after last_bias.
constexpr const char* kParameterNames[] = {
    "embed_weight",        "embed_bias",       "embed_norm_weight",   "embed_norm_bias", "embed_norm_mean",
    "embed_norm_variance", "embed_slope",      "first_weight",        "first_bias",      "first_norm_weight",
    "first_norm_bias",     "first_norm_mean",  "first_norm_variance", "first_slope",     "last_weight",
    "last_bias",           "last_norm_weight", "last_norm_bias",      "last_norm_mean",  "last_norm_variance",
    "last_slope"};
constexpr size_t kLayerParameters = 7;
constexpr size_t kParameters = 3 * kLayerParameters;
constexpr size_t kResidualParameters = 2 * kLayerParameters + 2;

bool is_head_type(ScalarType type) { return is_floating(type) && type != ScalarType::Double; }

bool on_same_device(const Tensor& t, const Tensor& a) {
  if (t.is_cpu() && a.is_cpu()) return true;
  return device_string(t) == device_string(a);
}

void check_parameters(const std::vector<Tensor>& parameters, const Tensor& a, bool residual) {
  const size_t count = residual ? kResidualParameters : kParameters;
  check(parameters.size() == count, kName, ": parameters: expected ", count, " tensors ",
        residual ? "with" : "without", " residual, got ", parameters.size());
  const int64_t inputs[] = {a.size(1), 2 * kHeadHidden, kHeadHidden};
  const int64_t outputs[] = {kHeadHidden, kHeadHidden, 1};
  const ScalarType type = parameters[0].scalar_type();
  for (size_t i = 0; i < count; ++i) {
    const Tensor& t = parameters[i];
    const size_t layer = i / kLayerParameters, place = i % kLayerParameters;
    const int64_t size = place == kLayerParameters - 1 ? 1 : outputs[layer];
    const bool fits = place == 0 ? t.dim() == 4 && t.size(0) == outputs[layer] &&
                                       t.size(1) == inputs[layer] && t.size(2) == 3 && t.size(3) == 3
                                 : t.dim() == 1 && t.size(0) == size;
    // Messages are put together only where one is due: 21 of them would take longer than a pair.
    if (fits && t.scalar_type() == type && is_head_type(type) && on_same_device(t, a)) continue;
    const char* name = kParameterNames[i];
    if (place == 0)
      check(fits, kName, ": ", name, ": expected shape [", outputs[layer], ", ", inputs[layer],
            ", 3, 3], got ", shape_string(t));
    else
      check(fits, kName, ": ", name, ": expected shape [", size, "], got ", shape_string(t));
    check(is_head_type(type), kName, ": ", name, ": expected dtype float16, bfloat16 or float32, got ",
          dtype_name(type));
    check(t.scalar_type() == type, kName, ": ", name, ": expected dtype ", dtype_name(type),
          " like embed_weight, got ", dtype_name(t.scalar_type()));
    check(false, kName, ": ", name, ": expected device ", device_string(a), " like a, got ",
          device_string(t));
  }
}

struct Problem {
  Tensor a, b;
  std::vector<Tensor> parameters;
  HeadProblem head;
};

const void* vector_data(Tensor& t) {
  if (t.size(0) > 1 && t.stride(0) != 1) t = torch::stable::contiguous(t);
  return t.const_data_ptr();
}

HeadLayer head_layer(Problem& p, size_t layer, double norm_eps, bool norm) {
  Tensor* t = p.parameters.data() + layer * kLayerParameters;
  HeadLayer out{};
  out.weight = t[0].const_data_ptr();
  for (int64_t d = 0; d < 4; ++d) out.weight_strides[d] = t[0].stride(d);
  out.bias = vector_data(t[1]);
  if (!norm) return out;
  out.norm_weight = vector_data(t[2]);
  out.norm_bias = vector_data(t[3]);
  out.norm_mean = vector_data(t[4]);
  out.norm_variance = vector_data(t[5]);
  out.norm_eps = norm_eps;
  out.slope = vector_data(t[6]);
  return out;
}

Problem checked_problem(const Tensor& a, const Tensor& b, std::vector<Tensor>& parameters,
                        const std::vector<double>& norm_eps, double temperature, bool symmetric,
                        bool residual, double eps) {
  check_features(kName, a, b);
  check(is_head_type(a.scalar_type()), kName, ": a: expected dtype float16, bfloat16 or float32, got ",
        dtype_name(a.scalar_type()));
  // The bounds come first: they keep the product from overflowing.
  check(a.size(2) <= kHeadMostCells && a.size(3) <= kHeadMostCells && a.size(2) * a.size(3) <= kHeadMostCells,
        kName, ": a: expected at most ", kHeadMostCells, " cells, got shape ", shape_string(a));
  check_parameters(parameters, a, residual);
  check(norm_eps.size() == (residual ? 2 : 3), kName, ": norm_eps: expected ", residual ? 2 : 3,
        " numbers, got ", norm_eps.size());
  for (const double value : norm_eps)
    check(std::isfinite(value) && value >= 0, kName, ": norm_eps: expected finite numbers, 0 or more, got ",
          number_string(value));
  check_positive(kName, "temperature", temperature);
  check_positive(kName, "eps", eps);
  Problem p{readable_map(a), readable_map(b), std::move(parameters), {}};
  HeadProblem& h = p.head;
  h.pair = pair_problem(p.a, p.b, eps);
  h.pair.temperature = temperature;
  h.height = a.size(2);
  h.width = a.size(3);
  h.parameters = to_scalar(p.parameters[0].scalar_type());
  h.embed = head_layer(p, 0, norm_eps[0], true);
  h.first = head_layer(p, 1, norm_eps[1], true);
  h.last = head_layer(p, 2, residual ? 0.0 : norm_eps[2], !residual);
  h.symmetric = symmetric;
  h.residual = residual;
  return p;
}

void run(const Problem& p, const XcosScoreOutputs& outputs) {
  if (p.a.is_cpu()) return cpu::xcos_head(p.head, outputs, torch_threads);
#if defined(XCOS_WITH_CUDA)
  const CudaScope cuda(p.a);
  check_launch(kName, cuda::xcos_head(p.head, outputs, cuda.stream()));
#endif
}

Tensor forward(const Tensor& a, const Tensor& b, std::vector<Tensor> parameters, std::vector<double> norm_eps,
               double temperature, bool symmetric, bool residual, double eps) {
  const Problem p = checked_problem(a, b, parameters, norm_eps, temperature, symmetric, residual, eps);
  const Tensor score = empty_like_device(a, {a.size(0)}, ScalarType::Float);
  run(p, {score.mutable_data_ptr(), nullptr, nullptr});
  return score;
}

std::tuple<Tensor, Tensor, Tensor> forward_maps(const Tensor& a, const Tensor& b,
                                                std::vector<Tensor> parameters, std::vector<double> norm_eps,
                                                double temperature, bool symmetric, bool residual,
                                                double eps) {
  const Problem p = checked_problem(a, b, parameters, norm_eps, temperature, symmetric, residual, eps);
  const Tensor score = empty_like_device(a, {a.size(0)}, ScalarType::Float);
  const Tensor similarity = empty_like_device(a, {a.size(0), a.size(2), a.size(3)}, ScalarType::Float);
  const Tensor attention = empty_like_device(a, {a.size(0), a.size(2), a.size(3)}, ScalarType::Float);
  run(p, {score.mutable_data_ptr(), similarity.mutable_data_ptr(), attention.mutable_data_ptr()});
  return {score, similarity, attention};
}

}  // namespace
}  // namespace xcos::ops

STABLE_TORCH_LIBRARY_IMPL(xcos_ext, CPU, m) {
  m.impl("xcos_head", TORCH_BOX(&xcos::ops::forward));
  m.impl("xcos_head.maps", TORCH_BOX(&xcos::ops::forward_maps));
}

#if defined(XCOS_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(xcos_ext, CUDA, m) {
  m.impl("xcos_head", TORCH_BOX(&xcos::ops::forward));
  m.impl("xcos_head.maps", TORCH_BOX(&xcos::ops::forward_maps));
}
#endif
