// A block per pair. Both maps lie in shared memory, [channels, cells], where they fit; a thread owns a cell
// of one of the maps, a direction of matching, and walks over the cell's candidates in the other map. Forward
// needs nothing else. Backward keeps both directions' results and the candidates' coefficients in a table, in
// shared memory where it fits, else in a workspace of one table a block.
#include <type_traits>

#include "core/cell_math.h"
#include "cuda/grid_match.h"
#include "cuda/matrix_kernels.cuh"
#include "cuda/pair_kernels.cuh"

namespace xcos::cuda {
namespace {

constexpr int kMatchThreads = 128;  // most of a block
constexpr int kMatchBlocks = 4;     // of an SM, at least, that registers must allow

// Candidates whose sums a thread has in registers.
template <typename R>
constexpr int kMatchTogether = sizeof(R) == 8 ? 2 : 3;
constexpr int64_t kMatchWorkspace = int64_t{128} << 20;

template <typename R>
struct MatchParams {
  int64_t pairs;
  int64_t channels;
  int64_t cells;
  int height;
  int width;
  MatchWindow window;
  bool best;
  bool symmetric;
  R eps;
  R inverse_temperature;
  MapAccess<const void> a;
  MapAccess<const void> b;
  R* similarity;
  int8_t* offsets;
  const R* grad;  // backward
  MapAccess<void> grad_a;
  MapAccess<void> grad_b;
  R* workspace;  // null: the table is in shared memory, behind the maps
  int64_t table_size;
  bool staged;
  int64_t map_bytes;  // of one map in shared memory
};

// One pair's map, in shared or in global memory.
template <typename T>
struct MapView {
  const T* data;
  int64_t channel_stride;
  int64_t cell_stride;

  __device__ const T* cell(int64_t i) const { return data + i * cell_stride; }
};

// A cell and the candidates that are inside the grid: rows first_row .. last_row of the window, and so on.
struct Neighbours {
  int64_t cell;
  int row;
  int column;
  int first_row;
  int last_row;
  int first_column;
  int last_column;

  __device__ Neighbours(int64_t cell_, int height, int width, const MatchWindow& w) : cell(cell_) {
    row = static_cast<int>(cell / width);
    column = static_cast<int>(cell - static_cast<int64_t>(row) * width);
    first_row = row < w.rows ? -row : -w.rows;
    last_row = height - 1 - row < w.rows ? height - 1 - row : w.rows;
    first_column = column < w.columns ? -column : -w.columns;
    last_column = width - 1 - column < w.columns ? width - 1 - column : w.columns;
  }
};

// A pair's maps. Selected by value: an indexed array of them would lie in local memory.
template <typename T>
struct PairView {
  MapView<T> a;
  MapView<T> b;

  __device__ MapView<T> side(bool second) const {
    return {second ? b.data : a.data, second ? b.channel_stride : a.channel_stride,
            second ? b.cell_stride : a.cell_stride};
  }
};

// Sums over the channels of own x other for kMatchTogether candidates side by side, the first at `first`;
// those from `count` on repeat the last. squares: of the candidates.
template <typename T, typename R>
__device__ inline void candidate_sums(const MapView<T>& own, const MapView<T>& other, int64_t channels,
                                      int64_t own_cell, int64_t first, int count,
                                      R (&dots)[kMatchTogether<R>], R (&squares)[kMatchTogether<R>]) {
  constexpr int kTogether = kMatchTogether<R>;
  const T* x = own.cell(own_cell);
  const T* y[kTogether];
#pragma unroll
  for (int m = 0; m < kTogether; ++m) {
    y[m] = other.cell(first + (m < count ? m : count - 1));
    dots[m] = squares[m] = R(0);
  }
#pragma unroll 4
  for (int64_t c = 0; c < channels; ++c) {
    const R u = Element<T>::load(x[c * own.channel_stride]);
#pragma unroll
    for (int m = 0; m < kTogether; ++m) {
      const R v = Element<T>::load(y[m][c * other.channel_stride]);
      dots[m] += u * v;
      squares[m] += v * v;
    }
  }
}

template <typename T, typename R>
__device__ inline R norm_of(const MapView<T>& map, int64_t channels, int64_t cell) {
  const T* x = map.cell(cell);
  R sum = R(0);
#pragma unroll 8
  for (int64_t c = 0; c < channels; ++c) {
    const R v = Element<T>::load(x[c * map.channel_stride]);
    sum += v * v;
  }
  return root(sum);
}

// body(candidate's number, its cell, its cosine, its norm) for every candidate, rising. flipped: `own` is the
// second map; the cosine is that of the other direction to the bit.
template <typename T, typename R, class Body>
__device__ inline void for_each_candidate(const MatchParams<R>& p, const MapView<T>& own,
                                          const MapView<T>& other, const Neighbours& n, R own_norm,
                                          bool flipped, const Body& body) {
  constexpr int kTogether = kMatchTogether<R>;
  const R own_inverse = R(1) / clamp_norm(own_norm, p.eps);
  for (int row = n.first_row; row <= n.last_row; ++row) {
    const int64_t line = static_cast<int64_t>(n.row + row) * p.width + n.column;
    const int number = (row + p.window.rows) * p.window.across + p.window.columns;
    for (int column = n.first_column; column <= n.last_column; column += kTogether) {
      const int left = n.last_column - column + 1;
      const int count = left < kTogether ? left : kTogether;
      R dots[kTogether];
      R squares[kTogether];
      candidate_sums(own, other, p.channels, n.cell, line + column, count, dots, squares);
#pragma unroll
      for (int m = 0; m < kTogether; ++m) {
        if (m >= count) break;
        const R norm = root(squares[m]);
        const R inverse = R(1) / clamp_norm(norm, p.eps);
        const R cosine = flipped ? (dots[m] * inverse) * own_inverse : (dots[m] * own_inverse) * inverse;
        body(number + column + m, line + column + m, cosine, norm);
      }
    }
  }
}

// What one direction makes of a cell. best: extreme is the largest cosine, chosen its number. soft: extreme
// is the largest cosine, total the sum of exponentials, weighted that of them times cosines; running, so that
// candidates are looked at once.
template <typename R>
struct MatchResult {
  static constexpr R kNone = -std::numeric_limits<R>::infinity();

  R extreme = kNone;
  int chosen = 0;
  R total = R(0);
  R weighted = R(0);

  __device__ void add(bool best, int number, R cosine, R inverse_temperature) {
    if (best) {
      // The first NaN is taken and never given up.
      if (cosine > extreme || (cosine != cosine && extreme == extreme)) {
        extreme = cosine;
        chosen = number;
      }
      return;
    }
    if (cosine > extreme) {
      const R scale = exponential((extreme - cosine) * inverse_temperature);  // 0 for the first
      total *= scale;
      weighted *= scale;
      extreme = cosine;
    }
    // Before the first number there is only NaN, which must stay.
    const R e = extreme == kNone ? cosine : exponential((cosine - extreme) * inverse_temperature);
    total += e;
    weighted += e * cosine;
  }
  __device__ R similarity(bool best) const { return best ? extreme : weighted / total; }
};

template <typename T, typename R>
__device__ inline MatchResult<R> match_cell(const MatchParams<R>& p, const MapView<T>& own,
                                            const MapView<T>& other, const Neighbours& n, R own_norm,
                                            bool flipped) {
  MatchResult<R> result;
  for_each_candidate(p, own, other, n, own_norm, flipped, [&](int number, int64_t, R cosine, R) {
    result.add(p.best, number, cosine, p.inverse_temperature);
  });
  return result;
}

// Starts copying a pair's map to shared memory, [channels, cells].
template <typename T, typename R>
__device__ inline void stage_for_match(const MatchParams<R>& p, const MapAccess<const void>& map,
                                       int64_t pair, T* shared) {
  const T* source = static_cast<const T*>(map.data) + pair * map.pair_stride;
  const int cells = static_cast<int>(p.cells);
  const int size = static_cast<int>(p.channels) * cells;
  if (map.vectors && !map.channels_last) {
    const int chunks = size * static_cast<int>(sizeof(T)) / 16;
    for (int i = threadIdx.x; i < chunks; i += blockDim.x) {
      copy_async<16>(reinterpret_cast<Chunk<T>*>(shared) + i, reinterpret_cast<const Chunk<T>*>(source) + i);
    }
    return;
  }
  const bool by_channel = map.channel_stride < map.cell_stride;  // channels lie closer together
  const int inner = by_channel ? static_cast<int>(p.channels) : cells;
  for (int i = threadIdx.x; i < size; i += blockDim.x) {
    const int slow = i / inner;
    const int fast = i - slow * inner;
    const int channel = by_channel ? fast : slow;
    const int cell = by_channel ? slow : fast;
    T* to = shared + channel * cells + cell;
    const T* from = source + channel * map.channel_stride + cell * map.cell_stride;
    if constexpr (sizeof(T) >= 4) {
      copy_async<sizeof(T)>(to, from);
    } else {
      *to = *from;
    }
  }
}

// Both maps of a pair, ready to be read by the block.
template <typename T, typename R>
__device__ inline PairView<T> load_pair(const MatchParams<R>& p, int64_t pair) {
  if (p.staged) {
    T* x = reinterpret_cast<T*>(dynamic_shared());
    T* y = reinterpret_cast<T*>(dynamic_shared() + p.map_bytes);
    __syncthreads();  // the pair before may still be read
    stage_for_match(p, p.a, pair, x);
    stage_for_match(p, p.b, pair, y);
    copy_async_wait();
    __syncthreads();
    return {{x, p.cells, 1}, {y, p.cells, 1}};
  }
  return {{static_cast<const T*>(p.a.data) + pair * p.a.pair_stride, p.a.channel_stride, p.a.cell_stride},
          {static_cast<const T*>(p.b.data) + pair * p.b.pair_stride, p.b.channel_stride, p.b.cell_stride}};
}

template <typename T>
__global__ void __launch_bounds__(kMatchThreads, kMatchBlocks)
    match_forward(const __grid_constant__ MatchParams<typename Element<T>::Result> p) {
  using R = typename Element<T>::Result;
  const int directions = p.symmetric ? 2 : 1;
  for (int64_t pair = blockIdx.x; pair < p.pairs; pair += gridDim.x) {
    const PairView<T> maps = load_pair<T>(p, pair);
    // A thread has a cell in both directions, so that it can average them.
    for (int64_t cell = threadIdx.x; cell < p.cells; cell += blockDim.x) {
      const Neighbours n(cell, p.height, p.width, p.window);
      R similarity = R(0);
      for (int direction = 0; direction < directions; ++direction) {
        const bool back = direction == 1;
        const MapView<T> own = maps.side(back);
        const MapView<T> other = maps.side(!back);
        const MatchResult<R> found = match_cell(p, own, other, n, norm_of<T, R>(own, p.channels, cell), back);
        similarity += found.similarity(p.best);
        if (p.offsets != nullptr) {
          int8_t* at = p.offsets + (pair * directions + direction) * 2 * p.cells + cell;
          at[0] = static_cast<int8_t>(p.window.row(found.chosen));
          at[p.cells] = static_cast<int8_t>(p.window.column(found.chosen));
        }
      }
      p.similarity[pair * p.cells + cell] = p.symmetric ? similarity * R(0.5) : similarity;
    }
  }
}

// Rows of the backward table, each of `cells` values: for both maps the norms and the directions' results,
// then for both maps the candidates' coefficients.
enum MatchRow { kNorm = 0, kExtreme = 1, kChosen = 1, kScale = 2, kSimilarity = 3, kMatchRows = 4 };

XCOS_HD constexpr int64_t match_table_rows(int count) { return 2 * (kMatchRows + int64_t{count}); }

template <typename T>
__global__ void __launch_bounds__(kMatchThreads, kMatchBlocks)
    match_backward(const __grid_constant__ MatchParams<typename Element<T>::Result> p) {
  using R = typename Element<T>::Result;
  R* const table = p.workspace != nullptr
                       ? p.workspace + blockIdx.x * p.table_size
                       : reinterpret_cast<R*>(dynamic_shared() + (p.staged ? 2 * p.map_bytes : 0));
  const int64_t items = 2 * p.cells;
  const R share = p.symmetric ? R(0.5) : R(1);
  const auto row_of = [&](int side, int row) { return table + (side * kMatchRows + row) * p.cells; };

  for (int64_t pair = blockIdx.x; pair < p.pairs; pair += gridDim.x) {
    const PairView<T> maps = load_pair<T>(p, pair);
    const R* const grad = p.grad + pair * p.cells;
    for (int64_t item = threadIdx.x; item < items; item += blockDim.x) {
      const int side = item < p.cells ? 0 : 1;
      const int64_t cell = item - side * p.cells;
      const MapView<T> own = maps.side(side == 1);
      const MapView<T> other = maps.side(side == 0);
      const R norm = norm_of<T, R>(own, p.channels, cell);
      row_of(side, kNorm)[cell] = norm;
      if (side == 1 && !p.symmetric) continue;
      const Neighbours n(cell, p.height, p.width, p.window);
      const MatchResult<R> found = match_cell(p, own, other, n, norm, side == 1);
      if (p.best) {
        row_of(side, kChosen)[cell] = static_cast<R>(found.chosen);
      } else {
        row_of(side, kExtreme)[cell] = found.extreme;
        row_of(side, kScale)[cell] = R(1) / found.total;
        row_of(side, kSimilarity)[cell] = found.similarity(false);
      }
    }
    __syncthreads();

    // dL/dcosine that a cell passes to its candidate with a number.
    const auto passed_on = [&](int side, int64_t cell, int number, R cosine) {
      const R incoming = share * grad[cell];
      if (p.best) return row_of(side, kChosen)[cell] == static_cast<R>(number) ? incoming : R(0);
      const R probability = exponential((cosine - row_of(side, kExtreme)[cell]) * p.inverse_temperature) *
                            row_of(side, kScale)[cell];
      return soft_gradient(incoming, probability, cosine, row_of(side, kSimilarity)[cell],
                           p.inverse_temperature);
    };

    for (int64_t item = threadIdx.x; item < items; item += blockDim.x) {
      const int side = item < p.cells ? 0 : 1;
      const int64_t cell = item - side * p.cells;
      const MapAccess<void> to = side == 0 ? p.grad_a : p.grad_b;
      if (to.data == nullptr) continue;
      const MapView<T> own = maps.side(side == 1);
      const MapView<T> other = maps.side(side == 0);
      const Neighbours n(cell, p.height, p.width, p.window);
      const R norm = row_of(side, kNorm)[cell];
      const R own_inverse = R(1) / clamp_norm(norm, p.eps);
      // The thread's own column: coefficient k at k * cells.
      R* const coefficients = table + (2 * kMatchRows + side * p.window.count) * p.cells + cell;
      R along = R(0);
      for_each_candidate(
          p, own, other, n, norm, side == 1, [&](int number, int64_t at, R cosine, R other_norm) {
            R gradient = R(0);
            if (side == 0 || p.symmetric) gradient += passed_on(side, cell, number, cosine);
            // Seen from the candidate, this cell lies the opposite way.
            if (side == 1 || p.symmetric)
              gradient += passed_on(1 - side, at, p.window.count - 1 - number, cosine);
            along += gradient * cosine;
            const R other_inverse = R(1) / clamp_norm(other_norm, p.eps);
            // By contract nothing flows into a zero cell; what it would pass on is zero anyway.
            const bool zero = norm == R(0) || other_norm == R(0);
            coefficients[number * p.cells] = zero ? R(0) : gradient * own_inverse * other_inverse;
          });
      // A clamped norm is a constant, so its own term vanishes.
      const R from_own = norm < p.eps ? R(0) : along * own_inverse * own_inverse;
      const T* x = own.cell(cell);
      T* out = element<T>(to, pair, cell, 0);
      for (int64_t c = 0; c < p.channels; ++c) {
        R sum = -from_own * Element<T>::load(x[c * own.channel_stride]);
        for (int row = n.first_row; row <= n.last_row; ++row) {
          const int64_t line = static_cast<int64_t>(n.row + row) * p.width + n.column;
          const int number = (row + p.window.rows) * p.window.across + p.window.columns;
          const T* y = other.data + c * other.channel_stride;
#pragma unroll 3
          for (int column = n.first_column; column <= n.last_column; ++column) {
            sum += coefficients[(number + column) * p.cells] *
                   Element<T>::load(y[(line + column) * other.cell_stride]);
          }
        }
        out[c * to.channel_stride] = Element<T>::store(sum);
      }
    }
    __syncthreads();  // the table is the next pair's
  }
}

// ------------------------------------------------------------------------------------------------ on the
// host

struct MatchPlan {
  bool staged;
  int64_t map_bytes;
  int64_t table_size;   // values
  int64_t table_bytes;  // 0: no table
  bool table_shared;
  int64_t blocks;
  int threads;
  int64_t shared_bytes;
};

MatchPlan plan_match(const MatchProblem& problem, bool backward) {
  const PairShape& shape = problem.pair.shape;
  const int64_t size = scalar_size(problem.pair.scalar);
  MatchPlan plan = {};
  plan.blocks = shape.pairs;
  // Items that threads have: a cell, or a cell of either map.
  plan.threads = (backward ? 2 : 1) * shape.cells <= kMatchThreads / 2 ? kMatchThreads / 2 : kMatchThreads;
  if (backward) {
    plan.table_size = match_table_rows(match_window(problem).count) * shape.cells;
    plan.table_bytes = round_up(plan.table_size * scalar_size(result_scalar(problem.pair.scalar)), 16);
    plan.table_shared = plan.table_bytes <= kStagedBytes;
    if (!plan.table_shared) {
      const int64_t fitting = kMatchWorkspace / plan.table_bytes;
      const int64_t most = fitting < 1 ? 1 : fitting < 4096 ? fitting : 4096;
      if (plan.blocks > most) plan.blocks = most;
    }
  }
  const int64_t left = kStagedBytes - (plan.table_shared ? plan.table_bytes : 0);
  // The bounds come first: they keep the product from overflowing.
  plan.staged = shape.channels <= kStagedBytes && shape.cells <= kStagedBytes &&
                2 * round_up(shape.channels * shape.cells * size, 16) <= left;
  if (plan.staged) plan.map_bytes = round_up(shape.channels * shape.cells * size, 16);
  plan.shared_bytes = 2 * plan.map_bytes + (plan.table_shared ? plan.table_bytes : 0);
  return plan;
}

template <typename T>
MatchParams<typename Element<T>::Result> match_params(const MatchProblem& problem, const MatchPlan& plan) {
  using R = typename Element<T>::Result;
  MatchParams<R> p = {};
  p.pairs = problem.pair.shape.pairs;
  p.channels = problem.pair.shape.channels;
  p.cells = problem.pair.shape.cells;
  p.height = static_cast<int>(problem.height);
  p.width = static_cast<int>(problem.width);
  p.window = match_window(problem);
  p.best = problem.match == Match::best;
  p.symmetric = problem.symmetric;
  p.eps = positive<R>(problem.pair.eps);
  p.inverse_temperature = static_cast<R>(match_inverse_temperature(problem));
  p.a = access_of(problem.pair.a);
  p.b = access_of(problem.pair.b);
  find_vectors(problem.pair.shape, problem.pair.scalar, p.a);
  find_vectors(problem.pair.shape, problem.pair.scalar, p.b);
  p.table_size = plan.table_bytes / static_cast<int64_t>(sizeof(R));
  p.staged = plan.staged;
  p.map_bytes = plan.map_bytes;
  return p;
}

// A launch of kKernel; its blocks live on shared memory (see prefer_shared_memory).
template <auto kKernel, class Params>
Status launch_match(const MatchPlan& plan, const Params& params, Stream stream) {
  if (plan.staged) prefer_shared_memory<kKernel>();
  return launch_blocks<kKernel>(plan.blocks, plan.threads, plan.shared_bytes, params, stream);
}

template <typename T>
Status forward(const MatchProblem& problem, const MatchOutputs& outputs, Stream stream) {
  const MatchPlan plan = plan_match(problem, false);
  auto p = match_params<T>(problem, plan);
  p.similarity = static_cast<decltype(p.similarity)>(outputs.similarity);
  p.offsets = outputs.offsets;
  return launch_match<match_forward<T>>(plan, p, stream);
}

template <typename T>
Status backward(const MatchProblem& problem, const void* grad_similarity, MutableFeatureView grad_a,
                MutableFeatureView grad_b, void* workspace, Stream stream) {
  const MatchPlan plan = plan_match(problem, true);
  auto p = match_params<T>(problem, plan);
  p.grad = static_cast<decltype(p.grad)>(grad_similarity);
  p.grad_a = access_of(grad_a);
  p.grad_b = access_of(grad_b);
  if (!plan.table_shared) p.workspace = static_cast<decltype(p.workspace)>(workspace);
  return launch_match<match_backward<T>>(plan, p, stream);
}

}  // namespace

Status grid_match(const MatchProblem& problem, const MatchOutputs& outputs, Stream stream) {
  if (problem.pair.shape.pairs == 0) return 0;
  switch (problem.pair.scalar) {
    case Scalar::f16:
      return forward<__half>(problem, outputs, stream);
    case Scalar::bf16:
      return forward<__nv_bfloat16>(problem, outputs, stream);
    case Scalar::f32:
      return forward<float>(problem, outputs, stream);
    case Scalar::f64:
      return forward<double>(problem, outputs, stream);
  }
  return static_cast<Status>(cudaErrorInvalidValue);
}

int64_t grid_match_backward_workspace(const MatchProblem& problem) {
  const MatchPlan plan = plan_match(problem, true);
  return plan.table_shared ? 0 : plan.blocks * plan.table_bytes;
}

Status grid_match_backward(const MatchProblem& problem, const void* grad_similarity,
                           MutableFeatureView grad_a, MutableFeatureView grad_b, void* workspace,
                           Stream stream) {
  if (problem.pair.shape.pairs == 0 || (grad_a.data == nullptr && grad_b.data == nullptr)) return 0;
  switch (problem.pair.scalar) {
    case Scalar::f16:
      return backward<__half>(problem, grad_similarity, grad_a, grad_b, workspace, stream);
    case Scalar::bf16:
      return backward<__nv_bfloat16>(problem, grad_similarity, grad_a, grad_b, workspace, stream);
    case Scalar::f32:
      return backward<float>(problem, grad_similarity, grad_a, grad_b, workspace, stream);
    case Scalar::f64:
      return backward<double>(problem, grad_similarity, grad_a, grad_b, workspace, stream);
  }
  return static_cast<Status>(cudaErrorInvalidValue);
}

}  // namespace xcos::cuda
