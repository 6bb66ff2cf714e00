// Gradients of all pairs, recomputed. One pass a side: a block owns a face of that side and walks over the
// other side, a chunk of faces at a time, so that every sum has one owner and one order. For each pair of the
// chunk it recomputes logits and cosines, turns them into dL/dy and into the cells' weights in the gradient,
// and adds them to the owned face's sums.
//
// The maximum sends a gradient to one face of the pair. For the owned face the sums
//   D[o,c,j,k] = sum over pairs whose maximum at (o,c,j) is the owned one's of dL/dy_o[j - k]
// serve twice: the projection's gradient is sum_k weight[c,k] D[o,c,j,k], and the owned face's share of the
// weight's gradient is sum_{o,j} projection[o,c,j] D[o,c,j,k]. So weights need no pass of their own.
#include "cuda/matrix_kernels.cuh"
#include "cuda/xcos_matrix.h"

namespace xcos::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kChunkFaces = 32;
constexpr int kScratch = kThreads / kWarp;  // a sum for each warp; keeps what follows 16-byte aligned
constexpr int kQuad = 4;                    // channels that a thread owns at a time
constexpr int kLanes = 8;                   // that share a cosine
constexpr int kWeightPitch = 12;            // nine weights of a channel, in 16-byte vectors
constexpr int kSharedLimit = 64 * 1024;     // what every device since sm_75 grants
constexpr int64_t kArenaLimit = int64_t{128} << 20;  // of all blocks, where sums do not fit shared memory
constexpr int kMostArenas = 1024;

// Where a block's sums lie, in elements of R.
struct ArenaLayout {
  int64_t similarity;  // [kChunkFaces, cells]: S, later the factor of the other face's features
  int64_t weights;     // [hidden, kWeightPitch]
  int64_t positions;   // [cells], int: where a cell lies in a bordered map
  int64_t logits;      // [orders, kChunkFaces, height + 2, width + 2]: y, later dL/dy, in a border of zeros
  int64_t features;    // [cells, channels]
  int64_t products;    // [orders, hidden, cells, 9]: D
  int64_t bias;        // [orders, cells]
  int64_t size;
};

template <typename R>
struct alignas(16) Weights {
  R k[kWeightPitch];
};

ArenaLayout arena_layout(const MatrixProblem& problem) {
  const int64_t cells = problem.height * problem.width;
  ArenaLayout a = {};
  a.weights = ceil_divide(a.similarity + kChunkFaces * cells, 4) * 4;
  a.positions = a.weights + problem.hidden * kWeightPitch;
  a.logits = a.positions + cells;
  a.features = a.logits + problem.orders * kChunkFaces * (problem.height + 2) * (problem.width + 2);
  a.products = a.features + cells * problem.channels;
  a.bias = a.products + problem.orders * problem.hidden * cells * 9;
  a.size = a.bias + problem.orders * cells;
  a.size = ceil_divide(a.size, 4) * 4;
  return a;
}

template <typename T, typename R>
struct BackwardPass {
  MatrixParams<T, R> matrix;
  MatrixSide<T, R> own;
  MatrixSide<T, R> other;
  bool probes;    // whether the owned faces are the probes
  const R* grad;  // of pair (own, other) at own * grad_own + other * grad_other
  int64_t grad_own;
  int64_t grad_other;
  T* features;  // null: not wanted
  T* projection;
  R* bias;
  R* weight_parts;  // [own, hidden, 9]
  R* slope_parts;   // [own]
  R* arenas;        // null: in shared memory
  ArenaLayout layout;
};

// One column of a pair's y, from top to bottom: an input row reaches three outputs. bias: of the other face;
// out: the column's first cell in the bordered map.
template <typename T, typename R>
__device__ inline void column_logits(const MatrixParams<T, R>& m, const Weights<R>* weights, const T* own,
                                     const T* other, const R* own_bias, const R* other_bias, int column,
                                     R* out) {
  const int height = static_cast<int>(m.height);
  const int width = static_cast<int>(m.width);
  R rows[3] = {};  // of rows row - 1, row, row + 1
  for (int row = 0; row <= height; ++row) {
    if (row < height) {
      for (int64_t c = 0; c < m.hidden; ++c) {
        const Weights<R> w = weights[c];
        const int64_t at = c * m.cells + row * width + column;
#pragma unroll
        for (int l = 0; l < 3; ++l) {
          if (column + l < 1 || column + l > width) continue;
          const R u = Element<T>::load(own[at + l - 1]);
          const R v = Element<T>::load(other[at + l - 1]);
          const R h = larger_or_nan(u, v);
#pragma unroll
          for (int k = 0; k < 3; ++k) rows[2 - k] += w.k[3 * k + l] * h;
        }
      }
    }
    if (row > 0) {
      const int cell = (row - 1) * width + column;
      *out = (own_bias[cell] + other_bias[cell]) + rows[0];
      out += width + 2;
    }
    rows[0] = rows[1];
    rows[1] = rows[2];
    rows[2] = R(0);
  }
}

// What normalisation of one pair's logits needs to know, in every lane.
template <typename R>
struct PairSums {
  R extreme;
  R inverse_total;
  R score;
  R tied;     // min-shift: what each smallest cell gives back
  bool flat;  // min-shift: all cells equal
};

template <typename T, typename R>
__device__ inline PairSums<R> pair_sums(const MatrixParams<T, R>& m, const int* at, const R* y,
                                        const R* similarity, R slope, const WarpGroup& group) {
  const int cells = static_cast<int>(m.cells);
  PairSums<R> s = {};
  constexpr R kLowest = RunningScore<R>::kLowest;
  R sign = m.softmax ? R(1) : R(-1);
  R largest = kLowest;  // of sign * z
  for (int i = group.rank; i < cells; i += kWarp) {
    const R z = sign * parametric(y[at[i]], slope);
    largest = z > largest ? z : largest;
  }
  s.extreme = sign * group.maximum(largest);
  R sums[3] = {};
  for (int i = group.rank; i < cells; i += kWarp) {
    const R z = parametric(y[at[i]], slope);
    const R e = m.softmax ? exponential((z - s.extreme) * m.inverse_temperature) : z - s.extreme;
    sums[0] += e;
    sums[1] += e * similarity[i];
    sums[2] += z == s.extreme ? R(1) : R(0);
  }
  group.sum(sums);
  s.flat = !m.softmax && sums[0] == R(0);
  s.inverse_total = R(1) / sums[0];
  s.score = sums[1] / sums[0];
  if (!m.softmax && !s.flat) {
    R shifted[1] = {};
    for (int i = group.rank; i < cells; i += kWarp) shifted[0] += similarity[i] - s.score;
    group.sum(shifted);
    s.tied = shifted[0] / sums[2];
  }
  return s;
}

// Turns one pair's S and y, in place, into the factors of the features' gradients and into dL/dy. Returns the
// lane's part of the slope's gradient.
template <typename T, typename R>
__device__ inline R pair_gradients(const BackwardPass<T, R>& p, const int* at, R grad, R* similarity, R* y,
                                   R slope, const WarpGroup& group) {
  const MatrixParams<T, R>& m = p.matrix;
  const int cells = static_cast<int>(m.cells);
  const int64_t next_order = kChunkFaces * (m.height + 2) * (m.width + 2);
  const R share = grad / static_cast<R>(m.orders);
  PairSums<R> sums[2];
#pragma unroll
  for (int order = 0; order < 2; ++order) {
    if (order == m.orders) break;
    sums[order] = pair_sums(m, at, y + order * next_order, similarity, slope, group);
  }
  R slope_sum = 0;
  for (int i = group.rank; i < cells; i += kWarp) {
    const R cosine = similarity[i];
    R factor = 0;
#pragma unroll
    for (int order = 0; order < 2; ++order) {
      if (order == m.orders) break;
      const PairSums<R>& s = sums[order];
      R& value = y[order * next_order + at[i]];
      const R z = parametric(value, slope);
      R weight;
      R dz;
      if (m.softmax) {
        weight = exponential((z - s.extreme) * m.inverse_temperature) * s.inverse_total;
        dz = share * weight * (cosine - s.score) * m.inverse_temperature;
      } else if (s.flat) {
        weight = R(1) / static_cast<R>(cells);
        dz = R(0);
      } else {
        weight = (z - s.extreme) * s.inverse_total;
        // What is subtracted from all cells is the smallest one; equal ones share its gradient.
        dz = share * ((cosine - s.score) - (z == s.extreme ? s.tied : R(0))) * s.inverse_total;
      }
      factor += share * weight;
      if (!(value > R(0))) slope_sum += dz * value;
      value = value > R(0) ? dz : slope * dz;
    }
    similarity[i] = factor;
  }
  return slope_sum;
}

template <typename T>
__global__ void __launch_bounds__(kThreads, sizeof(typename Element<T>::Result) == 8 ? 1 : 2)
    matrix_backward(const __grid_constant__ BackwardPass<T, typename Element<T>::Result> p) {
  using R = typename Element<T>::Result;
  const MatrixParams<T, R>& m = p.matrix;
  const int thread = static_cast<int>(threadIdx.x);
  const WarpGroup group = {thread % kWarp};
  const int warp = thread / kWarp;
  R* const scratch = reinterpret_cast<R*>(dynamic_shared());  // a sum for each warp
  R* const arena = p.arenas == nullptr ? scratch + kScratch : p.arenas + blockIdx.x * p.layout.size;
  R* const similarity = arena + p.layout.similarity;
  Weights<R>* const weights = reinterpret_cast<Weights<R>*>(arena + p.layout.weights);
  int* const positions = reinterpret_cast<int*>(arena + p.layout.positions);
  R* const logits = arena + p.layout.logits;
  R* const features = arena + p.layout.features;
  R* const products = arena + p.layout.products;
  R* const bias = arena + p.layout.bias;
  const R slope = m.slope[0];
  const int64_t feature_size = m.cells * m.channels;
  const int64_t map_size = m.hidden * m.cells;  // of one order's projection
  const bool want_products = p.projection != nullptr || p.weight_parts != nullptr;
  const int width = static_cast<int>(m.width);
  const int border = width + 2;
  const int64_t bordered = (m.height + 2) * border;  // a map
  for (int64_t e = p.layout.logits + thread; e < p.layout.features; e += kThreads) arena[e] = R(0);
  for (int64_t e = thread; e < 9 * m.hidden; e += kThreads) weights[e / 9].k[e % 9] = m.weight[e];
  for (int cell = thread; cell < m.cells; cell += kThreads) {
    positions[cell] = (cell / width + 1) * border + cell % width + 1;
  }

  for (int64_t face = blockIdx.x; face < p.own.faces; face += gridDim.x) {
    const T* const own_features = p.own.features + face * p.own.features_stride;
    const T* const own_projection = p.own.projection + face * p.own.projection_stride;
    const R* const own_bias = p.own.bias + face * p.own.bias_stride;
    for (int64_t e = p.layout.features + thread; e < p.layout.size; e += kThreads) arena[e] = R(0);
    R slope_sum[1] = {};

    for (int64_t first = 0; first < p.other.faces; first += kChunkFaces) {
      const int count =
          static_cast<int>(p.other.faces - first < kChunkFaces ? p.other.faces - first : kChunkFaces);
      __syncthreads();  // the former chunk may still be read
      const int64_t cosines = count * m.cells;
      for (int64_t e = warp * (kWarp / kLanes); e < cosines; e += kThreads / kLanes) {
        const int64_t pair_cell = e + group.rank / kLanes < cosines ? e + group.rank / kLanes : cosines - 1;
        const int64_t k = pair_cell / m.cells;
        const int64_t at = (pair_cell - k * m.cells) * m.channels;
        const T* const other = p.other.features + (first + k) * p.other.features_stride + at;
        R sum = 0;
        for (int64_t c = group.rank % kLanes; c < m.channels; c += kLanes) {
          sum += Element<T>::load(own_features[at + c]) * Element<T>::load(other[c]);
        }
#pragma unroll
        for (int step = kLanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kFullWarp, sum, step);
        if (group.rank % kLanes == 0) similarity[pair_cell] = sum;
      }
      for (int64_t e = thread; e < m.orders * count * m.width; e += kThreads) {
        const int64_t map = e / m.width;
        const int column = static_cast<int>(e - map * m.width);
        const int order = map < count ? 0 : 1;
        const int64_t k = map - order * count;
        column_logits(m, weights, own_projection + order * map_size,
                      p.other.projection + (first + k) * p.other.projection_stride + order * map_size,
                      own_bias + order * m.cells,
                      p.other.bias + (first + k) * p.other.bias_stride + order * m.cells, column,
                      logits + (order * kChunkFaces + k) * bordered + border + column + 1);
      }
      __syncthreads();
      for (int k = warp; k < count; k += kThreads / kWarp) {
        slope_sum[0] += pair_gradients(p, positions, p.grad[face * p.grad_own + (first + k) * p.grad_other],
                                       similarity + k * m.cells, logits + k * bordered, slope, group);
      }
      __syncthreads();

      if (p.features != nullptr) {
        for (int64_t e = thread; e < feature_size; e += kThreads) {
          const int64_t cell = e / m.channels;
          const T* other = p.other.features + first * p.other.features_stride + e;
          R sum = features[e];
          for (int k = 0; k < count; ++k, other += p.other.features_stride) {
            sum += similarity[k * m.cells + cell] * Element<T>::load(*other);
          }
          features[e] = sum;
        }
      }
      for (int64_t e = thread; p.bias != nullptr && e < m.orders * m.cells; e += kThreads) {
        const int64_t order = e / m.cells;
        R sum = bias[e];
        const R* dy = logits + order * kChunkFaces * bordered + positions[e - order * m.cells];
        for (int k = 0; k < count; ++k) sum += dy[k * bordered];
        bias[e] = sum;
      }
      // A thread owns a cell of four channels, which share what they read of dL/dy.
      const int64_t quads = (m.hidden + kQuad - 1) / kQuad;
      for (int64_t item = thread; want_products && item < m.orders * quads * m.cells; item += kThreads) {
        const int64_t map = item / m.cells;
        const int64_t cell = item - map * m.cells;
        const int64_t order = map / quads;
        const int64_t channel = (map - order * quads) * kQuad;
        const int64_t at = (order * m.hidden + channel) * m.cells + cell;
        // At a tie the second face of the order takes the gradient.
        const bool first_face = p.probes == (order == 0);
        R own[kQuad] = {};
        R sums[kQuad][9] = {};
#pragma unroll
        for (int n = 0; n < kQuad; ++n) {
          if (channel + n >= m.hidden) break;
          own[n] = Element<T>::load(own_projection[at + n * m.cells]);
#pragma unroll
          for (int k = 0; k < 9; ++k) sums[n][k] = products[(at + n * m.cells) * 9 + k];
        }
        const T* other = p.other.projection + first * p.other.projection_stride + at;
        // Input (row, column) is neighbour k of output (row + 1 - k / 3, column + 1 - k % 3).
        const R* dy = logits + order * kChunkFaces * bordered + positions[cell] + border + 1;
        for (int pair = 0; pair < count; ++pair, other += p.other.projection_stride, dy += bordered) {
          R near[9];
#pragma unroll
          for (int k = 0; k < 9; ++k) near[k] = dy[-(k / 3) * border - k % 3];
#pragma unroll
          for (int n = 0; n < kQuad; ++n) {
            if (channel + n >= m.hidden) break;
            const R there = Element<T>::load(other[n * m.cells]);
            if (first_face ? own[n] > there : !(there > own[n])) {
#pragma unroll
              for (int k = 0; k < 9; ++k) sums[n][k] += near[k];
            }
          }
        }
#pragma unroll
        for (int n = 0; n < kQuad; ++n) {
          if (channel + n >= m.hidden) break;
#pragma unroll
          for (int k = 0; k < 9; ++k) products[(at + n * m.cells) * 9 + k] = sums[n][k];
        }
      }
    }

    __syncthreads();
    if (p.features != nullptr) {
      for (int64_t e = thread; e < feature_size; e += kThreads) {
        p.features[face * feature_size + e] = Element<T>::store(features[e]);
      }
    }
    for (int64_t e = thread; p.bias != nullptr && e < m.orders * m.cells; e += kThreads) {
      p.bias[face * m.orders * m.cells + e] = bias[e];
    }
    for (int64_t e = thread; p.projection != nullptr && e < m.orders * map_size; e += kThreads) {
      const int64_t c = e / m.cells % m.hidden;
      R sum = 0;
#pragma unroll
      for (int k = 0; k < 9; ++k) sum += m.weight[c * 9 + k] * products[e * 9 + k];
      p.projection[face * m.orders * map_size + e] = Element<T>::store(sum);
    }
    for (int64_t e = thread; p.weight_parts != nullptr && e < m.hidden * 9; e += kThreads) {
      const int64_t c = e / 9;
      R sum = 0;
      for (int order = 0; order < m.orders; ++order) {
        const int64_t at = order * map_size + c * m.cells;
        for (int64_t cell = 0; cell < m.cells; ++cell) {
          sum += Element<T>::load(own_projection[at + cell]) * products[(at + cell) * 9 + e % 9];
        }
      }
      p.weight_parts[face * m.hidden * 9 + e] = sum;
    }
    if (p.slope_parts != nullptr) {
      group.sum(slope_sum);
      if (group.rank == 0) scratch[warp] = slope_sum[0];
      __syncthreads();
      if (thread == 0) {
        R sum = scratch[0];
        for (int w = 1; w < kThreads / kWarp; ++w) sum += scratch[w];
        p.slope_parts[face] = sum;
      }
    }
    __syncthreads();  // sums are read until here
  }
}

template <typename R>
struct PartsParams {
  const R* parts;  // [rows, columns]
  int64_t rows;
  int64_t columns;
  R* sums;  // [columns]
};

// Sums of columns, each in one order: a block a column.
template <typename R>
__global__ void __launch_bounds__(kThreads, 2)
    matrix_backward_sums(const __grid_constant__ PartsParams<R> p) {
  const BlockGroup<kThreads> group = {static_cast<int>(threadIdx.x), dynamic_shared()};
  for (int64_t column = blockIdx.x; column < p.columns; column += gridDim.x) {
    R sum[1] = {};
    for (int64_t row = threadIdx.x; row < p.rows; row += kThreads)
      sum[0] += p.parts[row * p.columns + column];
    group.sum(sum);
    if (threadIdx.x == 0) p.sums[column] = sum[0];
  }
}

// What the workspace holds, in bytes from its beginning.
struct WorkspacePlan {
  bool shared;  // the arenas fit shared memory
  int64_t shared_bytes;
  int64_t arenas;
  int64_t weight_parts;
  int64_t slope_parts;
  int64_t blocks;  // at most; 0: any number
  int64_t bytes;
};

WorkspacePlan plan_workspace(const MatrixProblem& problem, const MatrixGradients& gradients) {
  const int64_t size = scalar_size(result_scalar(problem.scalar));
  const ArenaLayout layout = arena_layout(problem);
  WorkspacePlan plan = {};
  const int64_t faces = problem.probes.faces + problem.gallery.faces;
  const int64_t most =
      problem.probes.faces > problem.gallery.faces ? problem.probes.faces : problem.gallery.faces;
  const int64_t scratch = kScratch * size;
  plan.shared = scratch + layout.size * size <= kSharedLimit;
  plan.shared_bytes = scratch + (plan.shared ? layout.size * size : 0);
  if (!plan.shared) {
    plan.blocks = kArenaLimit / (layout.size * size);
    plan.blocks = plan.blocks < 1 ? 1 : plan.blocks > kMostArenas ? kMostArenas : plan.blocks;
    if (plan.blocks > most) plan.blocks = most;
    plan.bytes += plan.blocks * layout.size * size;
  }
  plan.weight_parts = plan.bytes;
  if (gradients.weight != nullptr) plan.bytes += ceil_divide(faces * problem.hidden * 9 * size, 16) * 16;
  plan.slope_parts = plan.bytes;
  if (gradients.slope != nullptr) plan.bytes += ceil_divide(problem.probes.faces * size, 16) * 16;
  return plan;
}

template <typename T>
Status backward(const MatrixProblem& problem, const MatrixGradients& gradients, void* workspace,
                Stream stream) {
  using R = typename Element<T>::Result;
  const WorkspacePlan plan = plan_workspace(problem, gradients);
  unsigned char* const bytes = static_cast<unsigned char*>(workspace);
  R* const weight_parts = reinterpret_cast<R*>(bytes + plan.weight_parts);
  R* const slope_parts = reinterpret_cast<R*>(bytes + plan.slope_parts);
  BackwardPass<T, R> p = {};
  p.matrix = matrix_params<T, R>(problem);
  p.layout = arena_layout(problem);
  p.grad = static_cast<const R*>(gradients.grad);
  p.arenas = plan.shared ? nullptr : reinterpret_cast<R*>(bytes);

  for (int side = 0; side < 2; ++side) {
    p.probes = side == 0;
    p.own = p.probes ? p.matrix.probes : p.matrix.gallery;
    p.other = p.probes ? p.matrix.gallery : p.matrix.probes;
    p.grad_own = p.probes ? p.matrix.gallery.faces : 1;
    p.grad_other = p.probes ? 1 : p.matrix.gallery.faces;
    p.features = static_cast<T*>(p.probes ? gradients.probe_features : gradients.gallery_features);
    p.projection = static_cast<T*>(p.probes ? gradients.probe_projection : gradients.gallery_projection);
    p.bias = static_cast<R*>(p.probes ? gradients.probe_bias : gradients.gallery_bias);
    p.weight_parts = nullptr;
    if (gradients.weight != nullptr) {
      p.weight_parts = weight_parts + (p.probes ? 0 : p.matrix.probes.faces * problem.hidden * 9);
    }
    p.slope_parts = p.probes && gradients.slope != nullptr ? slope_parts : nullptr;
    const bool wanted = p.features != nullptr || p.projection != nullptr || p.bias != nullptr ||
                        p.weight_parts != nullptr || p.slope_parts != nullptr;
    if (!wanted || p.own.faces == 0) continue;
    const int64_t blocks = plan.blocks > 0 && plan.blocks < p.own.faces ? plan.blocks : p.own.faces;
    Status status = allow_shared<matrix_backward<T>>(plan.shared_bytes);
    if (status != 0) return status;
    status = launch_blocks<matrix_backward<T>>(blocks, kThreads, plan.shared_bytes, p, stream);
    if (status != 0) return status;
  }

  constexpr int64_t kSumBytes = BlockGroup<kThreads>::kScratch * sizeof(double);
  if (gradients.weight != nullptr) {
    const PartsParams<R> sums = {weight_parts, p.matrix.probes.faces + p.matrix.gallery.faces,
                                 problem.hidden * 9, static_cast<R*>(gradients.weight)};
    const Status status =
        launch_blocks<matrix_backward_sums<R>>(sums.columns, kThreads, kSumBytes, sums, stream);
    if (status != 0) return status;
  }
  if (gradients.slope != nullptr) {
    const PartsParams<R> sums = {slope_parts, p.matrix.probes.faces, 1, static_cast<R*>(gradients.slope)};
    return launch_blocks<matrix_backward_sums<R>>(1, kThreads, kSumBytes, sums, stream);
  }
  return 0;
}

}  // namespace

int64_t xcos_matrix_backward_workspace(const MatrixProblem& problem, const MatrixGradients& gradients) {
  return plan_workspace(problem, gradients).bytes;
}

Status xcos_matrix_backward(const MatrixProblem& problem, const MatrixGradients& gradients, void* workspace,
                            Stream stream) {
  switch (problem.scalar) {
    case Scalar::f16:
      return backward<__half>(problem, gradients, workspace, stream);
    case Scalar::bf16:
      return backward<__nv_bfloat16>(problem, gradients, workspace, stream);
    case Scalar::f32:
      return backward<float>(problem, gradients, workspace, stream);
    case Scalar::f64:
      return backward<double>(problem, gradients, workspace, stream);
  }
  return static_cast<Status>(cudaErrorInvalidValue);
}

}  // namespace xcos::cuda
