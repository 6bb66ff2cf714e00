// What the all-pairs kernels have in common: parameters, running scores, launching.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include "core/xcos_matrix.h"
#include "cuda/device.cuh"
#include "cuda/element.cuh"
#include "cuda/kernel_attributes.cuh"
#include "cuda/runtime.h"

#if !defined(XCOS_CUDA_MAX_GRID)
#define XCOS_CUDA_MAX_GRID 0x7fffffff  // gridDim.x; kernels loop over what does not fit
#endif

namespace xcos::cuda {

// One side's faces as a kernel sees them.
template <typename T, typename R>
struct MatrixSide {
  int64_t faces;
  const T* features;
  int64_t features_stride;
  const T* projection;
  int64_t projection_stride;
  const R* bias;
  int64_t bias_stride;
};

template <typename T, typename R>
struct MatrixParams {
  int64_t channels;
  int64_t hidden;
  int64_t height;
  int64_t width;
  int64_t cells;
  int orders;
  bool softmax;
  R inverse_temperature;
  MatrixSide<T, R> probes;
  MatrixSide<T, R> gallery;
  const R* weight;
  const R* slope;
  R* scores;  // forward only
};

template <typename T, typename R>
MatrixSide<T, R> matrix_side(const TemplateView& view) {
  return {view.faces,
          static_cast<const T*>(view.features),
          view.features_stride,
          static_cast<const T*>(view.projection),
          view.projection_stride,
          static_cast<const R*>(view.bias),
          view.bias_stride};
}

template <typename T, typename R>
MatrixParams<T, R> matrix_params(const MatrixProblem& problem) {
  MatrixParams<T, R> p = {};
  p.channels = problem.channels;
  p.hidden = problem.hidden;
  p.height = problem.height;
  p.width = problem.width;
  p.cells = problem.height * problem.width;
  p.orders = static_cast<int>(problem.orders);
  p.softmax = problem.normalize == Normalize::softmax;
  // What is positive as a double stays positive, and its inverse finite.
  const R temperature = static_cast<R>(problem.temperature);
  constexpr R kSmallest = std::numeric_limits<R>::min();
  p.inverse_temperature = R(1) / (temperature < kSmallest ? kSmallest : temperature);
  p.probes = matrix_side<T, R>(problem.probes);
  p.gallery = matrix_side<T, R>(problem.gallery);
  p.weight = static_cast<const R*>(problem.weight);
  p.slope = static_cast<const R*>(problem.slope);
  return p;
}

// sum_i W_i S_i of one pair and order while cells come in one after the other, nothing of them kept.
// softmax: extreme is the largest z so far, total = sum e_i, weighted = sum e_i S_i with e_i = exp((z_i -
// extreme) / T). min-shift: extreme is the smallest z, total = sum d_i, weighted = sum d_i S_i with d_i = z_i
// - extreme, plain = sum S_i. Comparisons pass over NaN, the sums do not.
template <typename R>
struct RunningScore {
  R extreme;
  R total;
  R weighted;
  R plain;

  // Finite, so that a cell of -inf gets weight 0 and not NaN.
  static constexpr R kLowest = std::numeric_limits<R>::lowest();

  // Before the first cell.
  __device__ void clear() {
    extreme = kLowest;
    total = weighted = plain = R(0);
  }
  __device__ void raise(R largest, R inverse_temperature) {
    if (!(largest > extreme)) return;
    const R scale = exponential((extreme - largest) * inverse_temperature);
    total *= scale;
    weighted *= scale;
    extreme = largest;
  }
  __device__ void add_exponential(R z, R cosine, R inverse_temperature) {
    const R e = exponential((z - extreme) * inverse_temperature);
    total += e;
    weighted += e * cosine;
  }
  // cells: how many came before.
  __device__ void add_shifted(R z, R cosine, R cells) {
    if (cells == R(0)) {
      extreme = z;
    } else if (z < extreme) {
      const R step = extreme - z;
      total += step * cells;
      weighted += step * plain;
      extreme = z;
    }
    const R difference = z - extreme;
    total += difference;
    weighted += difference * cosine;
    plain += cosine;
  }
  __device__ R result(bool softmax, R cells) const {
    // All cells equal: uniform weights.
    return !softmax && total == R(0) ? plain / cells : weighted / total;
  }
};

// The activation. Its product is rounded by itself: fused with a subtraction of the smallest such value,
// equal cells would not cancel.
template <typename R>
__device__ inline R parametric(R y, R slope) {
  return y > R(0) ? y : rounded_product(slope, y);
}

inline int64_t ceil_divide(int64_t value, int64_t unit) { return (value + unit - 1) / unit; }

// Enqueues kKernel(params) on `items` blocks, or as many as a grid holds. shared_bytes above 48 KB must have
// been granted by allow_shared().
template <auto kKernel, class Params>
Status launch_blocks(int64_t items, int threads, int64_t shared_bytes, Params params, Stream stream) {
  const int64_t most = XCOS_CUDA_MAX_GRID;
  void* arguments[] = {&params};
  const cudaError_t error = cudaLaunchKernel(
      kKernel, dim3(static_cast<unsigned>(items < most ? items : most)), dim3(static_cast<unsigned>(threads)),
      arguments, static_cast<size_t>(shared_bytes), static_cast<cudaStream_t>(stream));
  // A refused launch must not be reported again by whoever asks next.
  if (error != cudaSuccess) static_cast<void>(cudaGetLastError());
  return static_cast<Status>(error);
}

}  // namespace xcos::cuda
