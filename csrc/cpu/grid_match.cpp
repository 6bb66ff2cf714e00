// Both maps of a pair are copied, in the type of sums, to a frame with a margin of zeros around every row, so
// that a neighbour is a fixed distance away wherever a cell lies, and one vector holds the same neighbour of
// many cells. What remains of a pair are its candidates' cosines [count, cells], which stay in the first- or
// second-level cache.
#include "cpu/grid_match.h"

#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <new>
#include <type_traits>

#include "cpu/pair_kernels.h"

namespace xcos::cpu::XCOS_ISA {
namespace {

// Channels of both maps that are in the frame at a time: two maps of a usual grid fit the second-level cache.
constexpr int64_t kFrameChannels = 64;

// The standard library's have external linkage (see isa.h).
XCOS_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
XCOS_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
template <typename A>
XCOS_INLINE void fill(A* begin, A* end, A value) {
  for (; begin != end; ++begin) *begin = value;
}

// Where cell (row, column) lies in an array of the frame: margin + row * pitch + column. A gap of
// window.columns behind each row, and the margins, belong to no cell.
template <typename A>
struct Frame {
  static constexpr int N = native_lanes<A>();

  MatchWindow window;
  int64_t height, width, pitch;
  int64_t blocks;  // vectors that hold all rows
  int64_t margin;  // whole vectors, at least as long as the longest shift
  int64_t length;  // of an array

  explicit Frame(const MatchProblem& p) : window(match_window(p)), height(p.height), width(p.width) {
    pitch = width + window.columns;
    blocks = (height * pitch + N - 1) / N;
    const int64_t farthest = window.rows * pitch + window.columns;
    margin = (farthest + N - 1) / N * N;
    length = margin + blocks * N + margin + N;  // the last row's copy may write a vector beyond its end
  }
  int64_t shift(int64_t k) const {
    return (k / window.across - window.rows) * pitch + (k % window.across - window.columns);
  }
};

// One direction's result in frame arrays. best: extreme is the cosine and chosen its candidate. soft: extreme
// is the largest cosine and inverse_total 1 / sum of exponentials; the result is in similarity in either
// case.
template <typename A>
struct Direction {
  A* extreme;
  A* chosen;
  A* inverse_total;
  A* similarity;
};

// exp_nonpositive lane by lane in vector code; the same operations, so the same bits.
template <int N>
XCOS_INLINE Vec<float, N> exp_lanes_float(Vec<float, N> x) {
  using F = Vec<float, N>;
  using U = Vec<uint32_t, N>;
  const F zero = {};
  const F lowest = zero - 87.0f;
  const F clamped = x < lowest ? lowest : x;
  const F magic = zero + 12582912.0f;
  const F shifted = clamped * 1.44269504f + magic;
  const F n = shifted - magic;
  const F r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  F p = zero + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const U bits = (reinterpret_cast<U>(shifted) + 127u) << 23;
  const F value = p * reinterpret_cast<F>(bits);
  return x < lowest ? zero : value;
}
template <typename A, int N>
XCOS_INLINE Vec<A, N> exp_lanes(Vec<A, N> x) {
  if constexpr (sizeof(A) == 4) {
    return exp_lanes_float<N>(x);
  } else {
    for (int i = 0; i < N; ++i) x[i] = exp_nonpositive(x[i]);
    return x;
  }
}

// The memory and the steps of one thread.
template <typename T, typename A>
class Matcher {
 public:
  static constexpr int N = native_lanes<A>();
  using V = Vec<A, N>;

  Matcher(const MatchProblem& p, bool backward)
      : problem_(p),
        frame_(p),
        count_(frame_.window.count),
        channels_(p.pair.shape.channels),
        chunk_(smaller(channels_, kFrameChannels)),
        eps_(positive<A>(p.pair.eps)),
        inverse_temperature_(static_cast<A>(match_inverse_temperature(p))) {
    const int64_t single = backward ? 16 : 13;
    const int64_t arrays = single + 2 * chunk_ + count_ * (backward ? 2 : 1) + (backward ? chunk_ : 0);
    const int64_t size = arrays * frame_.length;
    memory_.reset(static_cast<A*>(std::aligned_alloc(64, (size * sizeof(A) + 63) / 64 * 64)));
    if (memory_ == nullptr) throw std::bad_alloc();
    fill(memory_.get(), memory_.get() + size, A(0));
    A* next = memory_.get();
    const auto take = [&](int64_t number) {
      A* const at = next + frame_.margin;  // index 0 is the first cell
      next += number * frame_.length;
      return at;
    };
    inside_ = take(1);
    x_norm_ = take(1);
    y_norm_ = take(1);
    x_inverse_ = take(1);
    y_inverse_ = take(1);
    for (Direction<A>* d : {&forth_, &back_}) {
      d->extreme = take(1);
      d->chosen = take(1);
      d->inverse_total = take(1);
      d->similarity = take(1);
    }
    a_ = take(chunk_);
    b_ = take(chunk_);
    cosine_ = take(count_);
    if (backward) {
      grad_ = take(1);
      x_along_ = take(1);
      y_along_ = take(1);
      coefficient_ = take(count_);
      out_ = take(chunk_);
    }
    // No candidate starts in a margin: -inf there, for good.
    fill(cosine_ - frame_.margin, cosine_ - frame_.margin + count_ * frame_.length, kNone);
    for (int64_t row = 0; row < frame_.height; ++row)
      fill(inside_ + row * frame_.pitch, inside_ + row * frame_.pitch + frame_.width, A(1));
  }

  // S of one pair, and the chosen neighbours if offsets is not null.
  void forward(int64_t pair, A* similarity, int8_t* offsets) {
    match(pair);
    const int64_t cells = frame_.height * frame_.width;
    for (int64_t row = 0; row < frame_.height; ++row) {
      const int64_t at = row * frame_.pitch;
      for (int64_t x = 0; x < frame_.width; ++x) {
        const A own = forth_.similarity[at + x];
        *similarity++ = problem_.symmetric ? (own + back_.similarity[at + x]) * A(0.5) : own;
      }
    }
    if (offsets == nullptr) return;
    for (int direction = 0; direction < (problem_.symmetric ? 2 : 1); ++direction) {
      const A* chosen = direction == 0 ? forth_.chosen : back_.chosen;
      for (int64_t row = 0; row < frame_.height; ++row) {
        for (int64_t x = 0; x < frame_.width; ++x) {
          const int32_t k = static_cast<int32_t>(chosen[row * frame_.pitch + x]);
          const int32_t sign = direction == 0 ? 1 : -1;  // candidates are numbered from A's cell
          offsets[row * frame_.width + x] = static_cast<int8_t>(sign * frame_.window.row(k));
          offsets[cells + row * frame_.width + x] = static_cast<int8_t>(sign * frame_.window.column(k));
        }
      }
      offsets += 2 * cells;
    }
  }

  void backward(int64_t pair, const A* grad_similarity, const MutableFeatureView& grad_a,
                const MutableFeatureView& grad_b) {
    match(pair);
    const A share = problem_.symmetric ? A(0.5) : A(1);
    for (int64_t row = 0; row < frame_.height; ++row)
      for (int64_t x = 0; x < frame_.width; ++x) grad_[row * frame_.pitch + x] = share * *grad_similarity++;
    coefficients();
    if (grad_a.data != nullptr) write_gradient(pair, problem_.pair.a, b_, a_, x_along_, 1, grad_a);
    if (grad_b.data != nullptr) write_gradient(pair, problem_.pair.b, a_, b_, y_along_, -1, grad_b);
  }

 private:
  static constexpr A kNone = -(sizeof(A) == 4 ? A(__builtin_inff()) : A(__builtin_inf()));
  static constexpr int kGroup = 9;  // candidates whose sums are in registers at a time

  struct Free {
    void operator()(A* p) const { std::free(p); }
  };

  A* cosines(int64_t k) const { return cosine_ + k * frame_.length; }
  A* coefficients_of(int64_t k) const { return coefficient_ + k * frame_.length; }

  // Channels first .. first + number of one pair's map, into the frame.
  void pack(const FeatureView& view, int64_t pair, int64_t first, int64_t number, A* to) const {
    const T* map = static_cast<const T*>(view.data) + pair * view.pair_stride;
    const int64_t cells = frame_.height * frame_.width;
    if (view.cell_stride != 1 && view.channel_stride == 1) {  // channels side by side
      for (int64_t row = 0; row < frame_.height; ++row) {
        for (int64_t x = 0; x < frame_.width; ++x) {
          const T* from = map + (row * frame_.width + x) * view.cell_stride + first;
          A* at = to + row * frame_.pitch + x;
          for (int64_t c = 0; c < number; ++c) at[c * frame_.length] = load_one(from + c);
        }
      }
      return;
    }
    // Elements that may be read from the map's beginning on: a vector may reach into the next channel.
    const int64_t readable = view.channel_stride >= cells ? (channels_ - 1) * view.channel_stride + cells : 0;
    V lane;
    for (int i = 0; i < N; ++i) lane[i] = A(i);
    const V rest = V{} + static_cast<A>((frame_.width - 1) % N);  // last lane of a row's last vector
    for (int64_t c = 0; c < number; ++c) {
      const int64_t channel = (first + c) * view.channel_stride;
      for (int64_t row = 0; row < frame_.height; ++row) {
        const int64_t from = channel + row * frame_.width * view.cell_stride;
        A* at = to + c * frame_.length + row * frame_.pitch;
        const int64_t vectors = (frame_.width + N - 1) / N;
        if (view.cell_stride == 1 && from + vectors * N <= readable) {
          for (int64_t x = 0; x < frame_.width; x += N) {
            const V v = load<N>(map + from + x);
            store<N>(at + x, x + N < frame_.width || !(lane[N - 1] > rest[0]) ? v : lane <= rest ? v : V{});
          }
        } else {
          for (int64_t x = 0; x < frame_.width; ++x) at[x] = load_one(map + from + x * view.cell_stride);
          for (int64_t x = frame_.width; x < frame_.pitch; ++x) at[x] = A(0);
        }
      }
      // Vectors of the last row may have reached beyond its gap: these are zeros, as everything there.
    }
  }

  template <int G>
  void dots(int64_t first, int64_t channels, bool begin) const {
    int64_t shift[G];
    for (int g = 0; g < G; ++g) shift[g] = frame_.shift(first + g);
    for (int64_t i = 0; i < frame_.blocks * N; i += N) {
      V sums[G];
#pragma GCC unroll 9
      for (int g = 0; g < G; ++g) sums[g] = begin ? V{} : load<N>(cosines(first + g) + i);
      const A *x = a_ + i, *y = b_ + i;
      for (int64_t c = 0; c < channels; ++c, x += frame_.length, y += frame_.length) {
        const V own = load<N>(x);
#pragma GCC unroll 9
        for (int g = 0; g < G; ++g) sums[g] += own * load<N>(y + shift[g]);
      }
#pragma GCC unroll 9
      for (int g = 0; g < G; ++g) store<N>(cosines(first + g) + i, sums[g]);
    }
  }

  void squares(const A* map, int64_t channels, bool begin, A* out) const {
    for (int64_t i = 0; i < frame_.blocks * N; i += N) {
      V sum = begin ? V{} : load<N>(out + i);
      for (int64_t c = 0; c < channels; ++c) {
        const V x = load<N>(map + c * frame_.length + i);
        sum += x * x;
      }
      store<N>(out + i, sum);
    }
  }

  // Calls f.operator()<G>(first) for groups of at most kGroup candidates.
  template <typename F>
  void in_groups(const F& f) const {
    int64_t first = 0;
    for (; first + kGroup <= count_; first += kGroup) f(std::integral_constant<int, kGroup>{}, first);
    switch (count_ - first) {
      case 8:
        return f(std::integral_constant<int, 8>{}, first);
      case 7:
        return f(std::integral_constant<int, 7>{}, first);
      case 6:
        return f(std::integral_constant<int, 6>{}, first);
      case 5:
        return f(std::integral_constant<int, 5>{}, first);
      case 4:
        return f(std::integral_constant<int, 4>{}, first);
      case 3:
        return f(std::integral_constant<int, 3>{}, first);
      case 2:
        return f(std::integral_constant<int, 2>{}, first);
      case 1:
        return f(std::integral_constant<int, 1>{}, first);
      default:
        return;
    }
  }

  // Candidates' cosines, then both directions' results, of one pair.
  void match(int64_t pair) {
    for (int64_t first = 0; first < channels_; first += chunk_) {
      const int64_t number = smaller(chunk_, channels_ - first);
      pack(problem_.pair.a, pair, first, number, a_);
      pack(problem_.pair.b, pair, first, number, b_);
      squares(a_, number, first == 0, x_norm_);
      squares(b_, number, first == 0, y_norm_);
      in_groups([&](auto group, int64_t at) { dots<decltype(group)::value>(at, number, first == 0); });
    }
    const V one = V{} + A(1), eps = V{} + eps_, none = V{} + kNone;
    for (int64_t i = 0; i < frame_.blocks * N; i += N) {
      const V x = square_root<A, N>(load<N>(x_norm_ + i)), y = square_root<A, N>(load<N>(y_norm_ + i));
      store<N>(x_norm_ + i, x);
      store<N>(y_norm_ + i, y);
      store<N>(x_inverse_ + i, one / clamp_norm<V>(x, eps));
      store<N>(y_inverse_ + i, one / clamp_norm<V>(y, eps));
    }
    for (int64_t k = 0; k < count_; ++k) {
      const int64_t shift = frame_.shift(k);
      A* c = cosines(k);
      for (int64_t i = 0; i < frame_.blocks * N; i += N) {
        const V value = (load<N>(c + i) * load<N>(x_inverse_ + i)) * load<N>(y_inverse_ + i + shift);
        const V pairs = load<N>(inside_ + i) * load<N>(inside_ + i + shift);
        store<N>(c + i, pairs != V{} ? value : none);
      }
    }
    choose(forth_, 1);
    if (problem_.symmetric) choose(back_, -1);
  }

  // One direction. sign -1: from B's cells; its candidate with number k is A's cell at -shift(k), so that
  // rising indices of cells are falling k.
  void choose(const Direction<A>& d, int64_t sign) const {
    const bool best = problem_.match == Match::best;
    const V none = V{} + kNone;
    for (int64_t i = 0; i < frame_.blocks * N; i += N) {
      V extreme = none, chosen = {};
      for (int64_t step = 0; step < count_; ++step) {
        const int64_t k = sign > 0 ? step : count_ - 1 - step;
        const V c = load<N>(cosines(k) + i - (sign > 0 ? 0 : frame_.shift(k)));
        if (best) {
          // The first NaN is taken and never given up.
          const auto take = (c > extreme) | ((c != c) & (extreme == extreme));
          extreme = take ? c : extreme;
          chosen = take ? V{} + static_cast<A>(k) : chosen;
        } else {
          extreme = c > extreme ? c : extreme;
        }
      }
      store<N>(d.extreme + i, extreme);
      if (best) {
        store<N>(d.chosen + i, chosen);
        store<N>(d.similarity + i, extreme);
        continue;
      }
      V total = {}, weighted = {};
      for (int64_t step = 0; step < count_; ++step) {
        const int64_t k = sign > 0 ? step : count_ - 1 - step;
        const V c = load<N>(cosines(k) + i - (sign > 0 ? 0 : frame_.shift(k)));
        const V e = exp_lanes<A, N>((c - extreme) * inverse_temperature_);
        total += e;
        weighted += c == none ? V{} : e * c;
      }
      const V inverse = (V{} + A(1)) / total;
      store<N>(d.inverse_total + i, inverse);
      store<N>(d.similarity + i, weighted * inverse);
    }
  }

  // dL/dcosine that a cell at `at` passes to its candidate k of cosine c.
  V passed_on(const Direction<A>& d, int64_t at, int64_t k, V c) const {
    const V grad = load<N>(grad_ + at);
    if (problem_.match == Match::best) return load<N>(d.chosen + at) == V{} + static_cast<A>(k) ? grad : V{};
    const V probability =
        exp_lanes<A, N>((c - load<N>(d.extreme + at)) * inverse_temperature_) * load<N>(d.inverse_total + at);
    return soft_gradient<V>(grad, probability, c, load<N>(d.similarity + at), V{} + inverse_temperature_);
  }

  // From both directions' results: what a candidate's two vectors get of each other, and each cell's
  // sum of dL/dcosine * cosine.
  void coefficients() const {
    const V none = V{} + kNone;
    for (A* along : {x_along_, y_along_})
      fill(along - frame_.margin, along - frame_.margin + frame_.length, A(0));
    for (int64_t k = 0; k < count_; ++k) {
      const int64_t shift = frame_.shift(k);
      for (int64_t i = 0; i < frame_.blocks * N; i += N) {
        const V c = load<N>(cosines(k) + i);
        V gradient = passed_on(forth_, i, k, c);
        if (problem_.symmetric) gradient += passed_on(back_, i + shift, k, c);
        gradient = c == none ? V{} : gradient;
        const V product = c == none ? V{} : gradient * c;
        store<N>(x_along_ + i, load<N>(x_along_ + i) + product);
        store<N>(y_along_ + i + shift, load<N>(y_along_ + i + shift) + product);
        // By contract nothing flows into a zero cell; what it would pass on is zero anyway.
        const auto zero = (load<N>(x_norm_ + i) == V{}) | (load<N>(y_norm_ + i + shift) == V{});
        const V cross = gradient * load<N>(x_inverse_ + i) * load<N>(y_inverse_ + i + shift);
        store<N>(coefficients_of(k) + i, zero ? V{} : cross);
      }
    }
    const V eps = V{} + eps_;
    for (int64_t i = 0; i < frame_.blocks * N; i += N) {
      // A clamped norm is a constant, so its own term vanishes.
      const V x = load<N>(x_inverse_ + i), y = load<N>(y_inverse_ + i);
      store<N>(x_along_ + i, load<N>(x_norm_ + i) < eps ? V{} : load<N>(x_along_ + i) * x * x);
      store<N>(y_along_ + i, load<N>(y_norm_ + i) < eps ? V{} : load<N>(y_along_ + i) * y * y);
    }
  }

  // out[c] (+)= sum over the group's candidates of coefficient * other, and at the beginning - along * self.
  template <int G>
  void combine(int64_t first, int64_t channels, int64_t sign, const A* other, const A* self,
               const A* along) const {
    int64_t shift[G];
    for (int g = 0; g < G; ++g) shift[g] = sign * frame_.shift(first + g);
    for (int64_t i = 0; i < frame_.blocks * N; i += N) {
      V k[G];
#pragma GCC unroll 9
      for (int g = 0; g < G; ++g) k[g] = load<N>(coefficients_of(first + g) + i + (sign > 0 ? 0 : shift[g]));
      const V own = load<N>(along + i);
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t at = c * frame_.length + i;
        V sum = first == 0 ? -own * load<N>(self + at) : load<N>(out_ + at);
#pragma GCC unroll 9
        for (int g = 0; g < G; ++g) sum += k[g] * load<N>(other + at + shift[g]);
        store<N>(out_ + at, sum);
      }
    }
  }

  // One map's gradient. sign 1: of A, whose candidates are B's cells.
  void write_gradient(int64_t pair, const FeatureView& self_view, A* other, A* self, const A* along,
                      int64_t sign, const MutableFeatureView& to) {
    const FeatureView& other_view = sign > 0 ? problem_.pair.b : problem_.pair.a;
    for (int64_t first = 0; first < channels_; first += chunk_) {
      const int64_t number = smaller(chunk_, channels_ - first);
      if (channels_ > chunk_) {  // the frame holds the last channels
        pack(self_view, pair, first, number, self);
        pack(other_view, pair, first, number, other);
      }
      in_groups([&](auto group, int64_t at) {
        combine<decltype(group)::value>(at, number, sign, other, self, along);
      });
      T* map = static_cast<T*>(to.data) + pair * to.pair_stride + first * to.channel_stride;
      if (to.channel_stride == 1 && to.cell_stride != 1) {
        for (int64_t row = 0; row < frame_.height; ++row)
          for (int64_t x = 0; x < frame_.width; ++x)
            for (int64_t c = 0; c < number; ++c)
              store_one(map + (row * frame_.width + x) * to.cell_stride + c,
                        out_[c * frame_.length + row * frame_.pitch + x]);
        continue;
      }
      // A row's last vector may reach over its end where the next row, written after it, lies right behind.
      const int64_t run = to.cell_stride == 1 && to.channel_stride == frame_.height * frame_.width
                              ? number * to.channel_stride
                              : 0;
      for (int64_t c = 0; c < number; ++c) {
        for (int64_t row = 0; row < frame_.height; ++row) {
          const A* from = out_ + c * frame_.length + row * frame_.pitch;
          const int64_t begin = c * to.channel_stride + row * frame_.width * to.cell_stride;
          if (begin + (frame_.width + N - 1) / N * N <= run) {
            for (int64_t x = 0; x < frame_.width; x += N) store<N>(map + begin + x, load<N>(from + x));
          } else {
            for (int64_t x = 0; x < frame_.width; ++x) store_one(map + begin + x * to.cell_stride, from[x]);
          }
        }
      }
    }
  }

  const MatchProblem& problem_;
  Frame<A> frame_;
  int64_t count_, channels_, chunk_;
  A eps_, inverse_temperature_;
  std::unique_ptr<A, Free> memory_;
  A *inside_, *x_norm_, *y_norm_, *x_inverse_, *y_inverse_, *a_, *b_, *cosine_;
  A *grad_ = nullptr, *x_along_ = nullptr, *y_along_ = nullptr, *coefficient_ = nullptr, *out_ = nullptr;
  Direction<A> forth_, back_;
};

// As over_pairs, for pairs that cost as much as `count` of grid_cosine's.
template <typename F>
XCOS_INLINE void over_matched_pairs(const MatchProblem& p, ParallelFor parallel_for, F& body) {
  const int64_t each = p.pair.shape.channels * p.pair.shape.cells * match_window(p).count;
  const int64_t grain = larger(1, 262144 / each);
  parallel_for(
      0, p.pair.shape.pairs, grain,
      [](int64_t begin, int64_t end, void* context) { (*static_cast<F*>(context))(begin, end); }, &body);
}

}  // namespace

void grid_match(const MatchProblem& problem, const MatchOutputs& outputs, ParallelFor parallel_for) {
  if (problem.pair.shape.pairs == 0) return;
  with_scalar(problem.pair.scalar, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    using A = typename Accumulate<T>::type;
    const int64_t cells = problem.pair.shape.cells;
    const int64_t chosen = outputs.offsets == nullptr ? 0 : cells * (problem.symmetric ? 4 : 2);
    auto body = [&](int64_t begin, int64_t end) {
      Matcher<T, A> matcher(problem, false);
      for (int64_t n = begin; n < end; ++n)
        matcher.forward(n, static_cast<A*>(outputs.similarity) + n * cells,
                        outputs.offsets == nullptr ? nullptr : outputs.offsets + n * chosen);
    };
    over_matched_pairs(problem, parallel_for, body);
  });
}

void grid_match_backward(const MatchProblem& problem, const void* grad_similarity, MutableFeatureView grad_a,
                         MutableFeatureView grad_b, ParallelFor parallel_for) {
  if (problem.pair.shape.pairs == 0) return;
  with_scalar(problem.pair.scalar, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    using A = typename Accumulate<T>::type;
    const int64_t cells = problem.pair.shape.cells;
    auto body = [&](int64_t begin, int64_t end) {
      Matcher<T, A> matcher(problem, true);
      for (int64_t n = begin; n < end; ++n)
        matcher.backward(n, static_cast<const A*>(grad_similarity) + n * cells, grad_a, grad_b);
    };
    over_matched_pairs(problem, parallel_for, body);
  });
}

}  // namespace xcos::cpu::XCOS_ISA
