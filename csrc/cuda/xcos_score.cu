// Forward pass: S, W and the score of every pair in one pass over the features.
#include "cuda/pair_kernels.cuh"
#include "cuda/xcos_score.h"

namespace xcos::cuda {
namespace {

template <typename R>
struct ForwardParams {
  int64_t pairs;
  int64_t channels;
  int64_t cells;
  MapAccess<const void> a;
  MapAccess<const void> b;
  AttentionParams<R> attention;
  R eps;
  R* score;
  R* similarity;
  R* weights;
  StagedLayout layout;
  GeneralLayout general;
};

template <typename R>
struct ForwardSums {
  R weighted = 0;    // sum W S, or sum q S for norm attention
  R similarity = 0;  // norm attention: sum S
  R product = 0;     // norm attention: sum q
};

// S of one tile of cells from their moments, and everything that follows from S cell by cell.
template <typename R, class Group, int kCells>
__device__ inline void forward_tile(const ForwardParams<R>& p, const AttentionRow<R, Group, kCells>& row,
                                    const Group& group, int64_t pair, int64_t first_cell, int count,
                                    const CellTable<R>& table, bool keep_products, ForwardSums<R>& sums) {
  const int64_t first = pair * p.cells + first_cell;
  spread<kCells>(group, count, [&](int i, int slot) {
    const CellMoments<R> m = table.moments(i);
    const CellCosine<R> c = cell_cosine(m, root(m.xx), root(m.yy), p.eps);
    if (p.similarity != nullptr) p.similarity[first + i] = c.cosine;
    if (p.attention.mode == Attention::norm) {
      const R product = c.x_norm * c.y_norm;
      sums.weighted += product * c.cosine;
      sums.similarity += c.cosine;
      sums.product += product;
      if (keep_products) {
        table.at(0, i) = product;
      } else if (p.weights != nullptr) {
        p.weights[first + i] = product;
      }
    } else {
      const R weight = row.weight(first_cell + i, slot);
      sums.weighted += weight * c.cosine;
      if (p.weights != nullptr) p.weights[first + i] = weight;
    }
  });
}

// Score, and W of norm attention, once all cells of a pair are known. products: kept by forward_tile, or null
// when they lie in p.weights.
template <int kCells, typename R, class Group>
__device__ inline void forward_finish(const ForwardParams<R>& p, const Group& group, int64_t pair,
                                      const R* products, const ForwardSums<R>& sums) {
  if (p.attention.mode != Attention::norm) {
    if (p.score == nullptr) return;
    R total[1] = {sums.weighted};
    group.sum(total);
    if (group.rank == 0) p.score[pair] = total[0];
    return;
  }
  R total[3] = {sums.weighted, sums.similarity, sums.product};
  group.sum(total);
  const bool silent = total[2] == R(0);
  if (p.score != nullptr && group.rank == 0) {
    p.score[pair] = silent ? total[1] * p.attention.uniform : total[0] / total[2];
  }
  if (p.weights == nullptr) return;
  R* weights = p.weights + pair * p.cells;
  spread<kCells>(group, p.cells, [&](int64_t i, int) {
    const R product = products != nullptr ? products[i] : weights[i];
    weights[i] = silent ? p.attention.uniform : product / total[2];
  });
}

template <typename T, int kChannels, int kCells>
__global__ void __launch_bounds__(kStagedThreads, kStagedBlocks)
    staged_forward(const __grid_constant__ ForwardParams<typename Element<T>::Result> p) {
  using R = typename Element<T>::Result;
  constexpr bool kTuned = kChannels > 0;
  const StagedShape<T, kChannels, kCells> shape = {p.layout};
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const int warp = static_cast<int>(threadIdx.x / kWarp);
  const int warps = static_cast<int>(blockDim.x / kWarp);
  const WarpGroup group = {lane};

  unsigned char* shared = dynamic_shared() + warp * p.layout.warp_bytes;
  T* x = reinterpret_cast<T*>(shared);
  T* y = reinterpret_cast<T*>(shared + p.layout.map_bytes);
  const CellTable<R> table = {reinterpret_cast<R*>(shared + 2 * p.layout.map_bytes), shape.table_parts(),
                              shape.cells()};

  const int64_t step = static_cast<int64_t>(gridDim.x) * warps;
  for (int64_t pair = static_cast<int64_t>(blockIdx.x) * warps + warp; pair < p.pairs; pair += step) {
    stage_map<kTuned>(p.a, shape, pair, x, group);
    stage_map<kTuned>(p.b, shape, pair, y, group);
    // The attention is read while the features are on their way.
    const AttentionRow<R, WarpGroup, kCells> row(p.attention, pair, shape.cells(), group);
    copy_async_wait();
    group.sync();
    staged_moments<kTuned>(shape, x, y, p.a.channels_last, p.b.channels_last, table, lane);
    group.sync();
    ForwardSums<R> sums;
    forward_tile(p, row, group, pair, 0, shape.cells(), table, true, sums);
    forward_finish<kCells>(p, group, pair, table.data, sums);
    // No barrier: the next pair's maps overwrite what was read before the last one, its table follows the
    // next.
  }
}

template <typename T>
__global__ void __launch_bounds__(kGeneralThreads, kGeneralBlocks)
    general_forward(const __grid_constant__ ForwardParams<typename Element<T>::Result> p) {
  using R = typename Element<T>::Result;
  R* shared = reinterpret_cast<R*>(dynamic_shared());
  const GeneralGroup group = {static_cast<int>(threadIdx.x), shared + 4 * kGeneralTile};
  const int64_t items = p.pairs * p.general.parts;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int64_t pair = item / p.general.parts;
    const AttentionRow<R, GeneralGroup, 0> row(p.attention, pair, p.cells, group);
    ForwardSums<R> sums;
    for (int64_t tile = item % p.general.parts; tile < p.general.tiles; tile += p.general.parts) {
      const int64_t first = tile * kGeneralTile;
      const int count = static_cast<int>(p.cells - first < kGeneralTile ? p.cells - first : kGeneralTile);
      const GeneralShare share(p.general.along_channels, count, group.rank);
      const CellTable<R> table = general_moments<T>(p.a, p.b, p.channels, pair, first, count, share, shared);
      group.sync();
      forward_tile(p, row, group, pair, first, count, table, false, sums);
      group.sync();
    }
    forward_finish<0>(p, group, pair, static_cast<const R*>(nullptr), sums);
  }
}

template <typename T>
Status forward(const PairProblem& problem, const XcosScoreOutputs& outputs, Stream stream) {
  using R = typename Element<T>::Result;
  ForwardParams<R> p = {};
  p.pairs = problem.shape.pairs;
  p.channels = problem.shape.channels;
  p.cells = problem.shape.cells;
  p.a = access_of(problem.a);
  p.b = access_of(problem.b);
  p.attention = attention_params<R>(problem);
  p.eps = positive<R>(problem.eps);
  p.score = static_cast<R*>(outputs.score);
  p.similarity = static_cast<R*>(outputs.similarity);
  p.weights = static_cast<R*>(outputs.attention);
  const bool divisible = p.score == nullptr && (p.weights == nullptr || problem.mode != Attention::norm);
  const PairPlan plan = plan_pairs(problem, p.a, p.b, nullptr, nullptr, divisible);
  p.layout = plan.layout;
  p.general = plan.general;
  if (!plan.staged) return launch<general_forward<T>>(plan, p, stream);
  if constexpr (!std::is_same_v<T, double>) {
    if (plan.tuned) return launch<staged_forward<T, kTunedChannels, kTunedCells>>(plan, p, stream);
  }
  return launch<staged_forward<T, 0, 0>>(plan, p, stream);
}

}  // namespace

Status xcos_score(const PairProblem& problem, const XcosScoreOutputs& outputs, Stream stream) {
  const bool wanted =
      outputs.score != nullptr || outputs.similarity != nullptr || outputs.attention != nullptr;
  if (problem.shape.pairs == 0 || !wanted) return 0;
  switch (problem.scalar) {
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

}  // namespace xcos::cuda
