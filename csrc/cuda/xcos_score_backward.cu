// Backward pass: the features are read once more, their moments recomputed, gradients written in one go.
#include "cuda/pair_kernels.cuh"
#include "cuda/xcos_score.h"

namespace xcos::cuda {
namespace {

template <typename R>
struct BackwardParams {
  int64_t pairs;
  int64_t channels;
  int64_t cells;
  MapAccess<const void> a;
  MapAccess<const void> b;
  AttentionParams<R> attention;
  R eps;
  const R* score;  // gradients that come in
  int64_t score_stride;
  const R* similarity;
  const R* weights;
  MapAccess<void> grad_a;  // gradients that go out
  MapAccess<void> grad_b;
  R* grad_attention;
  bool coupled;  // a cell's gradient depends on the pair's other cells
  StagedLayout layout;
  GeneralLayout general;
};

template <typename R>
struct BackwardSums {
  R weighted = 0;  // sum W dW; norm attention: sum q dW
  R product = 0;   // norm attention: sum q
};

// Incoming gradients of one pair. kCells > 0: read once, kept in registers.
template <typename R, class Group, int kCells>
struct IncomingRow {
  const BackwardParams<R>& params;
  int64_t offset;
  R score = R(0);
  R similarity[kSlots<kCells, Group>];
  R weight[kSlots<kCells, Group>];

  __device__ IncomingRow(const BackwardParams<R>& p, int64_t pair, const Group& group)
      : params(p), offset(pair * p.cells) {
    if (p.score != nullptr) score = p.score[pair * p.score_stride];
    if constexpr (kCells > 0) {
      spread<kCells>(group, kCells, [&](int cell, int slot) {
        similarity[slot] = load(p.similarity, cell);
        weight[slot] = load(p.weights, cell);
      });
    }
  }

  __device__ R load(const R* data, int64_t cell) const {
    return data == nullptr ? R(0) : data[offset + cell];
  }

  // dL/dS for a given weight, dL/dW for a given cosine.
  __device__ R grad_cosine(R w, int64_t cell, int slot) const {
    return score * w + (kCells > 0 ? similarity[slot] : load(params.similarity, cell));
  }
  __device__ R grad_weight(R cosine, int64_t cell, int slot) const {
    return score * cosine + (kCells > 0 ? weight[slot] : load(params.weights, cell));
  }
};

// Turns the moments of one tile of cells into (x.y, |x|, |y|); add_up: and adds up what couples the pair's
// cells.
template <typename R, class Group, int kCells>
__device__ inline void backward_norms(const BackwardParams<R>& p, const AttentionRow<R, Group, kCells>& row,
                                      const IncomingRow<R, Group, kCells>& incoming, const Group& group,
                                      int64_t first_cell, int count, const CellTable<R>& table, bool add_up,
                                      BackwardSums<R>& sums) {
  spread<kCells>(group, count, [&](int i, int slot) {
    const CellMoments<R> m = table.moments(i);
    const R x_norm = root(m.xx);
    const R y_norm = root(m.yy);
    table.at(0, i) = m.dot;
    table.at(1, i) = x_norm;
    table.at(2, i) = y_norm;
    if (!add_up) return;
    const CellCosine<R> c = cell_cosine(m, x_norm, y_norm, p.eps);
    const R grad_weight = incoming.grad_weight(c.cosine, first_cell + i, slot);
    if (p.attention.mode == Attention::norm) {
      const R product = x_norm * y_norm;
      sums.product += product;
      sums.weighted += product * grad_weight;
    } else {
      sums.weighted += row.weight(first_cell + i, slot) * grad_weight;
    }
  });
}

// Adds the sums up over the group, and turns `weighted` into sum W dW.
template <typename R, class Group>
__device__ inline void backward_combine(const BackwardParams<R>& p, const Group& group,
                                        BackwardSums<R>& sums) {
  if (!p.coupled) return;
  R total[2] = {sums.weighted, sums.product};
  group.sum(total);
  sums.weighted = total[0];
  sums.product = total[1];
  if (p.attention.mode == Attention::norm) sums.weighted = total[0] / total[1];
}

// From backward_norms' values: the attention's gradient, and in their place the coefficients of the cells'
// gradients.
template <typename R, class Group, int kCells>
__device__ inline void backward_tile(const BackwardParams<R>& p, const AttentionRow<R, Group, kCells>& row,
                                     const IncomingRow<R, Group, kCells>& incoming, const Group& group,
                                     int64_t pair, int64_t first_cell, int count, const CellTable<R>& table,
                                     const BackwardSums<R>& sums) {
  spread<kCells>(group, count, [&](int i, int slot) {
    const CellMoments<R> m = {table.at(0, i), R(0), R(0)};
    const CellCosine<R> c = cell_cosine(m, table.at(1, i), table.at(2, i), p.eps);
    const R grad_weight = incoming.grad_weight(c.cosine, first_cell + i, slot);
    R weight;
    R grad_product = R(0);
    if (p.attention.mode == Attention::norm) {
      const bool silent = sums.product == R(0);
      weight = silent ? p.attention.uniform : c.x_norm * c.y_norm / sums.product;
      if (!silent) grad_product = (grad_weight - sums.weighted) / sums.product;
    } else {
      weight = row.weight(first_cell + i, slot);
    }
    if (p.grad_attention != nullptr) {
      R grad = R(0);
      if (p.attention.mode == Attention::weights) grad = grad_weight;
      if (p.attention.mode == Attention::logits) {
        grad = weight * (grad_weight - sums.weighted) / p.attention.temperature;
      }
      p.grad_attention[pair * p.cells + first_cell + i] = grad;
    }
    table.set_gradient(
        i, cell_gradient(c, p.eps, incoming.grad_cosine(weight, first_cell + i, slot), grad_product));
  });
}

template <typename T, int kChannels, int kCells>
__global__ void __launch_bounds__(kStagedThreads, kStagedBlocks)
    staged_backward(const __grid_constant__ BackwardParams<typename Element<T>::Result> p) {
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
    // Attention and incoming gradients are read while the features are on their way.
    const AttentionRow<R, WarpGroup, kCells> row(p.attention, pair, shape.cells(), group);
    const IncomingRow<R, WarpGroup, kCells> incoming(p, pair, group);
    copy_async_wait();
    group.sync();
    staged_moments<kTuned>(shape, x, y, p.a.channels_last, p.b.channels_last, table, lane);
    group.sync();
    BackwardSums<R> sums;
    backward_norms(p, row, incoming, group, 0, shape.cells(), table, p.coupled, sums);
    backward_combine(p, group, sums);
    backward_tile(p, row, incoming, group, pair, 0, shape.cells(), table, sums);
    if (p.grad_a.data != nullptr || p.grad_b.data != nullptr) {
      group.sync();
      staged_gradients<kTuned>(shape, x, y, p.a.channels_last, p.b.channels_last, table, lane);
      group.sync();
      if (p.grad_a.data != nullptr) unstage_map<kTuned>(p.grad_a, shape, pair, x, group);
      if (p.grad_b.data != nullptr) unstage_map<kTuned>(p.grad_b, shape, pair, y, group);
    }
    // Nobody may overwrite what another lane still reads.
    group.sync();
  }
}

template <typename T>
__global__ void __launch_bounds__(kGeneralThreads, kGeneralBlocks)
    general_backward(const __grid_constant__ BackwardParams<typename Element<T>::Result> p) {
  using R = typename Element<T>::Result;
  R* shared = reinterpret_cast<R*>(dynamic_shared());
  const GeneralGroup group = {static_cast<int>(threadIdx.x), shared + 4 * kGeneralTile};
  const int64_t items = p.pairs * p.general.parts;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int64_t pair = item / p.general.parts;
    const AttentionRow<R, GeneralGroup, 0> row(p.attention, pair, p.cells, group);
    const IncomingRow<R, GeneralGroup, 0> incoming(p, pair, group);
    BackwardSums<R> sums;
    // Coupled cells need two rounds over the tiles: sums, then gradients. One tile stays where it is in
    // between.
    for (int round = p.coupled ? 0 : 1; round < 2; ++round) {
      if (round == 1) backward_combine(p, group, sums);
      for (int64_t tile = item % p.general.parts; tile < p.general.tiles; tile += p.general.parts) {
        const int64_t first = tile * kGeneralTile;
        const int count = static_cast<int>(p.cells - first < kGeneralTile ? p.cells - first : kGeneralTile);
        const GeneralShare share(p.general.along_channels, count, group.rank);
        CellTable<R> table = {shared, share.slices, share.pitch()};
        const bool at_hand = round == 1 && p.coupled && p.general.tiles == 1;
        if (!at_hand) {
          general_moments<T>(p.a, p.b, p.channels, pair, first, count, share, shared);
          group.sync();
          backward_norms(p, row, incoming, group, first, count, table, round == 0, sums);
        }
        if (round == 1) {
          backward_tile(p, row, incoming, group, pair, first, count, table, sums);
          group.sync();
          general_gradients<T>(p.a, p.b, p.grad_a, p.grad_b, p.channels, pair, first, count, share, table);
        }
        group.sync();
      }
    }
  }
}

template <typename T>
Status backward(const PairProblem& problem, const XcosScoreGradients& gradients,
                const XcosScoreGradientOutputs& outputs, Stream stream) {
  using R = typename Element<T>::Result;
  BackwardParams<R> p = {};
  p.pairs = problem.shape.pairs;
  p.channels = problem.shape.channels;
  p.cells = problem.shape.cells;
  p.a = access_of(problem.a);
  p.b = access_of(problem.b);
  p.attention = attention_params<R>(problem);
  p.eps = positive<R>(problem.eps);
  p.score = static_cast<const R*>(gradients.score);
  p.score_stride = gradients.score_stride;
  p.similarity = static_cast<const R*>(gradients.similarity);
  p.weights = static_cast<const R*>(gradients.attention);
  p.grad_a = access_of(outputs.a);
  p.grad_b = access_of(outputs.b);
  p.grad_attention = static_cast<R*>(outputs.attention);
  p.coupled =
      problem.mode == Attention::norm || (problem.mode == Attention::logits && p.grad_attention != nullptr);
  const PairPlan plan = plan_pairs(problem, p.a, p.b, &p.grad_a, &p.grad_b, !p.coupled);
  p.layout = plan.layout;
  p.general = plan.general;
  if (!plan.staged) return launch<general_backward<T>>(plan, p, stream);
  if constexpr (!std::is_same_v<T, double>) {
    if (plan.tuned) return launch<staged_backward<T, kTunedChannels, kTunedCells>>(plan, p, stream);
  }
  return launch<staged_backward<T, 0, 0>>(plan, p, stream);
}

}  // namespace

Status xcos_score_backward(const PairProblem& problem, const XcosScoreGradients& gradients,
                           const XcosScoreGradientOutputs& outputs, Stream stream) {
  const bool wanted = outputs.a.data != nullptr || outputs.b.data != nullptr || outputs.attention != nullptr;
  if (problem.shape.pairs == 0 || !wanted) return 0;
  switch (problem.scalar) {
    case Scalar::f16:
      return backward<__half>(problem, gradients, outputs, stream);
    case Scalar::bf16:
      return backward<__nv_bfloat16>(problem, gradients, outputs, stream);
    case Scalar::f32:
      return backward<float>(problem, gradients, outputs, stream);
    case Scalar::f64:
      return backward<double>(problem, gradients, outputs, stream);
  }
  return static_cast<Status>(cudaErrorInvalidValue);
}

}  // namespace xcos::cuda
