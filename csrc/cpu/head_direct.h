// The layers of xcos_head in fp32. Lanes are hidden channels: a weight of all of them is a vector, a value of
// the input is broadcast, and the output cells of up to three grid rows are sums in registers. Taps that
// would leave the grid are not computed.
#pragma once

#include <utility>

#include "core/xcos_head.h"
#include "cpu/face_tiles.h"

namespace xcos::cpu::XCOS_ISA {
namespace {

constexpr int kHeadLanes = native_lanes<float>();
constexpr int kHeadParts = kHeadHidden / kHeadLanes;  // vectors that hold the hidden channels
using HeadVector = Vec<float, kHeadLanes>;

// One value for all lanes (of a map or of a face's hidden channels), or a value a lane.
template <bool kAlike>
XCOS_INLINE HeadVector head_input(const float* x) {
  if constexpr (kAlike) return broadcast_value<HeadVector>(*x);
  return load<kHeadLanes>(x);
}

// One input cell's share in the up to nine outputs around it. An output above sees it through its lower taps.
template <bool kUp, bool kHere, bool kDown, int Q, int W>
XCOS_INLINE void head_spread_cell(HeadVector x, const HeadVector (&w)[9], HeadVector (&up)[W],
                                  HeadVector (&here)[W], HeadVector (&down)[W]) {
  const auto add = [&](HeadVector& sum, const HeadVector& weight) {
    sum = multiply_add<HeadVector>(x, weight, sum);
  };
  if constexpr (kUp) {
    if constexpr (Q > 0) add(up[Q - 1], w[8]);
    add(up[Q], w[7]);
    if constexpr (Q + 1 < W) add(up[Q + 1], w[6]);
  }
  if constexpr (kHere) {
    if constexpr (Q > 0) add(here[Q - 1], w[5]);
    add(here[Q], w[4]);
    if constexpr (Q + 1 < W) add(here[Q + 1], w[3]);
  }
  if constexpr (kDown) {
    if constexpr (Q > 0) add(down[Q - 1], w[2]);
    add(down[Q], w[1]);
    if constexpr (Q + 1 < W) add(down[Q + 1], w[0]);
  }
}

// One grid row of inputs, all their channels, into the sums of the rows above, of and below it.
template <bool kAlike, int kCell, bool kUp, bool kHere, bool kDown, int... Q>
XCOS_INLINE void head_spread_row(std::integer_sequence<int, Q...>, const float* x, int64_t channels,
                                 int64_t channel_stride, const float* weight, float* y) {
  constexpr int W = sizeof...(Q), kRow = W * kHeadHidden;
  HeadVector up[W], here[W], down[W];
  if constexpr (kUp) ((up[Q] = load<kHeadLanes>(y - kRow + Q * kHeadHidden)), ...);
  if constexpr (kHere) ((here[Q] = load<kHeadLanes>(y + Q * kHeadHidden)), ...);
  if constexpr (kDown) ((down[Q] = load<kHeadLanes>(y + kRow + Q * kHeadHidden)), ...);
  for (int64_t c = 0; c < channels; ++c, x += channel_stride, weight += kHeadTaps * kHeadHidden) {
    HeadVector w[9];
    for (int k = 0; k < 9; ++k) {
      w[k] = load<kHeadLanes>(weight + k * kHeadHidden);
      XCOS_KEEP(w[k]);
    }
    (head_spread_cell<kUp, kHere, kDown, Q, W>(head_input<kAlike>(x + Q * kCell), w, up, here, down), ...);
  }
  if constexpr (kUp) (store<kHeadLanes>(y - kRow + Q * kHeadHidden, up[Q]), ...);
  if constexpr (kHere) (store<kHeadLanes>(y + Q * kHeadHidden, here[Q]), ...);
  if constexpr (kDown) (store<kHeadLanes>(y + kRow + Q * kHeadHidden, down[Q]), ...);
}

// y += the 3x3 convolution of x for kHeadLanes hidden channels. x: channels at channel_stride, cells at
// kCell; y: [cells, hidden]; weight: [channels, taps, hidden]. Not inlined: constants of the code around it
// would take registers from it.
template <bool kAlike, int kCell, int W>
__attribute__((noinline)) void head_convolve_rows(const float* x, int64_t channels, int64_t channel_stride,
                                                  int64_t height, const float* weight, float* y) {
  using Columns = std::make_integer_sequence<int, W>;
  for (int64_t r = 0; r < height; ++r, x += W * kCell, y += W * kHeadHidden) {
    const bool up = r > 0, down = r + 1 < height;
#if defined(__AVX512F__)  // 3 x 7 sums, 9 weights and an input fill 32 registers
    if (up && down)
      head_spread_row<kAlike, kCell, true, true, true>(Columns{}, x, channels, channel_stride, weight, y);
    else if (up)
      head_spread_row<kAlike, kCell, true, true, false>(Columns{}, x, channels, channel_stride, weight, y);
    else if (down)
      head_spread_row<kAlike, kCell, false, true, true>(Columns{}, x, channels, channel_stride, weight, y);
    else
      head_spread_row<kAlike, kCell, false, true, false>(Columns{}, x, channels, channel_stride, weight, y);
#else
    if (up)
      head_spread_row<kAlike, kCell, true, false, false>(Columns{}, x, channels, channel_stride, weight, y);
    head_spread_row<kAlike, kCell, false, true, false>(Columns{}, x, channels, channel_stride, weight, y);
    if (down)
      head_spread_row<kAlike, kCell, false, false, true>(Columns{}, x, channels, channel_stride, weight, y);
#endif
  }
}

// The same for any width: a cell of output after the other, its sum in a register.
template <bool kAlike, int kCell>
__attribute__((noinline)) void head_convolve_cells(const float* x, int64_t channels, int64_t channel_stride,
                                                   int64_t height, int64_t width, const float* weight,
                                                   float* y) {
  for (int64_t r = 0; r < height; ++r) {
    for (int64_t q = 0; q < width; ++q, y += kHeadHidden) {
      HeadVector sum = load<kHeadLanes>(y);
      for (int64_t dy = r > 0 ? -1 : 0; dy <= (r + 1 < height ? 1 : 0); ++dy) {
        for (int64_t dx = q > 0 ? -1 : 0; dx <= (q + 1 < width ? 1 : 0); ++dx) {
          const float* from = x + ((r + dy) * width + q + dx) * kCell;
          const float* w = weight + ((dy + 1) * 3 + dx + 1) * kHeadHidden;
          for (int64_t c = 0; c < channels; ++c, from += channel_stride, w += kHeadTaps * kHeadHidden)
            sum = multiply_add<HeadVector>(head_input<kAlike>(from), load<kHeadLanes>(w), sum);
        }
      }
      store<kHeadLanes>(y, sum);
    }
  }
}

template <bool kAlike, int kCell>
XCOS_INLINE void head_convolve(const float* x, int64_t channels, int64_t channel_stride, int64_t height,
                               int64_t width, const float* weight, float* y) {
  for (int part = 0; part < kHeadParts; ++part) {
    const int first = part * kHeadLanes;  // lanes that meet values of their own begin there in x too
    const float* from = kAlike ? x : x + first;
    if (width == 7)
      head_convolve_rows<kAlike, kCell, 7>(from, channels, channel_stride, height, weight + first, y + first);
    else
      head_convolve_cells<kAlike, kCell>(from, channels, channel_stride, height, width, weight + first,
                                         y + first);
  }
}

// The last layer, from the hidden one [cells, hidden] to g of every cell.
XCOS_INLINE void last_layer(const HeadLayout& layout, const float* packed, int64_t height, int64_t width,
                            const float* hidden, float* out) {
  alignas(64) float last[kHeadMostCells * kHeadHidden];
  const int64_t cells = height * width;
  memset(last, 0, cells * kHeadHidden * sizeof(float));
  head_convolve<false, kHeadHidden>(hidden, 1, 0, height, width, packed + layout.last, last);
  const float shift = packed[layout.last_shift], slope = packed[layout.slopes + 2];
  for (int64_t i = 0; i < cells; ++i) {
    HeadVector sum = load<kHeadLanes>(last + i * kHeadHidden);
    for (int part = 1; part < kHeadParts; ++part)
      sum += load<kHeadLanes>(last + i * kHeadHidden + part * kHeadLanes);
    const float y = sum_lanes<float, kHeadLanes>(sum) + shift;
    out[i] = y > 0.0f ? y : y * slope;
  }
}

// The arithmetic of HeadTask (xcos_head.cpp) in fp32.
class HeadDirect {
 public:
  struct Work {
    alignas(64) float embedded[2][kHeadMostCells * kHeadHidden];  // E of both faces [cells, hidden]
    alignas(64) float hidden[kHeadMostCells * kHeadHidden];
  };

  HeadDirect(const HeadProblem& p, const float* packed)
      : layout_(HeadLayout::of(p.pair.shape.channels)),
        packed_(packed),
        channels_(p.pair.shape.channels),
        height_(p.height),
        width_(p.width),
        cells_(p.pair.shape.cells) {}

  // Before and after a thread's use of an engine.
  void begin(Work&) const {}
  void end() const {}

  // E of one face. map: F, its cells side by side; side 0: the first face.
  void embed(const float* map, int64_t channel_stride, int side, Work& work) const {
    start(packed_ + layout_.embed_shift, work.embedded[side]);
    head_convolve<true, 1>(map, channels_, channel_stride, height_, width_, packed_ + layout_.embed,
                           work.embedded[side]);
    activate(packed_[layout_.slopes], work.embedded[side]);
  }

  // g of every cell; order 1: with the faces exchanged.
  void logits(int order, Work& work, float* out) const {
    start(packed_ + layout_.first_shift, work.hidden);
    const float* weight = packed_ + layout_.first;
    for (int part = 0; part < 2; ++part, weight += kHeadHidden * kHeadTaps * kHeadHidden)
      head_convolve<true, kHeadHidden>(work.embedded[order ^ part], kHeadHidden, 1, height_, width_, weight,
                                       work.hidden);
    activate(packed_[layout_.slopes + 1], work.hidden);
    last_layer(layout_, packed_, height_, width_, work.hidden, out);
  }

 private:
  void start(const float* shift, float* y) const {
    HeadVector s[kHeadParts];
    for (int part = 0; part < kHeadParts; ++part) s[part] = load<kHeadLanes>(shift + part * kHeadLanes);
    for (int64_t i = 0; i < cells_; ++i)
      for (int part = 0; part < kHeadParts; ++part)
        store<kHeadLanes>(y + i * kHeadHidden + part * kHeadLanes, s[part]);
  }
  void activate(float slope_value, float* y) const {
    const HeadVector slope = broadcast_value<HeadVector>(slope_value);
    for (int64_t i = 0; i < cells_ * kHeadHidden; i += kHeadLanes) {
      const HeadVector v = load<kHeadLanes>(y + i);
      store<kHeadLanes>(y + i, v > HeadVector{} ? v : v * slope);
    }
  }

  HeadLayout layout_;
  const float* packed_;
  int64_t channels_;
  int64_t height_;
  int64_t width_;
  int64_t cells_;
};

}  // namespace
}  // namespace xcos::cpu::XCOS_ISA
