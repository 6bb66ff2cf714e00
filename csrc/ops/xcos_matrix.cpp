// xcos_matrix: scores of all pairs of probes and gallery faces with learned attention, and their gradient.
#include "cpu/xcos_matrix.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "ops/cuda_bridge.h"
#include "ops/tensors.h"
#if defined(XCOS_WITH_CUDA)
#include "cuda/xcos_matrix.h"
#endif

namespace xcos::ops {
namespace {

constexpr const char* kName = "xcos_matrix";
constexpr const char* kBackwardName = "xcos_matrix_backward";

void check_shape(const char* op, const char* name, const Tensor& t, std::initializer_list<int64_t> sizes) {
  bool same = t.dim() == static_cast<int64_t>(sizes.size());
  std::string wanted = "[";
  for (size_t i = 0; i < sizes.size(); ++i) {
    const int64_t size = *(sizes.begin() + i);
    wanted += (i ? ", " : "") + std::to_string(size);
    same = same && t.size(static_cast<int64_t>(i)) == size;
  }
  check(same, op, ": ", name, ": expected shape ", wanted, "], got ", shape_string(t));
}

void check_like(const char* op, const char* name, const Tensor& t, ScalarType type, const Tensor& first) {
  check(t.scalar_type() == type, op, ": ", name, ": expected dtype ", dtype_name(type), ", got ",
        dtype_name(t.scalar_type()));
  check(device_string(t) == device_string(first), op, ": ", name, ": expected device ", device_string(first),
        " like probe_features, got ", device_string(t));
}

struct Side {
  Tensor features, projection, bias;
  TemplateView view() const {
    return {features.size(0),     features.const_data_ptr(), features.stride(0), projection.const_data_ptr(),
            projection.stride(0), bias.const_data_ptr(),     bias.stride(0)};
  }
};

struct Problem {
  Side probes, gallery;
  Tensor weight, slope;
  MatrixProblem matrix;
};

Problem checked(const char* op, const Tensor& probe_features, const Tensor& probe_projection,
                const Tensor& probe_bias, const Tensor& gallery_features, const Tensor& gallery_projection,
                const Tensor& gallery_bias, const Tensor& weight, const Tensor& slope, int64_t height,
                int64_t width, int64_t normalize, double temperature) {
  const Tensor& first = probe_features;
  check(first.dim() == 3, op, ": probe_features: expected shape [P, cells, C], got ", shape_string(first));
  check_dtype(op, "probe_features", first);
  check(height >= 1 && width >= 1 && first.size(1) == height * width && first.size(2) >= 1, op,
        ": probe_features: expected shape [P, ", height * width, ", C] for a grid of ", height, " x ", width,
        ", got ", shape_string(first));
  check(probe_projection.dim() == 4 && (probe_projection.size(1) == 1 || probe_projection.size(1) == 2) &&
            probe_projection.size(2) >= 1,
        op, ": probe_projection: expected shape [P, 1 or 2, hidden, cells], got ",
        shape_string(probe_projection));
  const ScalarType type = first.scalar_type(), wide = result_type(type);
  const int64_t cells = first.size(1), orders = probe_projection.size(1), hidden = probe_projection.size(2);
  const auto check_side = [&](const char* features_name, const Tensor& features, const char* projection_name,
                              const Tensor& projection, const char* bias_name, const Tensor& bias) {
    const int64_t faces = features.dim() > 0 ? features.size(0) : 0;
    check_shape(op, features_name, features, {faces, cells, first.size(2)});
    check_shape(op, projection_name, projection, {faces, orders, hidden, cells});
    check_shape(op, bias_name, bias, {faces, orders, cells});
    check_like(op, features_name, features, type, first);
    check_like(op, projection_name, projection, type, first);
    check_like(op, bias_name, bias, wide, first);
  };
  check_side("probe_features", probe_features, "probe_projection", probe_projection, "probe_bias",
             probe_bias);
  check_side("gallery_features", gallery_features, "gallery_projection", gallery_projection, "gallery_bias",
             gallery_bias);
  check_shape(op, "weight", weight, {hidden, 3, 3});
  check_shape(op, "slope", slope, {1});
  check_like(op, "weight", weight, wide, first);
  check_like(op, "slope", slope, wide, first);
  check(normalize == 0 || normalize == 1, op, ": normalize: expected 0 (softmax) or 1 (min-shift), got ",
        normalize);
  check_positive(op, "temperature", temperature);

  Problem p{{dense_faces(probe_features), dense_faces(probe_projection), dense_faces(probe_bias)},
            {dense_faces(gallery_features), dense_faces(gallery_projection), dense_faces(gallery_bias)},
            torch::stable::contiguous(weight),
            slope,
            {}};
  MatrixProblem& m = p.matrix;
  m.channels = first.size(2);
  m.hidden = hidden;
  m.height = height;
  m.width = width;
  m.orders = orders;
  m.scalar = to_scalar(type);
  m.probes = p.probes.view();
  m.gallery = p.gallery.view();
  m.weight = p.weight.const_data_ptr();
  m.slope = p.slope.const_data_ptr();
  m.temperature = temperature;
  m.normalize = static_cast<Normalize>(normalize);
  return p;
}

Tensor forward(const Tensor& probe_features, const Tensor& probe_projection, const Tensor& probe_bias,
               const Tensor& gallery_features, const Tensor& gallery_projection, const Tensor& gallery_bias,
               const Tensor& weight, const Tensor& slope, int64_t height, int64_t width, int64_t normalize,
               double temperature) {
  const Problem p =
      checked(kName, probe_features, probe_projection, probe_bias, gallery_features, gallery_projection,
              gallery_bias, weight, slope, height, width, normalize, temperature);
  const Tensor scores = empty_like_device(probe_features, {probe_features.size(0), gallery_features.size(0)},
                                          result_type(probe_features.scalar_type()));
  if (scores.is_cpu()) {
    cpu::xcos_matrix(p.matrix, scores.mutable_data_ptr(), torch_threads);
    return scores;
  }
#if defined(XCOS_WITH_CUDA)
  const CudaScope cuda(probe_features);
  check_launch(kName, cuda::xcos_matrix(p.matrix, scores.mutable_data_ptr(), cuda.stream()));
#endif
  return scores;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// A dense tensor shaped like t, or of size 0 where its gradient is not wanted.
Tensor gradient_like(const Tensor& t, bool needed) {
  if (!needed) return empty_like_device(t, {0}, t.scalar_type());
  switch (t.dim()) {
    case 1:
      return empty_like_device(t, {t.size(0)}, t.scalar_type());
    case 3:
      return empty_like_device(t, {t.size(0), t.size(1), t.size(2)}, t.scalar_type());
    default:
      return empty_like_device(t, {t.size(0), t.size(1), t.size(2), t.size(3)}, t.scalar_type());
  }
}

Gradients backward(const Tensor& grad_in, const Tensor& probe_features, const Tensor& probe_projection,
                   const Tensor& probe_bias, const Tensor& gallery_features, const Tensor& gallery_projection,
                   const Tensor& gallery_bias, const Tensor& weight, const Tensor& slope, int64_t height,
                   int64_t width, int64_t normalize, double temperature, int64_t need_mask) {
  const Problem p =
      checked(kBackwardName, probe_features, probe_projection, probe_bias, gallery_features,
              gallery_projection, gallery_bias, weight, slope, height, width, normalize, temperature);
  check_shape(kBackwardName, "grad", grad_in, {probe_features.size(0), gallery_features.size(0)});
  check_like(kBackwardName, "grad", grad_in, result_type(probe_features.scalar_type()), probe_features);
  const Tensor grad = torch::stable::contiguous(grad_in);
  const Tensor* inputs[] = {&probe_features,     &probe_projection, &probe_bias, &gallery_features,
                            &gallery_projection, &gallery_bias,     &weight,     &slope};
  const auto output = [&](int i) { return gradient_like(*inputs[i], (need_mask >> i & 1) != 0); };
  const Gradients out{output(0), output(1), output(2), output(3), output(4), output(5), output(6), output(7)};
  const auto data = [&](const Tensor& t, int i) {
    return (need_mask >> i & 1) != 0 ? t.mutable_data_ptr() : nullptr;
  };
  const MatrixGradients gradients{
      grad.const_data_ptr(),     data(std::get<0>(out), 0), data(std::get<1>(out), 1),
      data(std::get<2>(out), 2), data(std::get<3>(out), 3), data(std::get<4>(out), 4),
      data(std::get<5>(out), 5), data(std::get<6>(out), 6), data(std::get<7>(out), 7)};
  if (grad.is_cpu()) {
    cpu::xcos_matrix_backward(p.matrix, gradients, torch_threads);
    return out;
  }
#if defined(XCOS_WITH_CUDA)
  const CudaScope cuda(probe_features);
  const int64_t bytes = cuda::xcos_matrix_backward_workspace(p.matrix, gradients);
  const Tensor workspace = empty_like_device(probe_features, {bytes}, ScalarType::Byte);
  check_launch(kBackwardName,
               cuda::xcos_matrix_backward(p.matrix, gradients,
                                          bytes > 0 ? workspace.mutable_data_ptr() : nullptr, cuda.stream()));
#endif
  return out;
}

}  // namespace
}  // namespace xcos::ops

STABLE_TORCH_LIBRARY_IMPL(xcos_ext, CPU, m) {
  m.impl("xcos_matrix", TORCH_BOX(&xcos::ops::forward));
  m.impl("xcos_matrix_backward", TORCH_BOX(&xcos::ops::backward));
}

#if defined(XCOS_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(xcos_ext, CUDA, m) {
  m.impl("xcos_matrix", TORCH_BOX(&xcos::ops::forward));
  m.impl("xcos_matrix_backward", TORCH_BOX(&xcos::ops::backward));
}
#endif
