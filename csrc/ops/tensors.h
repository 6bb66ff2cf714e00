// What every operator does with its tensors: name what is wrong with an argument, describe it to the kernels,
// allocate results. The messages are repeated word for word by xcos_ext/ops/_checks.py for fake tensors; a
// test compares them.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <cstdio>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "core/xcos_score.h"
#include "ops/threads.h"

namespace xcos::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// RuntimeError in Python, with nothing but the message: torch's own check macro adds source locations.
// Without streams: with g++ 13 and torch 2.11, the first number written to one ended the process.
template <typename... Parts>
void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::string text;
  const auto add = [&](const auto& part) {
    using Part = std::decay_t<decltype(part)>;
    static_assert(!std::is_floating_point_v<Part>, "number_string() writes these");
    if constexpr (std::is_integral_v<Part>) {
      text += std::to_string(part);
    } else {
      text += part;
    }
  };
  (add(parts), ...);
  throw std::runtime_error(text);
}

inline const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::ComplexDouble:
      return "complex128";
    default:
      return torch::headeronly::toString(type);
  }
}

inline std::string shape_string(const Tensor& t) {
  std::string out = "[";
  for (int64_t i = 0; i < t.dim(); ++i) out += (i ? ", " : "") + std::to_string(t.size(i));
  return out + "]";
}

inline std::string device_string(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  int32_t type = 0;
  aoti_torch_get_device_type(t.get(), &type);
  if (type == aoti_torch_device_type_meta()) return "meta";
  return (t.is_cuda() ? "cuda:" : "device:") + std::to_string(t.get_device_index());
}

inline bool is_floating(ScalarType type) {
  return type == ScalarType::Half || type == ScalarType::BFloat16 || type == ScalarType::Float ||
         type == ScalarType::Double;
}

inline Scalar to_scalar(ScalarType type) {
  switch (type) {
    case ScalarType::Half:
      return Scalar::f16;
    case ScalarType::BFloat16:
      return Scalar::bf16;
    case ScalarType::Double:
      return Scalar::f64;
    default:
      return Scalar::f32;
  }
}

inline ScalarType result_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_dtype(const char* op, const char* name, const Tensor& t) {
  const ScalarType type = t.scalar_type();
  check(is_floating(type), op, ": ", name, ": expected dtype float16, bfloat16, float32 or float64, got ",
        dtype_name(type));
}

// The features of a pair operator: two maps [N, C, H, W] of one shape, dtype and device.
inline void check_features(const char* op, const Tensor& a, const Tensor& b) {
  check(a.dim() == 4, op, ": a: expected a feature map [N, C, H, W], got shape ", shape_string(a));
  check_dtype(op, "a", a);
  check(a.size(1) > 0 && a.size(2) > 0 && a.size(3) > 0, op,
        ": a: expected at least one channel and one cell, got shape ", shape_string(a));
  bool same = b.dim() == 4;
  for (int64_t i = 0; same && i < 4; ++i) same = a.size(i) == b.size(i);
  check(same, op, ": b: expected shape ", shape_string(a), " like a, got ", shape_string(b));
  check(b.scalar_type() == a.scalar_type(), op, ": b: expected dtype ", dtype_name(a.scalar_type()),
        " like a, got ", dtype_name(b.scalar_type()));
  check(device_string(b) == device_string(a), op, ": b: expected device ", device_string(a), " like a, got ",
        device_string(b));
}

// "0.1" rather than "0.100000"; the shortest form that Python's %g gives too.
inline std::string number_string(double value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%g", value);
  return text;
}

inline void check_positive(const char* op, const char* name, double value) {
  check(std::isfinite(value) && value > 0, op, ": ", name, ": expected a finite number above 0, got ",
        number_string(value));
}

// A gradient that autograd hands back: dense, of the result's shape and dtype, on its device.
inline void check_gradient(const char* op, const char* name, const Tensor& grad, const Tensor& a,
                           bool per_cell) {
  const bool shape = per_cell ? grad.dim() == 3 && grad.size(0) == a.size(0) && grad.size(1) == a.size(2) &&
                                    grad.size(2) == a.size(3)
                              : grad.dim() == 1 && grad.size(0) == a.size(0);
  const std::string n = std::to_string(a.size(0));
  check(shape, op, ": ", name, ": expected shape ",
        per_cell ? "[" + n + ", " + std::to_string(a.size(2)) + ", " + std::to_string(a.size(3)) + "]"
                 : "[" + n + "]",
        ", got ", shape_string(grad));
  check(grad.scalar_type() == result_type(a.scalar_type()), op, ": ", name, ": expected dtype ",
        dtype_name(result_type(a.scalar_type())), ", got ", dtype_name(grad.scalar_type()));
  check(device_string(grad) == device_string(a), op, ": ", name, ": expected device ", device_string(a),
        " like a, got ", device_string(grad));
}

// Whether rows and columns of t's last two dimensions are evenly spaced, so that one cell stride describes
// them.
inline bool cells_evenly_spaced(const Tensor& t) {
  const int64_t d = t.dim();
  return t.size(d - 2) == 1 || t.size(d - 1) == 1 || t.stride(d - 2) == t.size(d - 1) * t.stride(d - 1);
}

inline int64_t cell_stride(const Tensor& t) {
  const int64_t d = t.dim();
  return t.size(d - 1) > 1 ? t.stride(d - 1) : t.size(d - 2) > 1 ? t.stride(d - 2) : 1;
}

// The map itself where kernels can read it in place (contiguous, channels_last and every other layout with
// one stride from cell to cell), else a contiguous copy.
inline Tensor readable_map(const Tensor& t) {
  return cells_evenly_spaced(t) ? t : torch::stable::contiguous(t);
}

// Templates as the all-pairs kernels read them: a face's own values side by side, faces at any distance.
inline Tensor dense_faces(const Tensor& t) {
  int64_t step = 1;
  for (int64_t d = t.dim() - 1; d > 0; --d) {
    if (t.size(d) != 1 && t.stride(d) != step) return torch::stable::contiguous(t);
    step *= t.size(d);
  }
  return t;
}

inline FeatureView feature_view(const Tensor& t) {
  return {t.const_data_ptr(), t.stride(0), t.stride(1), cell_stride(t)};
}

inline MutableFeatureView mutable_feature_view(const Tensor& t) {
  return {t.mutable_data_ptr(), t.stride(0), t.stride(1), cell_stride(t)};
}

// A fresh tensor next to `like`, through torch's allocator. The shim is used because the dispatcher's route
// costs a microsecond a tensor, which one pair would feel.
inline Tensor empty_like_device(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  int64_t strides[5];
  int64_t step = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = step;
    step *= *(sizes.begin() + i);
  }
  int32_t device_type = 0;
  aoti_torch_get_device_type(like.get(), &device_type);
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides,
                               torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
                               device_type, like.get_device_index(), &handle));
  return Tensor(handle);
}

// The gradient of a map: shaped and laid out like the map, or of size 0 where it is not wanted.
inline Tensor gradient_map(const Tensor& map, bool needed) {
  if (!needed) return empty_like_device(map, {0}, map.scalar_type());
  const Tensor grad = torch::stable::empty_like(map);
  if (cells_evenly_spaced(grad)) return grad;
  return empty_like_device(map, {map.size(0), map.size(1), map.size(2), map.size(3)}, map.scalar_type());
}

inline MutableFeatureView gradient_view(const Tensor& grad, bool needed) {
  return needed ? mutable_feature_view(grad) : MutableFeatureView{nullptr, 0, 0, 0};
}

inline PairProblem pair_problem(const Tensor& a, const Tensor& b, double eps) {
  PairProblem p{};
  p.shape = {a.size(0), a.size(1), a.size(2) * a.size(3)};
  p.scalar = to_scalar(a.scalar_type());
  p.a = feature_view(a);
  p.b = feature_view(b);
  p.mode = Attention::uniform;
  p.attention = {nullptr, Scalar::f32, 0};
  p.temperature = 1.0;
  p.eps = eps;
  return p;
}

}  // namespace xcos::ops
