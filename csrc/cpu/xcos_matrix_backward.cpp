// Gradients of all pairs. Nothing of the forward pass is kept: each side's gradients have a pass of their
// own, in which a tile of that side's faces meets the whole other side and every pair is computed again. So a
// face's gradient is summed by one thread in one order, whatever the number of threads, and memory does not
// grow with the pairs.
#include "cpu/pair_logits.h"
#include "cpu/xcos_matrix.h"

namespace xcos::cpu::XCOS_ISA {
namespace {

constexpr int64_t kOtherBlock = 128;  // faces of the other side made ready at a time

// Which of two equal projections takes the gradient: the second face's.
template <typename V>
XCOS_INLINE V if_tile_wins(V tile, V other, V value, bool ties) {
  if (ties) return tile >= other ? value : V{};
  return tile > other ? value : V{};
}

// Functions that are not inlined keep the registers of their innermost loops to themselves.

// dL/dh of one grid row of a channel, from dL/dy of the rows around it: what spread_row did, backwards.
template <class P, int... Q>
__attribute__((noinline)) void gather_row(std::integer_sequence<int, Q...>, const typename P::Vector* grad_y,
                                          bool up, bool down, const typename P::Word* u,
                                          const typename P::Packed* v, const typename P::Word* weight,
                                          const Sizes& s, bool ties, typename P::Vector* grad_v) {
  using V = typename P::Vector;
  constexpr int W = sizeof...(Q);
  // A border of zeros on either side.
  V above[W + 2] = {}, here[W + 2] = {}, below[W + 2] = {};
  if (up) ((above[Q + 1] = grad_y[Q - W]), ...);
  ((here[Q + 1] = grad_y[Q]), ...);
  if (down) ((below[Q + 1] = grad_y[Q + W]), ...);
  for (int64_t c = 0; c < s.hidden; ++c, u += s.cells, v += s.cells, weight += 9, grad_v += s.cells) {
    V w[9];
    for (int k = 0; k < 9; ++k) w[k] = P::broadcast(weight + k);
    const auto cell = [&](int q) __attribute__((always_inline)) {
      V sum = above[q] * w[8];
      sum = multiply_add<V>(above[q + 1], w[7], sum);
      sum = multiply_add<V>(above[q + 2], w[6], sum);
      sum = multiply_add<V>(here[q], w[5], sum);
      sum = multiply_add<V>(here[q + 1], w[4], sum);
      sum = multiply_add<V>(here[q + 2], w[3], sum);
      sum = multiply_add<V>(below[q], w[2], sum);
      sum = multiply_add<V>(below[q + 1], w[1], sum);
      sum = multiply_add<V>(below[q + 2], w[0], sum);
      grad_v[q] += if_tile_wins<V>(v[q], P::broadcast(u + q), sum, ties);
    };
    (cell(Q), ...);
  }
}

template <class P, typename T, int W>
class BackwardTask {
 public:
  using A = typename P::Result;
  using V = typename P::Vector;
  static constexpr int kLanes = P::kLanes;

  // Gradients of the tile side (`tiles`), of shape and order as in MatrixGradients; null ones are not wanted.
  struct Outputs {
    T* features;
    T* projection;
    A* bias;
    A* shared;  // [tiles, hidden * 9 + 1]: each tile's share of the weight's and the slope's gradient
  };

  // turned: the tiles are the probes, and the other side the gallery.
  BackwardTask(const MatrixProblem& m, const A* grad, const Outputs& out, bool turned)
      : m_(m),
        tiles_(turned ? m.probes : m.gallery),
        other_(turned ? m.gallery : m.probes),
        grad_(grad),
        out_(out),
        turned_(turned),
        sizes_(sizes_of(m, P::kStep)),
        parameters_(m, sizes_) {}

  int64_t steps() const { return (tiles_.faces + kLanes - 1) / kLanes; }

  void run(int64_t begin, int64_t end) const {
    const Sizes& s = sizes_;
    FaceTile<P> tile(s);
    PairWork<P> work(s);
    const int64_t most = other_.faces < kOtherBlock ? other_.faces : kOtherBlock;
    ProbeBlock<P, T> block(s, most);
    State state(s);
    for (int64_t step = begin; step < end; ++step) {
      const int64_t first = step * kLanes;
      tile.template pack<T>(m_, tiles_, first);
      state.clear(s);
      for (int64_t start = 0; start < other_.faces; start += kOtherBlock) {
        const int64_t count = other_.faces - start < kOtherBlock ? other_.faces - start : kOtherBlock;
        block.prepare(m_, other_, start, count);
        for (int64_t i = 0; i < count; i += kProbeGroup) {
          const int n = static_cast<int>(count - i < kProbeGroup ? count - i : kProbeGroup);
          add_group(block, i, n, tile, start + i, first, work, state);
        }
      }
      write(tile, step, state);
    }
  }

 private:
  struct State {
    explicit State(const Sizes& s)
        : features(s.feature_words),
          projection(s.projection_words),
          bias(s.bias_values),
          weight(s.hidden * 9),
          grad_cosine(kProbeGroup * s.cells),
          grad_y(s.cells) {}

    void clear(const Sizes& s) {
      memset(static_cast<void*>(features.get()), 0, sizeof(V) * static_cast<size_t>(s.feature_words));
      memset(static_cast<void*>(projection.get()), 0, sizeof(V) * static_cast<size_t>(s.projection_words));
      memset(static_cast<void*>(bias.get()), 0, sizeof(V) * static_cast<size_t>(s.bias_values));
      memset(static_cast<void*>(weight.get()), 0, sizeof(V) * static_cast<size_t>(s.hidden * 9));
      slope = V{};
    }

    Buffer<V> features, projection, bias, weight;
    Buffer<V> grad_cosine;  // [kProbeGroup, cells]
    Buffer<V> grad_y;       // [cells]
    V slope;
  };

  V incoming(int64_t other, int64_t first, int count) const {
    V g = {};
    const int64_t columns = m_.gallery.faces;
    for (int lane = 0; lane < count; ++lane)
      g[lane] = turned_ ? grad_[(first + lane) * columns + other] : grad_[other * columns + first + lane];
    return g;
  }

  void add_group(const ProbeBlock<P, T>& block, int64_t in_block, int count, const FaceTile<P>& tile,
                 int64_t other, int64_t first, PairWork<P>& work, State& state) const {
    const Sizes& s = sizes_;
    const typename P::Word* features[kProbeGroup];
    for (int i = 0; i < count; ++i) features[i] = block.features(in_block + i);
    dot_all_cells<P>(s, features, tile.features(), count, s.cells, work.dots.get());
    for (int i = 0; i < count; ++i) {
      const typename P::Sum* cosine = work.dots.get() + i * s.cells;
      V* grad_cosine = state.grad_cosine.get() + i * s.cells;
      for (int64_t cell = 0; cell < s.cells; ++cell) grad_cosine[cell] = V{};
      const V g = incoming(other + i, first, tile.count()) * (A(1) / static_cast<A>(s.orders));
      for (int64_t order = 0; order < s.orders; ++order) {
        V total;
        const V largest = logits<P, W>(s, parameters_, block.projection(in_block + i),
                                       block.bias(in_block + i), tile, order, work);
        const V score = weigh<P>(s, parameters_, cosine, largest, work, total);
        attention_gradient(g, score, total, cosine, grad_cosine, work, state);
        const typename P::Word* u = block.projection(in_block + i) + order * s.hidden * s.cells;
        layer_gradients(u, tile, order, state);
      }
    }
    if (out_.features != nullptr) feature_gradients(features, count, state);
  }

  // From dL/dscore to dL/dS, dL/dy and dL/dslope of one order.
  void attention_gradient(V g, V score, V total, const V* cosine, V* grad_cosine, PairWork<P>& work,
                          State& state) const {
    const Sizes& s = sizes_;
    const V zero = {};
    const V* e = work.weight.get();
    const V* y = work.sums.get();
    V* grad_y = state.grad_y.get();
    const V slope = broadcast_value<V>(parameters_.slope);
    if (parameters_.softmax) {
      const V inverse = (zero + A(1)) / total;
      const V scale = broadcast_value<V>(static_cast<A>(1 / m_.temperature));
      for (int64_t i = 0; i < s.cells; ++i) {
        const V along = g * (e[i] * inverse);
        grad_cosine[i] += along;
        grad_y[i] = along * (cosine[i] - score) * scale;
      }
    } else {
      // Equal logits give uniform weights, through which nothing flows; the smallest ones share what the
      // shift takes.
      const auto flat = total == zero;
      const V inverse = flat ? zero : (zero + A(1)) / total;
      const V even = broadcast_value<V>(A(1) / static_cast<A>(s.cells));
      V sum = zero, smallest = zero;
      for (int64_t i = 0; i < s.cells; ++i) {
        grad_cosine[i] += g * (flat ? even : e[i] * inverse);
        grad_y[i] = g * (cosine[i] - score) * inverse;
        sum += grad_y[i];
        smallest += e[i] == zero ? zero + A(1) : zero;
      }
      const V share = sum / smallest;
      for (int64_t i = 0; i < s.cells; ++i) grad_y[i] -= e[i] == zero ? share : zero;
    }
    for (int64_t i = 0; i < s.cells; ++i) {
      const auto positive = y[i] > zero;
      state.slope += positive ? zero : grad_y[i] * y[i];
      grad_y[i] = positive ? grad_y[i] : grad_y[i] * slope;
    }
  }

  // From dL/dy to the tile's biases and projections, and to the weight.
  void layer_gradients(const typename P::Word* u, const FaceTile<P>& tile, int64_t order,
                       State& state) const {
    const Sizes& s = sizes_;
    const V* grad_y = state.grad_y.get();
    const typename P::Packed* v = tile.projection() + order * s.hidden * s.cells;
    V* grad_v = state.projection.get() + order * s.hidden * s.cells;
    V* grad_bias = state.bias.get() + order * s.cells;
    for (int64_t i = 0; i < s.cells; ++i) grad_bias[i] += grad_y[i];
    if (out_.projection != nullptr) {
      // In order 0 the gallery faces are second, in order 1 the probes.
      const bool ties = turned_ == (order == 1);
      if constexpr (W > 0) {
        for (int64_t r = 0; r < s.height; ++r)
          gather_row<P>(std::make_integer_sequence<int, W>{}, grad_y + r * W, r > 0, r + 1 < s.height,
                        u + r * W, v + r * W, parameters_.weight(), s, ties, grad_v + r * W);
      } else {
        gather_any(u, v, ties, grad_v, state);
      }
    }
    if (out_.shared != nullptr) weight_gradient(u, v, state);
  }

  void gather_any(const typename P::Word* u, const typename P::Packed* v, bool ties, V* grad_v,
                  const State& state) const {
    const Sizes& s = sizes_;
    for (int64_t c = 0; c < s.hidden; ++c) {
      for (int64_t cell = 0; cell < s.cells; ++cell) {
        V sum = {};
        around(cell, [&](int64_t output, int tap) {
          sum = multiply_add<V>(state.grad_y.get()[output], P::broadcast(parameters_.weight() + c * 9 + tap),
                                sum);
        });
        const int64_t i = c * s.cells + cell;
        grad_v[i] += if_tile_wins<V>(v[i], P::broadcast(u + i), sum, ties);
      }
    }
  }

  __attribute__((noinline)) void weight_gradient(const typename P::Word* u, const typename P::Packed* v,
                                                 State& state) const {
    const Sizes& s = sizes_;
    for (int64_t c = 0; c < s.hidden; ++c) {
      V sums[9];
      V* kept = state.weight.get() + c * 9;
      for (int k = 0; k < 9; ++k) sums[k] = kept[k];
      if constexpr (W > 0) {
        for (int64_t r = 0; r < s.height; ++r)
          weight_row(std::make_integer_sequence<int, W>{}, state.grad_y.get() + r * W, r > 0,
                     r + 1 < s.height, u + c * s.cells + r * W, v + c * s.cells + r * W, sums);
      } else {
        for (int64_t cell = 0; cell < s.cells; ++cell) {
          const V h = P::maximum(u + c * s.cells + cell, v[c * s.cells + cell]);
          around(cell, [&](int64_t output, int tap) {
            sums[tap] = multiply_add<V>(h, state.grad_y.get()[output], sums[tap]);
          });
        }
      }
      for (int k = 0; k < 9; ++k) kept[k] = sums[k];
    }
  }

  template <int... Q>
  static XCOS_INLINE void weight_row(std::integer_sequence<int, Q...>, const V* grad_y, bool up, bool down,
                                     const typename P::Word* u, const typename P::Packed* v, V (&sums)[9]) {
    const V h[] = {P::maximum(u + Q, v[Q])...};
    weight_taps<6>(h, grad_y - W, up, sums);
    weight_taps<3>(h, grad_y, true, sums);
    weight_taps<0>(h, grad_y + W, down, sums);
  }

  // An output row and the three taps through which it sees a row of inputs.
  template <int kTap>
  static XCOS_INLINE void weight_taps(const V (&h)[W > 0 ? W : 1], const V* row, bool there, V (&sums)[9]) {
    if (!there) return;
#pragma GCC unroll 8
    for (int q = 0; q < W; ++q) {
      if (q > 0) sums[kTap + 2] = multiply_add<V>(h[q], row[q - 1], sums[kTap + 2]);
      sums[kTap + 1] = multiply_add<V>(h[q], row[q], sums[kTap + 1]);
      if (q + 1 < W) sums[kTap] = multiply_add<V>(h[q], row[q + 1], sums[kTap]);
    }
  }

  // body(output cell, tap) for every output that sees an input cell.
  template <class Body>
  XCOS_INLINE void around(int64_t cell, const Body& body) const {
    const int64_t r = cell / sizes_.width, q = cell % sizes_.width;
    for (int dy = -1; dy <= 1; ++dy) {
      if (r + dy < 0 || r + dy >= sizes_.height) continue;
      for (int dx = -1; dx <= 1; ++dx) {
        if (q + dx < 0 || q + dx >= sizes_.width) continue;
        body(cell + dy * sizes_.width + dx, (1 - dy) * 3 + 1 - dx);
      }
    }
  }

  __attribute__((noinline)) void feature_gradients(const typename P::Word* const* features, int count,
                                                   State& state) const {
    const Sizes& s = sizes_;
    for (int64_t cell = 0; cell < s.cells; ++cell) {
      V grad[kProbeGroup];
      for (int i = 0; i < kProbeGroup; ++i)
        grad[i] = i < count ? state.grad_cosine.get()[i * s.cells + cell] : V{};
      V* sums = state.features.get() + cell * s.channels;
      for (int64_t c = 0; c < s.channels; ++c) {
        V sum = sums[c];
        for (int i = 0; i < count; ++i)
          sum = multiply_add<V>(grad[i], P::broadcast(features[i] + cell * s.channels + c), sum);
        sums[c] = sum;
      }
    }
  }

  template <typename Out>
  void write_faces(const FaceTile<P>& tile, int64_t first, const Buffer<V>& sums, int64_t count,
                   Out* out) const {
    if (out == nullptr) return;
    const A* lanes = reinterpret_cast<const A*>(sums.get());
    for (int lane = 0; lane < tile.count(); ++lane)
      for (int64_t i = 0; i < count; ++i)
        store_one(out + (first + lane) * count + i, lanes[i * kLanes + lane]);
  }

  void write(const FaceTile<P>& tile, int64_t step, const State& state) const {
    const int64_t first = step * kLanes;
    write_faces(tile, first, state.features, sizes_.feature_words, out_.features);
    write_faces(tile, first, state.projection, sizes_.projection_words, out_.projection);
    write_faces(tile, first, state.bias, sizes_.bias_values, out_.bias);
    if (out_.shared == nullptr) return;
    A* shared = out_.shared + step * (sizes_.hidden * 9 + 1);
    for (int64_t i = 0; i < sizes_.hidden * 9; ++i)
      shared[i] = sum_count(state.weight.get()[i], tile.count());
    shared[sizes_.hidden * 9] = sum_count(state.slope, tile.count());
  }

  // Places beyond the last face repeat it, and are not its.
  static A sum_count(V v, int count) {
    A sum = 0;
    for (int lane = 0; lane < count; ++lane) sum += v[lane];
    return sum;
  }

  const MatrixProblem& m_;
  const TemplateView& tiles_;
  const TemplateView& other_;
  const A* grad_;
  Outputs out_;
  bool turned_;
  Sizes sizes_;
  PairParameters<P> parameters_;
};

template <class Task>
void run_task(const Task& task, ParallelFor parallel_for) {
  parallel_for(
      0, task.steps(), 1,
      [](int64_t begin, int64_t end, void* context) { static_cast<const Task*>(context)->run(begin, end); },
      const_cast<Task*>(&task));
}

template <typename A, typename T, int W>
void run_backward(const MatrixProblem& m, const MatrixGradients& g, ParallelFor parallel_for) {
  using Task = BackwardTask<Real<A>, T, W>;
  const A* grad = static_cast<const A*>(g.grad);
  const int64_t values = m.hidden * 9 + 1;
  const int64_t tiles = (m.gallery.faces + Real<A>::kLanes - 1) / Real<A>::kLanes;
  const bool shared = g.weight != nullptr || g.slope != nullptr;
  Buffer<A> shares(shared ? tiles * values : 1);
  if (shared || g.gallery_features != nullptr || g.gallery_projection != nullptr ||
      g.gallery_bias != nullptr) {
    const Task task(m, grad,
                    {static_cast<T*>(g.gallery_features), static_cast<T*>(g.gallery_projection),
                     static_cast<A*>(g.gallery_bias), shared ? shares.get() : nullptr},
                    false);
    run_task(task, parallel_for);
  }
  if (shared) {
    for (int64_t i = 0; i < values; ++i) {
      double sum = 0;
      for (int64_t tile = 0; tile < tiles; ++tile)
        sum += static_cast<double>(shares.get()[tile * values + i]);
      if (i + 1 < values) {
        if (g.weight != nullptr) static_cast<A*>(g.weight)[i] = static_cast<A>(sum);
      } else if (g.slope != nullptr) {
        *static_cast<A*>(g.slope) = static_cast<A>(sum);
      }
    }
  }
  if (g.probe_features != nullptr || g.probe_projection != nullptr || g.probe_bias != nullptr) {
    const Task task(m, grad,
                    {static_cast<T*>(g.probe_features), static_cast<T*>(g.probe_projection),
                     static_cast<A*>(g.probe_bias), nullptr},
                    true);
    run_task(task, parallel_for);
  }
}

template <typename A, typename T>
void run_backward_width(const MatrixProblem& m, const MatrixGradients& g, ParallelFor parallel_for) {
  if (m.width == 7) return run_backward<A, T, 7>(m, g, parallel_for);
  run_backward<A, T, 0>(m, g, parallel_for);
}

}  // namespace

void xcos_matrix_backward(const MatrixProblem& problem, const MatrixGradients& gradients,
                          ParallelFor parallel_for) {
  switch (problem.scalar) {
    case Scalar::f32:
      return run_backward_width<float, float>(problem, gradients, parallel_for);
    case Scalar::f64:
      return run_backward_width<double, double>(problem, gradients, parallel_for);
    case Scalar::f16:
      return run_backward_width<float, F16>(problem, gradients, parallel_for);
    case Scalar::bf16:
      return run_backward_width<float, BF16>(problem, gradients, parallel_for);
  }
}

}  // namespace xcos::cpu::XCOS_ISA
