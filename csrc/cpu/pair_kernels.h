// The pair kernels behind grid_cosine and xcos_score. One pass over a pair's two maps gives the three inner
// products of every cell; everything after that works on a few hundred numbers in the first-level cache. The
// backward pass computes the inner products again instead of storing them: the maps are then still in the
// cache when the gradients are written, so memory is read once and written once.
#pragma once

#include <cstdlib>
#include <new>
#include <type_traits>

#include "core/cell_math.h"
#include "core/parallel.h"
#include "core/xcos_score.h"
#include "cpu/vec.h"

namespace xcos::cpu::XCOS_ISA {
namespace {

// Cell arrays are padded so that loops over them run in whole vectors.
constexpr int64_t kPad = 16;

XCOS_INLINE int64_t padded(int64_t cells) { return (cells + kPad - 1) / kPad * kPad; }

// Working memory of one thread: kArrays arrays of padded(cells) + kPad values, on the stack for usual
// grids.
template <typename A>
class Scratch {
 public:
  static constexpr int64_t kArrays = 15;
  static constexpr int64_t kStackCells = 64 + kPad;

  explicit Scratch(int64_t cells) : stride_(padded(cells) + kPad), data_(stack_) {
    if (stride_ > kStackCells) {
      data_ = static_cast<A*>(std::malloc(sizeof(A) * kArrays * stride_));
      if (data_ == nullptr) throw std::bad_alloc();
    }
  }
  ~Scratch() {
    if (data_ != stack_) std::free(data_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  A* array(int index) { return data_ + index * stride_; }
  int64_t stride() const { return stride_; }

 private:
  int64_t stride_;
  A* data_;
  alignas(64) A stack_[kArrays * kStackCells];
};

// Which inner loop fits a pair of maps.
enum class Layout { cells_adjacent, channels_adjacent, strided };

XCOS_INLINE Layout layout_of(const PairProblem& p) {
  const bool one_cell = p.shape.cells == 1, one_channel = p.shape.channels == 1;
  if ((p.a.cell_stride == 1 || one_cell) && (p.b.cell_stride == 1 || one_cell) && !one_cell)
    return Layout::cells_adjacent;
  if ((p.a.channel_stride == 1 || one_channel) && (p.b.channel_stride == 1 || one_channel))
    return Layout::channels_adjacent;
  return Layout::strided;
}

template <typename A>
struct Moments {
  A* dot;
  A* xx;
  A* yy;
};

// The next pair's maps, asked for while this pair's are being worked on: between two pairs the loads would
// otherwise pause for as long as the cells' cosines and weights take.
struct Ahead {
  const char* a = nullptr;
  const char* b = nullptr;
  int64_t fetched = 0;

  // Asks for both up to byte `end`, a cache line at a time.
  XCOS_INLINE void fetch_until(int64_t end) {
    if (a == nullptr) return;
    for (; fetched < end; fetched += 64) {
      __builtin_prefetch(a + fetched);
      __builtin_prefetch(b + fetched);
    }
  }
};

// Sums over channels for N cells.
template <typename A, int N>
struct Sums {
  Vec<A, N> dot = {}, xx = {}, yy = {};

  template <typename T>
  XCOS_INLINE void add(const T* a, const T* b) {
    Vec<A, N> x = load<N>(a);
    Vec<A, N> y = load<N>(b);
    if constexpr (sizeof(x) >= 16) {
      XCOS_KEEP(x);
      XCOS_KEEP(y);
    }
    dot += x * y;
    xx += x * x;
    yy += y * y;
  }
  XCOS_INLINE void write(const Moments<A>& out, int64_t cell) const {
    store<N>(out.dot + cell, dot);
    store<N>(out.xx + cell, xx);
    store<N>(out.yy + cell, yy);
  }
};

// B vectors of N cells from `first` on, then one of M cells (none if 0) from `tail` on, all channels in one
// pass.
template <typename T, typename A, int N, int B, int M>
XCOS_INLINE void moments_block(const T* a, const T* b, const PairProblem& p, int64_t first, int64_t tail,
                               const Moments<A>& out, Ahead ahead) {
  Sums<A, N> sums[B > 0 ? B : 1];
  Sums<A, (M > 0 ? M : 1)> rest;
  const int64_t row = p.shape.cells * static_cast<int64_t>(sizeof(T));
  for (int64_t c = 0; c < p.shape.channels; ++c) {
    ahead.fetch_until((c + 1) * row);
#pragma GCC unroll 4
    for (int i = 0; i < B; ++i) sums[i].add(a + first + i * N, b + first + i * N);
    if constexpr (M > 0) rest.add(a + tail, b + tail);
    a += p.a.channel_stride;
    b += p.b.channel_stride;
  }
#pragma GCC unroll 4
  for (int i = 0; i < B; ++i) sums[i].write(out, first + i * N);
  if constexpr (M > 0) rest.write(out, tail);
}

// Full vectors first - first + B * N, then the tail in the narrowest vector that holds it. The tail's vector
// overlaps its neighbour instead of being masked: the shared cells are computed twice, with the same result.
template <typename T, typename A, int N, int B>
XCOS_INLINE void moments_and_tail(const T* a, const T* b, const PairProblem& p, int64_t first,
                                  const Moments<A>& out, const Ahead& ahead) {
  const int64_t cells = p.shape.cells, left = cells - first - B * N;
  if (left == 0) return moments_block<T, A, N, B, 0>(a, b, p, first, 0, out, ahead);
  if constexpr (N >= 8)
    if (left <= N / 4) return moments_block<T, A, N, B, N / 4>(a, b, p, first, cells - N / 4, out, ahead);
  moments_block<T, A, N, B, N>(a, b, p, first, cells - N, out, ahead);
}

// Vectors over cells; cells >= N.
template <typename T, typename A, int N>
XCOS_INLINE void moments_over_cells(const T* a, const T* b, const PairProblem& p, const Moments<A>& out,
                                    Ahead ahead) {
  const int64_t cells = p.shape.cells;
  int64_t at = 0;
  for (; cells - at > 4 * N; at += 3 * N) {
    moments_block<T, A, N, 3, 0>(a, b, p, at, 0, out, ahead);
    ahead = {};
  }
  switch ((cells - at) / N) {
    case 4:
    case 3:
      return moments_and_tail<T, A, N, 3>(a, b, p, at, out, ahead);
    case 2:
      return moments_and_tail<T, A, N, 2>(a, b, p, at, out, ahead);
    case 1:
      return moments_and_tail<T, A, N, 1>(a, b, p, at, out, ahead);
    default:
      return moments_block<T, A, N, 0, N>(a, b, p, 0, cells - N, out, ahead);
  }
}

// Vectors over channels, one cell after the other.
template <typename T, typename A, int N>
XCOS_INLINE void moments_over_channels(const T* a, const T* b, const PairProblem& p, const Moments<A>& out,
                                       Ahead ahead) {
  const int64_t channels = p.shape.channels;
  const int64_t row = channels * static_cast<int64_t>(sizeof(T));
  for (int64_t cell = 0; cell < p.shape.cells; ++cell) {
    ahead.fetch_until((cell + 1) * row);
    const T* x_row = a + cell * p.a.cell_stride;
    const T* y_row = b + cell * p.b.cell_stride;
    Vec<A, N> dot = {}, xx = {}, yy = {};
    int64_t c = 0;
    for (; c + N <= channels; c += N) {
      const Vec<A, N> x = load<N>(x_row + c);
      const Vec<A, N> y = load<N>(y_row + c);
      dot += x * y;
      xx += x * x;
      yy += y * y;
    }
    A dot1 = sum_lanes<A, N>(dot), xx1 = sum_lanes<A, N>(xx), yy1 = sum_lanes<A, N>(yy);
    for (; c < channels; ++c) {
      const A x = load_one(x_row + c), y = load_one(y_row + c);
      dot1 += x * y;
      xx1 += x * x;
      yy1 += y * y;
    }
    out.dot[cell] = dot1;
    out.xx[cell] = xx1;
    out.yy[cell] = yy1;
  }
}

// Any strides, among them one map contiguous and the other channels_last.
template <typename T, typename A>
void moments_strided(const T* a, const T* b, const PairProblem& p, const Moments<A>& out) {
  for (int64_t cell = 0; cell < p.shape.cells; ++cell) {
    const T* x_at = a + cell * p.a.cell_stride;
    const T* y_at = b + cell * p.b.cell_stride;
    A dot = 0, xx = 0, yy = 0;
    for (int64_t c = 0; c < p.shape.channels; ++c) {
      const A x = load_one(x_at + c * p.a.channel_stride), y = load_one(y_at + c * p.b.channel_stride);
      dot += x * y;
      xx += x * x;
      yy += y * y;
    }
    out.dot[cell] = dot;
    out.xx[cell] = xx;
    out.yy[cell] = yy;
  }
}

template <typename T, typename A>
XCOS_INLINE void pair_moments(const T* a, const T* b, const PairProblem& p, Layout layout,
                              const Moments<A>& out, const Ahead& ahead) {
  constexpr int N = native_lanes<A>();
  if (layout == Layout::cells_adjacent) {
    if (p.shape.cells >= N) return moments_over_cells<T, A, N>(a, b, p, out, ahead);
    if (p.shape.cells >= 4) return moments_over_cells<T, A, (N < 4 ? N : 4)>(a, b, p, out, ahead);
  } else if (layout == Layout::channels_adjacent) {
    return moments_over_channels<T, A, N>(a, b, p, out, ahead);
  }
  moments_strided<T, A>(a, b, p, out);
}

// A value that is positive as a double stays positive as A.
template <typename A>
XCOS_INLINE A positive(double value) {
  const A narrow = static_cast<A>(value);
  return narrow > A(0) ? narrow : (sizeof(A) == 4 ? A(__FLT_MIN__) : A(__DBL_MIN__));
}

// Everything about the cells of one pair after the inner products.
template <typename A>
struct Cells {
  A* x_norm;
  A* y_norm;
  A* scale;
  A* cosine;
  A* weight;
  A norm_sum;  // sum of |x||y|, norm attention only
};

template <typename A, int N>
XCOS_INLINE Vec<A, N> square_root(Vec<A, N> v) {
  for (int i = 0; i < N; ++i) v[i] = sizeof(A) == 4 ? __builtin_sqrtf(v[i]) : __builtin_sqrt(v[i]);
  return v;
}

template <typename A>
XCOS_INLINE void cell_cosines(const Moments<A>& m, int64_t cells, A eps_value, const Cells<A>& out) {
  constexpr int N = native_lanes<A>();
  const Vec<A, N> eps = Vec<A, N>{} + eps_value;
  for (int64_t i = 0; i < cells; i += N) {
    const Vec<A, N> xx = load<N>(m.xx + i), yy = load<N>(m.yy + i);
    const CellCosine<Vec<A, N>> c = cell_cosine<Vec<A, N>>({load<N>(m.dot + i), xx, yy},
                                                           square_root<A, N>(xx), square_root<A, N>(yy), eps);
    store<N>(out.cosine + i, c.cosine);
    store<N>(out.x_norm + i, c.x_norm);
    store<N>(out.y_norm + i, c.y_norm);
    store<N>(out.scale + i, c.scale);
  }
}

// Sum over the cells of one pair: lanes first, then across, in a fixed order.
template <typename A, typename F>
XCOS_INLINE A sum_cells(int64_t cells, F value) {
  A lanes[kPad] = {};
  int64_t i = 0;
  for (; i + kPad <= cells; i += kPad)
    for (int64_t l = 0; l < kPad; ++l) lanes[l] += value(i + l);
  A total = 0;
  for (int64_t l = 0; l < kPad; ++l) total += lanes[l];
  for (; i < cells; ++i) total += value(i);
  return total;
}

template <typename A>
XCOS_INLINE void load_attention(const AttentionView& view, int64_t pair, int64_t cells, A* out) {
  const char* row = static_cast<const char*>(view.data) + pair * view.pair_stride * scalar_size(view.scalar);
  switch (view.scalar) {
    case Scalar::f32:
      for (int64_t i = 0; i < cells; ++i) out[i] = static_cast<A>(reinterpret_cast<const float*>(row)[i]);
      break;
    case Scalar::f64:
      for (int64_t i = 0; i < cells; ++i) out[i] = static_cast<A>(reinterpret_cast<const double*>(row)[i]);
      break;
    case Scalar::f16:
      for (int64_t i = 0; i < cells; ++i)
        out[i] = static_cast<A>(load_one(reinterpret_cast<const F16*>(row) + i));
      break;
    case Scalar::bf16:
      for (int64_t i = 0; i < cells; ++i)
        out[i] = static_cast<A>(load_one(reinterpret_cast<const BF16*>(row) + i));
      break;
  }
}

template <typename A>
XCOS_INLINE void cell_weights(const PairProblem& p, int64_t pair, Cells<A>& cell) {
  const int64_t cells = p.shape.cells;
  A* w = cell.weight;
  switch (p.mode) {
    case Attention::uniform: {
      const A each = A(1) / static_cast<A>(cells);
      for (int64_t i = 0; i < cells; ++i) w[i] = each;
      break;
    }
    case Attention::norm: {
      for (int64_t i = 0; i < cells; ++i) w[i] = cell.x_norm[i] * cell.y_norm[i];
      cell.norm_sum = sum_cells<A>(cells, [&](int64_t i) { return w[i]; });
      if (cell.norm_sum == A(0)) {
        for (int64_t i = 0; i < cells; ++i) w[i] = A(1) / static_cast<A>(cells);
      } else {
        const A inverse = A(1) / cell.norm_sum;
        for (int64_t i = 0; i < cells; ++i) w[i] *= inverse;
      }
      break;
    }
    case Attention::weights:
      load_attention(p.attention, pair, cells, w);
      break;
    case Attention::logits: {
      load_attention(p.attention, pair, cells, w);
      const A inverse_temperature = A(1) / positive<A>(p.temperature);
      A highest = w[0];
      for (int64_t i = 1; i < cells; ++i) highest = w[i] > highest ? w[i] : highest;
      // A NaN logit is not the largest, but reaches the sum; all -inf gives NaN, as in torch.
      for (int64_t i = 0; i < cells; ++i) w[i] = exp_nonpositive((w[i] - highest) * inverse_temperature);
      const A inverse = A(1) / sum_cells<A>(cells, [&](int64_t i) { return w[i]; });
      for (int64_t i = 0; i < cells; ++i) w[i] *= inverse;
      break;
    }
  }
}

template <typename A>
XCOS_INLINE void clear_padding(A* values, int64_t cells) {
  for (int64_t i = cells; i < padded(cells); ++i) values[i] = A(0);
}

// Inner products to weights of one pair: what forward and backward share.
template <typename T, typename A>
class PairState {
 public:
  PairState(const PairProblem& p, Scratch<A>& scratch)
      : moments{scratch.array(0), scratch.array(1), scratch.array(2)},
        cell{scratch.array(3), scratch.array(4), scratch.array(5), scratch.array(6), scratch.array(7), A(0)},
        problem_(p),
        layout_(layout_of(p)),
        fetch_ahead_(p.shape.channels * p.shape.cells * static_cast<int64_t>(sizeof(T)) <= kFetchAheadBytes) {
    clear_padding(moments.dot, p.shape.cells);
    clear_padding(moments.xx, p.shape.cells);
    clear_padding(moments.yy, p.shape.cells);
  }

  // What to fetch ahead while a pair is worked on: the next one of a range that ends at `end`.
  XCOS_INLINE Ahead after(int64_t pair, int64_t end) const {
    if (!fetch_ahead_ || pair + 1 >= end) return {};
    return {reinterpret_cast<const char*>(a(pair + 1)), reinterpret_cast<const char*>(b(pair + 1)), 0};
  }

  XCOS_INLINE void compute(int64_t pair, const Ahead& ahead, bool weights) {
    pair_moments<T, A>(a(pair), b(pair), problem_, layout_, moments, ahead);
    cell_cosines(moments, problem_.shape.cells, positive<A>(problem_.eps), cell);
    if (weights) cell_weights(problem_, pair, cell);
  }

  const T* a(int64_t pair) const {
    return static_cast<const T*>(problem_.a.data) + pair * problem_.a.pair_stride;
  }
  const T* b(int64_t pair) const {
    return static_cast<const T*>(problem_.b.data) + pair * problem_.b.pair_stride;
  }

  Moments<A> moments;
  Cells<A> cell;

 private:
  // Two pairs' maps fit the first-level cache up to here; larger ones keep the hardware's prefetcher busy
  // anyway.
  static constexpr int64_t kFetchAheadBytes = 8192;

  const PairProblem& problem_;
  Layout layout_;
  bool fetch_ahead_;
};

template <typename T>
void score_range(const PairProblem& p, const XcosScoreOutputs& out, int64_t begin, int64_t end) {
  using A = typename Accumulate<T>::type;
  const int64_t cells = p.shape.cells;
  Scratch<A> scratch(cells);
  PairState<T, A> state(p, scratch);
  A* score = static_cast<A*>(out.score);
  A* similarity = static_cast<A*>(out.similarity);
  A* attention = static_cast<A*>(out.attention);
  const bool weights = score != nullptr || attention != nullptr;
  for (int64_t n = begin; n < end; ++n) {
    state.compute(n, state.after(n, end), weights);
    const A* s = state.cell.cosine;
    const A* w = state.cell.weight;
    if (score != nullptr) score[n] = sum_cells<A>(cells, [&](int64_t i) { return w[i] * s[i]; });
    if (similarity != nullptr) memcpy(similarity + n * cells, s, cells * sizeof(A));
    if (attention != nullptr) memcpy(attention + n * cells, w, cells * sizeof(A));
  }
}

// Coefficients of the gradient of one pair, an array each (see CellGradient).
template <typename A>
struct Coefficients {
  A* x_from_y;
  A* x_from_x;
  A* y_from_x;
  A* y_from_y;
};

template <typename A>
XCOS_INLINE void cell_gradients(const Cells<A>& cell, int64_t cells, A eps_value, const A* grad_cosine,
                                const A* grad_product, const Coefficients<A>& out) {
  constexpr int N = native_lanes<A>();
  const Vec<A, N> eps = Vec<A, N>{} + eps_value;
  for (int64_t i = 0; i < cells; i += N) {
    const CellCosine<Vec<A, N>> c = {load<N>(cell.cosine + i), load<N>(cell.x_norm + i),
                                     load<N>(cell.y_norm + i), load<N>(cell.scale + i)};
    const CellGradient<Vec<A, N>> gradient =
        cell_gradient<Vec<A, N>>(c, eps, load<N>(grad_cosine + i), load<N>(grad_product + i));
    store<N>(out.x_from_y + i, gradient.x_from_y);
    store<N>(out.x_from_x + i, gradient.x_from_x);
    store<N>(out.y_from_x + i, gradient.y_from_x);
    store<N>(out.y_from_y + i, gradient.y_from_y);
  }
}

// out = from_other * other + from_self * self, the cells' coefficients broadcast over channels.
template <typename T, typename A, int N>
XCOS_INLINE void combine_over_cells(const T* self, const T* other, int64_t self_step, int64_t other_step,
                                    T* out, int64_t out_step, const PairShape& shape, const A* from_self,
                                    const A* from_other) {
  for (int64_t at = 0; at < shape.cells; at += N) {
    const int64_t cell = at + N <= shape.cells ? at : shape.cells - N;
    const Vec<A, N> u = load<N>(from_self + cell), v = load<N>(from_other + cell);
    const T* s = self + cell;
    const T* o = other + cell;
    T* g = out + cell;
    for (int64_t c = 0; c < shape.channels; ++c, s += self_step, o += other_step, g += out_step)
      store<N>(g, load<N>(o) * v + load<N>(s) * u);
  }
}

// Both gradients at once where all four maps are contiguous, so that a pair is one run of channels * cells
// values. Vectors follow the run instead of the rows, which makes stores whole cache lines; the coefficients
// are read at (position mod cells) from arrays that repeat their beginning past their end.
template <typename T, typename A, int N, bool kStream>
XCOS_INLINE void combine_run(const T* a, const T* b, T* grad_a, T* grad_b, const PairShape& shape,
                             const Coefficients<A>& k, Ahead ahead) {
  const int64_t cells = shape.cells, size = shape.channels * cells;
  int64_t at = 0, cell = 0;
  for (; at + N <= size; at += N) {
    ahead.fetch_until((at + N) * static_cast<int64_t>(sizeof(T)));
    const Vec<A, N> x = load<N>(a + at), y = load<N>(b + at);
    store_result<kStream, N>(grad_a + at, y * load<N>(k.x_from_y + cell) + x * load<N>(k.x_from_x + cell));
    store_result<kStream, N>(grad_b + at, x * load<N>(k.y_from_x + cell) + y * load<N>(k.y_from_y + cell));
    cell += N;
    cell = cell >= cells ? cell - cells : cell;
  }
  for (; at < size; ++at) {
    const A x = load_one(a + at), y = load_one(b + at);
    store_one(grad_a + at, y * k.x_from_y[cell] + x * k.x_from_x[cell]);
    store_one(grad_b + at, x * k.y_from_x[cell] + y * k.y_from_y[cell]);
    cell = cell + 1 == cells ? 0 : cell + 1;
  }
}

template <typename A>
XCOS_INLINE void repeat_beginning(A* values, int64_t cells) {
  for (int64_t i = 0; i < kPad; ++i) values[cells + i] = values[i];
}

template <typename T, typename A, int N>
XCOS_INLINE void combine_over_channels(const T* self, const T* other, int64_t self_cell, int64_t other_cell,
                                       T* out, int64_t out_cell, const PairShape& shape, const A* from_self,
                                       const A* from_other) {
  for (int64_t cell = 0; cell < shape.cells; ++cell) {
    const A u = from_self[cell], v = from_other[cell];
    const T* s = self + cell * self_cell;
    const T* o = other + cell * other_cell;
    T* g = out + cell * out_cell;
    int64_t c = 0;
    for (; c + N <= shape.channels; c += N) store<N>(g + c, load<N>(o + c) * v + load<N>(s + c) * u);
    for (; c < shape.channels; ++c) store_one(g + c, load_one(o + c) * v + load_one(s + c) * u);
  }
}

// One map's gradient of one pair.
template <typename T, typename A>
XCOS_INLINE void write_gradient(const FeatureView& self, const FeatureView& other,
                                const MutableFeatureView& out, int64_t pair, const PairShape& shape,
                                const A* from_self, const A* from_other) {
  constexpr int N = native_lanes<A>();
  const T* s = static_cast<const T*>(self.data) + pair * self.pair_stride;
  const T* o = static_cast<const T*>(other.data) + pair * other.pair_stride;
  T* g = static_cast<T*>(out.data) + pair * out.pair_stride;
  if (self.cell_stride == 1 && other.cell_stride == 1 && out.cell_stride == 1 && shape.cells >= N)
    return combine_over_cells<T, A, N>(s, o, self.channel_stride, other.channel_stride, g, out.channel_stride,
                                       shape, from_self, from_other);
  if (self.channel_stride == 1 && other.channel_stride == 1 && out.channel_stride == 1)
    return combine_over_channels<T, A, N>(s, o, self.cell_stride, other.cell_stride, g, out.cell_stride,
                                          shape, from_self, from_other);
  for (int64_t c = 0; c < shape.channels; ++c)
    for (int64_t i = 0; i < shape.cells; ++i)
      store_one(g + c * out.channel_stride + i * out.cell_stride,
                load_one(o + c * other.channel_stride + i * other.cell_stride) * from_other[i] +
                    load_one(s + c * self.channel_stride + i * self.cell_stride) * from_self[i]);
}

// dL/dW of one pair to the gradient of what W was made of: the given weights or logits (into `given`), or the
// norm products (into `product`).
template <typename A>
XCOS_INLINE void attention_gradient(const PairProblem& p, const Cells<A>& cell, const A* grad_weight,
                                    A* product, A* given) {
  const int64_t cells = p.shape.cells;
  const A* w = cell.weight;
  if (p.mode == Attention::weights && given != nullptr) memcpy(given, grad_weight, cells * sizeof(A));
  const bool norm = p.mode == Attention::norm && cell.norm_sum != A(0);
  if (p.mode == Attention::norm && !norm)
    for (int64_t i = 0; i < cells; ++i) product[i] = A(0);
  const bool softmax = p.mode == Attention::logits && given != nullptr;
  if (!norm && !softmax) return;
  const A mean = sum_cells<A>(cells, [&](int64_t i) { return w[i] * grad_weight[i]; });
  if (norm) {
    const A inverse = A(1) / cell.norm_sum;
    for (int64_t i = 0; i < cells; ++i) product[i] = (grad_weight[i] - mean) * inverse;
  } else {
    const A inverse_temperature = A(1) / positive<A>(p.temperature);
    for (int64_t i = 0; i < cells; ++i) given[i] = w[i] * (grad_weight[i] - mean) * inverse_temperature;
  }
}

// Whether a pair's map is one contiguous run, long enough for combine_run.
template <typename View>
XCOS_INLINE bool is_run(const PairShape& shape, const View& view) {
  return view.data != nullptr && shape.cells >= kPad && view.cell_stride == 1 &&
         view.channel_stride == shape.cells;
}

// Whether a gradient is written past the caches: it is larger than what they would keep, and every vector
// aligned.
template <typename T, int N>
XCOS_INLINE bool streams(const PairShape& shape, const MutableFeatureView& view) {
  constexpr int64_t kStreamBytes = 8 << 20;
  const int64_t vector = N * static_cast<int64_t>(sizeof(T));
  const int64_t pair = view.pair_stride * static_cast<int64_t>(sizeof(T));
  return pair * shape.pairs >= kStreamBytes && pair % vector == 0 &&
         reinterpret_cast<uintptr_t>(view.data) % vector == 0;
}

template <typename T>
void score_backward_range(const PairProblem& p, const XcosScoreGradients& in,
                          const XcosScoreGradientOutputs& out, int64_t begin, int64_t end) {
  using A = typename Accumulate<T>::type;
  const int64_t cells = p.shape.cells;
  Scratch<A> scratch(cells);
  PairState<T, A> state(p, scratch);
  A* grad_cosine = scratch.array(8);
  A* grad_weight = scratch.array(9);
  A* grad_product = scratch.array(10);
  const Coefficients<A> k = {scratch.array(11), scratch.array(12), scratch.array(13), scratch.array(14)};
  for (int64_t i = 0; i < cells; ++i) grad_product[i] = A(0);
  clear_padding(grad_product, cells);
  clear_padding(grad_cosine, cells);

  const A* grad_score = static_cast<const A*>(in.score);
  const A* grad_similarity = static_cast<const A*>(in.similarity);
  const A* grad_attention_map = static_cast<const A*>(in.attention);
  A* grad_given = static_cast<A*>(out.attention);
  const A eps = positive<A>(p.eps);
  const bool features = out.a.data != nullptr || out.b.data != nullptr;
  constexpr int N = native_lanes<A>();
  const bool run =
      is_run(p.shape, p.a) && is_run(p.shape, p.b) && is_run(p.shape, out.a) && is_run(p.shape, out.b);
  const bool stream = run && streams<T, N>(p.shape, out.a) && streams<T, N>(p.shape, out.b);
  const bool weights = grad_score != nullptr || grad_attention_map != nullptr || grad_given != nullptr;

  for (int64_t n = begin; n < end; ++n) {
    // Where gradients are written in one run the next pair is fetched meanwhile, so that reading overlaps
    // writing.
    state.compute(n, run ? Ahead{} : state.after(n, end), weights);
    const Cells<A>& cell = state.cell;
    const A g = grad_score != nullptr ? grad_score[n * in.score_stride] : A(0);
    for (int64_t i = 0; i < cells; ++i) {
      grad_cosine[i] = grad_score != nullptr ? g * cell.weight[i] : A(0);
      grad_weight[i] = grad_score != nullptr ? g * cell.cosine[i] : A(0);
    }
    if (grad_similarity != nullptr)
      for (int64_t i = 0; i < cells; ++i) grad_cosine[i] += grad_similarity[n * cells + i];
    if (grad_attention_map != nullptr)
      for (int64_t i = 0; i < cells; ++i) grad_weight[i] += grad_attention_map[n * cells + i];
    attention_gradient(p, cell, grad_weight, grad_product,
                       grad_given != nullptr ? grad_given + n * cells : nullptr);
    if (!features) continue;
    cell_gradients(cell, cells, eps, grad_cosine, grad_product, k);
    if (run) {
      repeat_beginning(k.x_from_y, cells);
      repeat_beginning(k.x_from_x, cells);
      repeat_beginning(k.y_from_x, cells);
      repeat_beginning(k.y_from_y, cells);
      T* grad_a = static_cast<T*>(out.a.data) + n * out.a.pair_stride;
      T* grad_b = static_cast<T*>(out.b.data) + n * out.b.pair_stride;
      if (stream)
        combine_run<T, A, N, true>(state.a(n), state.b(n), grad_a, grad_b, p.shape, k, state.after(n, end));
      else
        combine_run<T, A, N, false>(state.a(n), state.b(n), grad_a, grad_b, p.shape, k, state.after(n, end));
      continue;
    }
    if (out.a.data != nullptr) write_gradient<T, A>(p.a, p.b, out.a, n, p.shape, k.x_from_x, k.x_from_y);
    if (out.b.data != nullptr) write_gradient<T, A>(p.b, p.a, out.b, n, p.shape, k.y_from_y, k.y_from_x);
  }
  if (stream) fence_streams();
}

// Pairs a thread takes at least: enough work to pay for waking it.
XCOS_INLINE int64_t grain_of(const PairShape& shape) {
  const int64_t per_pair = shape.channels * shape.cells;
  const int64_t grain = 65536 / (per_pair < 1 ? 1 : per_pair);
  return grain < 1 ? 1 : grain;
}

// Runs body(begin, end) on the caller's threads.
template <typename F>
XCOS_INLINE void over_pairs(const PairShape& shape, ParallelFor parallel_for, F& body) {
  parallel_for(
      0, shape.pairs, grain_of(shape),
      [](int64_t begin, int64_t end, void* context) { (*static_cast<F*>(context))(begin, end); }, &body);
}

// Calls f with a null pointer of the storage type.
template <typename F>
XCOS_INLINE void with_scalar(Scalar scalar, F f) {
  switch (scalar) {
    case Scalar::f32:
      return f(static_cast<float*>(nullptr));
    case Scalar::f16:
      return f(static_cast<F16*>(nullptr));
    case Scalar::bf16:
      return f(static_cast<BF16*>(nullptr));
    case Scalar::f64:
      return f(static_cast<double*>(nullptr));
  }
}

XCOS_INLINE void score_forward(const PairProblem& p, const XcosScoreOutputs& out, ParallelFor parallel_for) {
  if (p.shape.pairs == 0) return;
  with_scalar(p.scalar, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    auto body = [&](int64_t begin, int64_t end) { score_range<T>(p, out, begin, end); };
    over_pairs(p.shape, parallel_for, body);
  });
}

XCOS_INLINE void score_backward(const PairProblem& p, const XcosScoreGradients& in,
                                const XcosScoreGradientOutputs& out, ParallelFor parallel_for) {
  if (p.shape.pairs == 0) return;
  with_scalar(p.scalar, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    auto body = [&](int64_t begin, int64_t end) { score_backward_range<T>(p, in, out, begin, end); };
    over_pairs(p.shape, parallel_for, body);
  });
}

}  // namespace
}  // namespace xcos::cpu::XCOS_ISA
