// What a probe and a tile of gallery faces have to do with each other: the logits (a maximum and a 3x3
// convolution), the cosines of the cells, and the attention. Lanes are gallery faces.
#pragma once

#include <utility>

#include "cpu/face_tiles.h"

namespace xcos::cpu::XCOS_ISA {
namespace {

// 2^x for x <= 0 (or barely above), to a relative error of 2e-7 in float; below 2^-126 it stays there instead
// of going to 0. NaN stays NaN. 2^x = 2^n 2^r with n the nearest integer, and 2^r a polynomial fitted to |r|
// <= 1/2.
template <typename V>
XCOS_INLINE V exp2_nonpositive(V x) {
  if constexpr (std::is_same_v<V, Vec<double, sizeof(V) / 8>>) {
    for (size_t i = 0; i < sizeof(V) / 8; ++i) x[i] = __builtin_exp2(x[i]);
    return x;
  } else {
    const V bounded = vector_max(broadcast_value<V>(-126.0f), x);  // of two, x where it is NaN
#if defined(__AVX512F__)
    const V n = (V)_mm512_roundscale_ps((__m512)bounded, _MM_FROUND_TO_NEAREST_INT);
#else
    const V magic = broadcast_value<V>(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const V shifted = bounded + magic;
    const V n = shifted - magic;
#endif
    const V r = bounded - n;
    V p = broadcast_value<V>(0.00132647273f);
    p = multiply_add<V>(p, r, broadcast_value<V>(0.00967151299f));
    p = multiply_add<V>(p, r, broadcast_value<V>(0.0555073343f));
    p = multiply_add<V>(p, r, broadcast_value<V>(0.240222424f));
    p = multiply_add<V>(p, r, broadcast_value<V>(0.693147004f));
    p = multiply_add<V>(p, r, broadcast_value<V>(1.0f));
#if defined(__AVX512F__)
    return (V)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    using I = Vec<uint32_t, sizeof(V) / 4>;
    return p * reinterpret_cast<V>((reinterpret_cast<I>(shifted) + 127u) << 23);
#endif
  }
}

template <typename V>
XCOS_INLINE V rectify(V y, V slope) {
  return y > V{} ? y : y * slope;
}

// One input cell's share in the up to nine outputs around it. kUp, kHere, kDown: the output rows wanted. An
// output above sees this cell through its lower taps.
template <class P, bool kUp, bool kHere, bool kDown, int Q, int W>
XCOS_INLINE void spread_cell(typename P::Packed h, const typename P::Packed (&w)[9], typename P::Sum (&up)[W],
                             typename P::Sum (&here)[W], typename P::Sum (&down)[W]) {
  if constexpr (kUp) {
    if constexpr (Q > 0) up[Q - 1] = P::multiply_add(h, w[8], up[Q - 1]);
    up[Q] = P::multiply_add(h, w[7], up[Q]);
    if constexpr (Q + 1 < W) up[Q + 1] = P::multiply_add(h, w[6], up[Q + 1]);
  }
  if constexpr (kHere) {
    if constexpr (Q > 0) here[Q - 1] = P::multiply_add(h, w[5], here[Q - 1]);
    here[Q] = P::multiply_add(h, w[4], here[Q]);
    if constexpr (Q + 1 < W) here[Q + 1] = P::multiply_add(h, w[3], here[Q + 1]);
  }
  if constexpr (kDown) {
    if constexpr (Q > 0) down[Q - 1] = P::multiply_add(h, w[2], down[Q - 1]);
    down[Q] = P::multiply_add(h, w[1], down[Q]);
    if constexpr (Q + 1 < W) down[Q + 1] = P::multiply_add(h, w[0], down[Q + 1]);
  }
}

// One grid row of inputs into the rows above, of and below it. y points at this row's sums.
template <class P, bool kUp, bool kHere, bool kDown, int... Q>
XCOS_INLINE void spread_row(std::integer_sequence<int, Q...>, const typename P::Word* u,
                            const typename P::Packed* v, const typename P::Word* weight, int64_t words,
                            int64_t cells, typename P::Sum* y) {
  constexpr int W = sizeof...(Q);
  typename P::Sum up[W], here[W], down[W];
  if constexpr (kUp) ((up[Q] = y[Q - W]), ...);
  if constexpr (kHere) ((here[Q] = y[Q]), ...);
  if constexpr (kDown) ((down[Q] = y[Q + W]), ...);
  for (int64_t c = 0; c < words; ++c, u += cells, v += cells, weight += 9) {
    const typename P::Packed w[9] = {
        P::broadcast(weight),     P::broadcast(weight + 1), P::broadcast(weight + 2),
        P::broadcast(weight + 3), P::broadcast(weight + 4), P::broadcast(weight + 5),
        P::broadcast(weight + 6), P::broadcast(weight + 7), P::broadcast(weight + 8)};
    (spread_cell<P, kUp, kHere, kDown, Q, W>(P::maximum(u + Q, v[Q]), w, up, here, down), ...);
  }
  if constexpr (kUp) ((y[Q - W] = up[Q]), ...);
  if constexpr (kHere) ((y[Q] = here[Q]), ...);
  if constexpr (kDown) ((y[Q + W] = down[Q]), ...);
}

// Registers decide how many output rows are in flight: 3 x 7 sums, 9 weights and a maximum fill AVX-512's 32;
// with 16 a row at a time repeats the maxima but keeps the sums where they are.
#if defined(__AVX512F__)
constexpr bool kThreeRows = true;
#else
constexpr bool kThreeRows = false;
#endif

// Not inlined: constants of the code around it would take registers from it.
template <class P, int W>
__attribute__((noinline)) void spread_rows(const Sizes& s, const typename P::Word* u,
                                           const typename P::Packed* v, const typename P::Word* weight,
                                           typename P::Sum* y) {
  using Columns = std::make_integer_sequence<int, W>;
  for (int64_t r = 0; r < s.height; ++r) {
    const bool up = r > 0, down = r + 1 < s.height;
    const int64_t first = r * W;
    const typename P::Word* ur = u + first;
    const typename P::Packed* vr = v + first;
    typename P::Sum* yr = y + first;
    const int64_t n = s.hidden_words, cells = s.cells;
    if (kThreeRows) {
      if (up && down)
        spread_row<P, true, true, true>(Columns{}, ur, vr, weight, n, cells, yr);
      else if (up)
        spread_row<P, true, true, false>(Columns{}, ur, vr, weight, n, cells, yr);
      else if (down)
        spread_row<P, false, true, true>(Columns{}, ur, vr, weight, n, cells, yr);
      else
        spread_row<P, false, true, false>(Columns{}, ur, vr, weight, n, cells, yr);
    } else {
      if (up) spread_row<P, true, false, false>(Columns{}, ur, vr, weight, n, cells, yr);
      spread_row<P, false, true, false>(Columns{}, ur, vr, weight, n, cells, yr);
      if (down) spread_row<P, false, false, true>(Columns{}, ur, vr, weight, n, cells, yr);
    }
  }
}

// Any width: sums in memory.
template <class P>
XCOS_INLINE void spread_any(const Sizes& s, const typename P::Word* u, const typename P::Packed* v,
                            const typename P::Word* weight, typename P::Sum* y) {
  for (int64_t c = 0; c < s.hidden_words; ++c, weight += 9) {
    for (int64_t r = 0; r < s.height; ++r) {
      for (int64_t q = 0; q < s.width; ++q) {
        const int64_t cell = r * s.width + q;
        const typename P::Packed h = P::maximum(u + c * s.cells + cell, v[c * s.cells + cell]);
        for (int dy = -1; dy <= 1; ++dy) {
          if (r + dy < 0 || r + dy >= s.height) continue;
          for (int dx = -1; dx <= 1; ++dx) {
            if (q + dx < 0 || q + dx >= s.width) continue;
            typename P::Sum& sum = y[cell + dy * s.width + dx];
            sum = P::multiply_add(h, P::broadcast(weight + (1 - dy) * 3 + 1 - dx), sum);
          }
        }
      }
    }
  }
}

// Dot products of one cell for several probes: K words of the tile stay in registers, so that a product costs
// one load.
template <class P, bool kFirst, int... K>
XCOS_INLINE void dot_cell(std::integer_sequence<int, K...>, const typename P::Word* const* a, int64_t offset,
                          const typename P::Packed* b, int count, int64_t step, typename P::Sum* out) {
  const typename P::Packed kept[] = {b[K]...};
  for (int i = 0; i < count; ++i) {
    const typename P::Word* word = a[i] + offset;
    typename P::Sum sum = {};
    if constexpr (!kFirst) sum = out[i * step];
    ((sum = P::multiply_add(P::broadcast(word + K), kept[K], sum)), ...);
    out[i * step] = sum;
  }
}

// S of `count` probes, before fixed-point units: out[i * step + cell].
template <class P>
XCOS_INLINE void dot_all_cells(const Sizes& s, const typename P::Word* const* a, const typename P::Packed* b,
                               int count, int64_t step, typename P::Sum* out) {
  constexpr int kKept = kThreeRows ? 16 : 8;
  const int64_t n = s.channel_words;
  for (int64_t cell = 0; cell < s.cells; ++cell, b += n) {
    int64_t c = 0;
    for (; c + kKept <= n; c += kKept) {
      using Kept = std::make_integer_sequence<int, kKept>;
      if (c == 0)
        dot_cell<P, true>(Kept{}, a, cell * n, b, count, step, out + cell);
      else
        dot_cell<P, false>(Kept{}, a, cell * n + c, b + c, count, step, out + cell);
    }
    for (; c < n; ++c) {
      using Kept = std::make_integer_sequence<int, 1>;
      if (c == 0)
        dot_cell<P, true>(Kept{}, a, cell * n, b, count, step, out + cell);
      else
        dot_cell<P, false>(Kept{}, a, cell * n + c, b + c, count, step, out + cell);
    }
  }
}

// Parameters shared by all pairs, as the kernels use them.
template <class P>
class PairParameters {
 public:
  using Result = typename P::Result;
  using Word = typename P::Word;

  PairParameters(const MatrixProblem& m, const Sizes& s) : weight_(s.hidden_words * 9) {
    const Result* w = static_cast<const Result*>(m.weight);
    slope = *static_cast<const Result*>(m.slope);
    softmax = m.normalize == Normalize::softmax;
    log2_scale = static_cast<Result>(1.4426950408889634074 / m.temperature);
    weight_unit = 1;
    if constexpr (!P::kFixed) {
      for (int64_t i = 0; i < s.hidden * 9; ++i) weight_.get()[i] = w[i];
    } else {
#if defined(__AVX512VNNI__)
      double sum = 0, largest = 0;
      for (int64_t i = 0; i < s.hidden * 9; ++i) {
        const double magnitude = std::fabs(static_cast<double>(w[i]));
        sum += magnitude;
        largest = magnitude > largest ? magnitude : largest;
      }
      double scale = 1;
      // Room for the rounding of every weight stays free.
      if (sum > 0) scale = (131072.0 - 0.5 * 9 * static_cast<double>(s.hidden + 1)) / sum;
      if (scale * largest > 32767.0) scale = 32767.0 / largest;
      const bool finite = sum <= std::numeric_limits<double>::max();
      weight_unit = finite ? static_cast<float>(1 / scale) : std::numeric_limits<float>::quiet_NaN();
      for (int64_t row = 0; row < s.hidden_words; ++row) {
        for (int k = 0; k < 9; ++k) {
          const auto fixed = [&](int64_t c) {
            return c < s.hidden && finite ? static_cast<int32_t>(std::lrint(w[c * 9 + k] * scale)) : 0;
          };
          const int32_t low = fixed(2 * row), high = fixed(2 * row + 1);
          weight_.get()[row * 9 + k] =
              (low & 0xffff) | static_cast<int32_t>(static_cast<uint32_t>(high) << 16);
        }
      }
#endif
    }
  }

  const Word* weight() const { return weight_.get(); }

  Result slope;
  Result log2_scale;   // log2(e) / temperature
  Result weight_unit;  // what one unit of a fixed-point weight is worth
  bool softmax;

 private:
  Buffer<Word> weight_;
};

constexpr int kProbeGroup = 8;  // probes whose cosines with a tile are computed together

// Working memory of a group of probes against one tile.
template <class P>
struct PairWork {
  explicit PairWork(const Sizes& s) : sums(s.cells), dots(kProbeGroup * s.cells), weight(s.cells) {}

  Buffer<typename P::Sum> sums;
  Buffer<typename P::Sum> dots;       // [kProbeGroup, cells]: S, in fixed-point units where there are such
  Buffer<typename P::Vector> weight;  // z, then e^(z - max z) or z - min z
};

// z of one order into work.weight, and the largest z (NaN may be missed). Real arithmetic leaves y in
// work.sums.
template <class P, int W>
XCOS_INLINE typename P::Vector logits(const Sizes& s, const PairParameters<P>& parameters,
                                      const typename P::Word* u, const typename P::Result* bias,
                                      const FaceTile<P>& tile, int64_t order, PairWork<P>& work) {
  using V = typename P::Vector;
  typename P::Sum* y = work.sums.get();
  V* z = work.weight.get();
  const typename P::Packed* v = tile.projection() + order * s.hidden_words * s.cells;
  const typename P::Word* up = u + order * s.hidden_words * s.cells;
  const V* tile_bias = tile.bias() + order * s.cells;
  bias += order * s.cells;
  const V slope = broadcast_value<V>(parameters.slope);
  V largest = broadcast_value<V>(-std::numeric_limits<typename P::Result>::infinity());
  if constexpr (P::kFixed) {
    for (int64_t i = 0; i < s.cells; ++i) y[i] = typename P::Sum{};
  } else {
    for (int64_t i = 0; i < s.cells; ++i) y[i] = tile_bias[i] + bias[i];
  }
  if constexpr (W > 0)
    spread_rows<P, W>(s, up, v, parameters.weight(), y);
  else
    spread_any<P>(s, up, v, parameters.weight(), y);
  if constexpr (P::kFixed) {
    const float unit = parameters.weight_unit / projection_scale(tile.unit());
    for (int64_t i = 0; i < s.cells; ++i) {
      const V sum = multiply_add<V>(P::real(y[i]), broadcast_value<V>(unit), tile_bias[i] + bias[i]);
      z[i] = rectify<V>(sum, slope);
      largest = vector_max(z[i], largest);
    }
  } else {
    for (int64_t i = 0; i < s.cells; ++i) {
      z[i] = rectify<V>(y[i], slope);
      largest = vector_max(z[i], largest);
    }
  }
  return largest;
}

// sum_i W_i S_i of one order. Leaves in work.weight the weights before they are divided by `total`.
template <class P>
XCOS_INLINE typename P::Vector weigh(const Sizes& s, const PairParameters<P>& parameters,
                                     const typename P::Sum* dots, typename P::Vector largest,
                                     PairWork<P>& work, typename P::Vector& total) {
  using V = typename P::Vector;
  V* z = work.weight.get();
  V sum = {}, weighted = {};
  if (parameters.softmax) {
    const V scale = broadcast_value<V>(parameters.log2_scale);
    // Rounded once for all cells, so what is lost is common to them and leaves with the division.
    const V shift = -largest * scale;
    for (int64_t i = 0; i < s.cells; ++i) {
      const V e = exp2_nonpositive<V>(multiply_add<V>(z[i], scale, shift));
      z[i] = e;
      sum += e;
      weighted = multiply_add<V>(e, P::real(dots[i]), weighted);
    }
    total = sum;
    return weighted / sum * broadcast_value<V>(P::kDotUnit);
  }
  V smallest = -z[0];
  for (int64_t i = 1; i < s.cells; ++i) smallest = vector_max(smallest, -z[i]);
  V plain = {};
  for (int64_t i = 0; i < s.cells; ++i) {
    const V e = z[i] + smallest;
    z[i] = e;
    sum += e;
    plain += P::real(dots[i]);
    weighted = multiply_add<V>(e, P::real(dots[i]), weighted);
  }
  const V zero = {};
  total = sum;
  const V cells = broadcast_value<V>(static_cast<typename P::Result>(s.cells));
  return (sum == zero ? plain / cells : weighted / sum) * broadcast_value<V>(P::kDotUnit);
}

}  // namespace
}  // namespace xcos::cpu::XCOS_ISA
