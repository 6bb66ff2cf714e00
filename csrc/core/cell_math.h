// The mathematics of one cell, usable on host and device. Every kernel goes through these functions, so that
// the contracts (clamped norms, zero cells, gradients at zero) are written once. T is a number, or a vector
// of numbers of the compiler's vector extension: selects instead of branches, and constants made by T{} + 1,
// serve both.
#pragma once

#include "core/types.h"

namespace xcos {

// Inner products of one cell's two feature vectors.
template <typename T>
struct CellMoments {
  T dot;  // x . y
  T xx;   // x . x
  T yy;   // y . y
};

template <typename T>
struct CellCosine {
  T cosine;  // x.y / (max(|x|, eps) max(|y|, eps))
  T x_norm;  // |x|, not clamped
  T y_norm;
  T scale;  // 1 / (max(|x|, eps) max(|y|, eps))
};

// fmax drops NaN, so the clamp is a comparison that keeps it.
template <typename T>
XCOS_HD inline T clamp_norm(T norm, T eps) {
  return norm < eps ? eps : norm;
}

template <typename T>
XCOS_HD inline CellCosine<T> cell_cosine(const CellMoments<T>& m, T x_norm, T y_norm, T eps) {
  CellCosine<T> out;
  out.x_norm = x_norm;
  out.y_norm = y_norm;
  const T x_inverse = (T{} + 1) / clamp_norm(x_norm, eps);
  const T y_inverse = (T{} + 1) / clamp_norm(y_norm, eps);
  out.scale = x_inverse * y_inverse;
  out.cosine = (m.dot * x_inverse) * y_inverse;  // in this order a zero cell stays 0 for the smallest eps
  return out;
}

// Gradient of one cell as coefficients: grad_x = x_from_y * y + x_from_x * x, and the same for y.
template <typename T>
struct CellGradient {
  T x_from_y;
  T x_from_x;
  T y_from_x;
  T y_from_y;
};

// grad_cosine: dL/dS of the cell. grad_product: dL/d(|x||y|), nonzero for norm attention only.
// A clamped norm is a constant, so its own term vanishes; a zero vector gets gradient 0 by contract.
template <typename T>
XCOS_HD inline CellGradient<T> cell_gradient(const CellCosine<T>& c, T eps, T grad_cosine, T grad_product) {
  const T zero = T{};
  const T one = zero + 1;
  const auto x_zero = c.x_norm == zero, y_zero = c.y_norm == zero;
  const T x_inverse = x_zero ? zero : one / c.x_norm;
  const T y_inverse = y_zero ? zero : one / c.y_norm;
  const T cross = grad_cosine * c.scale;
  const T along = grad_cosine * c.cosine;
  CellGradient<T> g;
  g.x_from_y = x_zero ? zero : cross;
  g.y_from_x = y_zero ? zero : cross;
  g.x_from_x = grad_product * c.y_norm * x_inverse - (c.x_norm < eps ? zero : along * x_inverse * x_inverse);
  g.y_from_y = grad_product * c.x_norm * y_inverse - (c.y_norm < eps ? zero : along * y_inverse * y_inverse);
  return g;
}

}  // namespace xcos
