// What the forward and backward kernels of pairs have in common: moving maps, inner products, attention
// weights.
#pragma once

#include <limits>
#include <type_traits>

#include "core/cell_math.h"
#include "core/xcos_score.h"
#include "cuda/device.cuh"
#include "cuda/element.cuh"
#include "cuda/kernel_attributes.cuh"
#include "cuda/pair_plan.h"
#include "cuda/runtime.h"

namespace xcos::cuda {

// ---------------------------------------------------------------------------------------------- attention

template <typename R>
struct AttentionParams {
  Attention mode;
  Scalar scalar;
  const void* data;
  int64_t pair_stride;
  R temperature;
  R uniform;  // 1 / cells
};

// Values that are positive as a double stay positive as R.
template <typename R>
R positive(double value) {
  const R narrow = static_cast<R>(value);
  return narrow > R(0) ? narrow : std::numeric_limits<R>::min();
}

template <typename R>
AttentionParams<R> attention_params(const PairProblem& problem) {
  AttentionParams<R> p = {};
  p.mode = problem.mode;
  p.scalar = problem.attention.scalar;
  p.data = problem.attention.data;
  p.pair_stride = problem.attention.pair_stride;
  p.temperature = positive<R>(problem.temperature);
  p.uniform = R(1) / static_cast<R>(problem.shape.cells);
  return p;
}

// The weights of one pair, for every mode but norm, whose weights are known only after the features. kCells >
// 0: the values are read once and stay in registers.
template <typename R, class Group, int kCells>
struct AttentionRow {
  static constexpr R kInfinity = std::numeric_limits<R>::infinity();

  const AttentionParams<R>& params;
  int64_t offset;
  R largest = -kInfinity;  // logits: max over the cells
  R scale = R(1);          // logits: 1 / sum of exponentials
  R kept[kSlots<kCells, Group>];

  __device__ AttentionRow(const AttentionParams<R>& p, int64_t pair, int64_t cells, const Group& group)
      : params(p), offset(pair * p.pair_stride) {
    if constexpr (kCells > 0) {
      spread<kCells>(group, cells, [&](int64_t cell, int slot) { kept[slot] = given(cell); });
    }
    if (p.mode != Attention::logits) return;
    spread<kCells>(group, cells, [&](int64_t cell, int slot) {
      const R logit = kCells > 0 ? kept[slot] : given(cell);
      largest = logit > largest ? logit : largest;
    });
    largest = group.maximum(largest);
    R total[1] = {R(0)};
    spread<kCells>(group, cells, [&](int64_t cell, int slot) {
      const R value = unscaled(kCells > 0 ? kept[slot] : given(cell));
      if constexpr (kCells > 0) kept[slot] = value;
      total[0] += value;
    });
    group.sum(total);
    scale = R(1) / total[0];
  }

  // What the caller gave for a cell: its weight or its logit.
  __device__ R given(int64_t cell) const {
    if (params.mode != Attention::logits && params.mode != Attention::weights) return params.uniform;
    return load_scalar<R>(params.data, params.scalar, offset + cell);
  }

  // The difference first: it is exact where it matters and never overflows.
  __device__ R unscaled(R logit) const { return exponential((logit - largest) / params.temperature); }

  __device__ R weight(int64_t cell, int slot) const {
    if constexpr (kCells > 0) {
      return kept[slot] * scale;
    } else {
      return params.mode == Attention::logits ? unscaled(given(cell)) * scale : given(cell);
    }
  }
};

// ------------------------------------------------------------------------------------------------- moments

// Partial sums of the cells' inner products in shared memory: row (moment * parts + part), column cell. One
// thread owns a column; finished columns are reused, rows 0 to 3, for other values of the cell.
template <typename R>
struct CellTable {
  R* data;
  int parts;
  int pitch;

  __device__ R& at(int row, int cell) const { return data[row * pitch + cell]; }

  __device__ CellMoments<R> moments(int cell) const {
    R sums[3];
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      sums[k] = at(k * parts, cell);
      for (int part = 1; part < parts; ++part) sums[k] += at(k * parts + part, cell);
    }
    return {sums[0], sums[1], sums[2]};
  }

  __device__ void set_moments(int part, int cell, const CellMoments<R>& m) const {
    at(part, cell) = m.dot;
    at(parts + part, cell) = m.xx;
    at(2 * parts + part, cell) = m.yy;
  }

  __device__ CellGradient<R> gradient(int cell) const {
    return {at(0, cell), at(1, cell), at(2, cell), at(3, cell)};
  }

  __device__ void set_gradient(int cell, const CellGradient<R>& g) const {
    at(0, cell) = g.x_from_y;
    at(1, cell) = g.x_from_x;
    at(2, cell) = g.y_from_x;
    at(3, cell) = g.y_from_y;
  }
};

template <typename R>
__device__ inline void accumulate(CellMoments<R>& m, R x, R y) {
  m.dot += x * y;
  m.xx += x * x;
  m.yy += y * y;
}

// grad_x, grad_y of one element.
template <typename R>
__device__ inline void apply(const CellGradient<R>& g, R& x, R& y) {
  const R grad_x = g.x_from_y * y + g.x_from_x * x;
  y = g.y_from_x * x + g.y_from_y * y;
  x = grad_x;
}

// -------------------------------------------------------------------------------- staged: maps in shared
// memory

// Shape and walk of the maps; compile-time where kChannels is not 0.
template <typename T, int kChannels, int kCells>
struct StagedShape {
  const StagedLayout& layout;

  static constexpr int kChunks = kChannels * kCells * static_cast<int>(sizeof(T)) / 16;

  __device__ int channels() const { return kChannels > 0 ? kChannels : layout.channels; }
  __device__ int cells() const { return kCells > 0 ? kCells : layout.cells; }
  __device__ int slices() const { return kCells >= kWarp ? 1 : layout.slices; }
  // Unrolled as far as registers allow.
  static constexpr int kUnroll = kChannels > 0 ? 16 : 8;

  __device__ int row_chunks() const { return channels() * static_cast<int>(sizeof(T)) / 16; }
  __device__ int map_chunks() const { return channels() * cells() * static_cast<int>(sizeof(T)) / 16; }
  __device__ int rotation_shift() const {
    return kChannels > 0 ? rotation_shift_of(row_chunks()) : layout.rotation_shift;
  }
  __device__ int table_parts() const {
    if (kChannels == 0) return layout.table_parts;
    return layout.walk == Walk::words ? Element<T>::kPack : 1;
  }
  // Elements from one channel, or cell, to the next.
  __device__ int channel_stride(bool channels_last) const { return channels_last ? 1 : cells(); }
  __device__ int cell_stride(bool channels_last) const { return channels_last ? channels() : 1; }
};

// body(channel, cell) for every element of a map, spread over the lanes so that the faster dimension of
// global memory lies side by side.
template <class Shape, class Body>
__device__ inline void for_each_element(const Shape& shape, bool channel_fastest, int lane,
                                        const Body& body) {
  const int inner = channel_fastest ? shape.channels() : shape.cells();
  const int outer = channel_fastest ? shape.cells() : shape.channels();
  const int outer_step = kWarp / inner;
  const int inner_step = kWarp - outer_step * inner;
  int o = lane / inner;
  int i = lane - o * inner;
  while (o < outer) {
    body(channel_fastest ? i : o, channel_fastest ? o : i);
    o += outer_step;
    i += inner_step;
    if (i >= inner) {
      i -= inner;
      ++o;
    }
  }
}

// Starts copying one pair's map to shared memory; copy_async_wait() and a barrier finish it.
template <bool kVectorsOnly, typename T, class Shape>
__device__ inline void stage_map(const MapAccess<const void>& map, const Shape& shape, int64_t pair,
                                 T* shared, const WarpGroup& group) {
  const T* source = static_cast<const T*>(map.data) + pair * map.pair_stride;
  if (kVectorsOnly || map.vectors) {
    const Chunk<T>* from = reinterpret_cast<const Chunk<T>*>(source);
    Chunk<T>* to = reinterpret_cast<Chunk<T>*>(shared);
    spread<Shape::kChunks>(group, shape.map_chunks(), [&](int i, int) { copy_async<16>(to + i, from + i); });
    return;
  }
  const int channel_step = shape.channel_stride(map.channels_last);
  const int cell_step = shape.cell_stride(map.channels_last);
  for_each_element(shape, map.channel_stride < map.cell_stride, group.rank, [&](int channel, int cell) {
    T* to = shared + channel * channel_step + cell * cell_step;
    const T* from = source + channel * map.channel_stride + cell * map.cell_stride;
    if constexpr (sizeof(T) >= 4) {
      copy_async<sizeof(T)>(to, from);
    } else {
      *to = *from;
    }
  });
}

// Copies a gradient from shared memory to where it belongs.
template <bool kVectorsOnly, typename T, class Shape>
__device__ inline void unstage_map(const MapAccess<void>& map, const Shape& shape, int64_t pair,
                                   const T* shared, const WarpGroup& group) {
  T* target = static_cast<T*>(map.data) + pair * map.pair_stride;
  if (kVectorsOnly || map.vectors) {
    const Chunk<T>* from = reinterpret_cast<const Chunk<T>*>(shared);
    Chunk<T>* to = reinterpret_cast<Chunk<T>*>(target);
    spread<Shape::kChunks>(group, shape.map_chunks(), [&](int i, int) { to[i] = from[i]; });
    return;
  }
  const int channel_step = shape.channel_stride(map.channels_last);
  const int cell_step = shape.cell_stride(map.channels_last);
  for_each_element(shape, map.channel_stride < map.cell_stride, group.rank, [&](int channel, int cell) {
    target[channel * map.channel_stride + cell * map.cell_stride] =
        shared[channel * channel_step + cell * cell_step];
  });
}

// Calls body(column, slice) for the columns of words (or cells) that a lane works on. With fewer than 32
// columns, several lanes share one and each takes every slices-th of its rows.
template <class Shape, class Body>
__device__ inline void for_each_column(const Shape& shape, int lane, const Body& body) {
  const int columns = shape.cells();
  const int slices = shape.slices();
  if (slices == 1) {
#pragma unroll 1
    for (int column = lane; column < columns; column += kWarp) body(column, 0);
  } else if (lane < slices * columns) {
    const int slice = lane / columns;
    body(lane - slice * columns, slice);
  }
}

// Walk::words. Rows of kPack channels are rows of as many words as there are cells; consecutive lanes read
// consecutive words. With two elements a word, element j of column c is position p = 2 c + j of two channels
// in a row: cell p of the even channel, or cell p - cells of the odd one. Both halves of the table's row are
// that position p.
template <typename T, class Shape>
__device__ inline void word_moments(const Shape& shape, const T* x, const T* y,
                                    const CellTable<typename Element<T>::Result>& table, int lane) {
  using R = typename Element<T>::Result;
  using Word = typename Element<T>::Word;
  constexpr int kPack = Element<T>::kPack;
  const Word* x_words = reinterpret_cast<const Word*>(x);
  const Word* y_words = reinterpret_cast<const Word*>(y);
  const int columns = shape.cells();
  const int rows = shape.channels() / kPack;
  const int slices = shape.slices();
  for_each_column(shape, lane, [&](int column, int slice) {
    CellMoments<R> sums[kPack] = {};
#pragma unroll Shape::kUnroll
    for (int row = slice; row < rows; row += slices) {
      R a[kPack];
      R b[kPack];
      Element<T>::unpack(x_words[row * columns + column], a);
      Element<T>::unpack(y_words[row * columns + column], b);
#pragma unroll
      for (int j = 0; j < kPack; ++j) accumulate(sums[j], a[j], b[j]);
    }
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      // Parts 0 .. kPack - 1 of a slice lie side by side, so a position is an index into them.
      table.set_moments(slice * kPack, column * kPack + j, sums[j]);
    }
  });
}

template <typename T, class Shape>
__device__ inline void word_gradients(const Shape& shape, T* x, T* y,
                                      const CellTable<typename Element<T>::Result>& table, int lane) {
  using R = typename Element<T>::Result;
  using Word = typename Element<T>::Word;
  constexpr int kPack = Element<T>::kPack;
  Word* x_words = reinterpret_cast<Word*>(x);
  Word* y_words = reinterpret_cast<Word*>(y);
  const int columns = shape.cells();
  const int rows = shape.channels() / kPack;
  const int slices = shape.slices();
  for_each_column(shape, lane, [&](int column, int slice) {
    CellGradient<R> gradient[kPack];
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      const int position = column * kPack + j;
      gradient[j] = table.gradient(position < columns ? position : position - columns);
    }
#pragma unroll(Shape::kUnroll / 2)
    for (int row = slice; row < rows; row += slices) {
      R a[kPack];
      R b[kPack];
      Element<T>::unpack(x_words[row * columns + column], a);
      Element<T>::unpack(y_words[row * columns + column], b);
#pragma unroll
      for (int j = 0; j < kPack; ++j) apply(gradient[j], a[j], b[j]);
      x_words[row * columns + column] = Element<T>::pack(a);
      y_words[row * columns + column] = Element<T>::pack(b);
    }
  });
}

// Walk::chunks. body(chunk of x, chunk of y) for a lane's share of one cell, starting at a chunk that keeps
// the lanes in different banks.
template <typename T, class Shape, class Body>
__device__ inline void for_each_chunk(const Shape& shape, T* x, T* y, int cell, int slice, const Body& body) {
  using CellChunk = std::conditional_t<std::is_const_v<T>, const Chunk<std::remove_const_t<T>>, Chunk<T>>;
  const int chunks = shape.row_chunks();
  CellChunk* x_chunks = reinterpret_cast<CellChunk*>(x) + cell * chunks;
  CellChunk* y_chunks = reinterpret_cast<CellChunk*>(y) + cell * chunks;
  const int rotation = (cell >> shape.rotation_shift()) % chunks;
#pragma unroll 2
  for (int k = slice; k < chunks; k += shape.slices()) {
    int chunk = k + rotation;
    if (chunk >= chunks) chunk -= chunks;
    body(x_chunks[chunk], y_chunks[chunk]);
  }
}

template <typename T, class Shape>
__device__ inline void chunk_moments(const Shape& shape, const T* x, const T* y,
                                     const CellTable<typename Element<T>::Result>& table, int lane) {
  using R = typename Element<T>::Result;
  constexpr int kPack = Element<T>::kPack;
  for_each_column(shape, lane, [&](int cell, int slice) {
    CellMoments<R> sums = {};
    for_each_chunk(shape, x, y, cell, slice, [&](const Chunk<T>& x_chunk, const Chunk<T>& y_chunk) {
      const Chunk<T> xs = x_chunk;
      const Chunk<T> ys = y_chunk;
#pragma unroll
      for (int w = 0; w < Chunk<T>::kWords; ++w) {
        R a[kPack];
        R b[kPack];
        Element<T>::unpack(xs.word[w], a);
        Element<T>::unpack(ys.word[w], b);
#pragma unroll
        for (int j = 0; j < kPack; ++j) accumulate(sums, a[j], b[j]);
      }
    });
    table.set_moments(slice, cell, sums);
  });
}

template <typename T, class Shape>
__device__ inline void chunk_gradients(const Shape& shape, T* x, T* y,
                                       const CellTable<typename Element<T>::Result>& table, int lane) {
  using R = typename Element<T>::Result;
  constexpr int kPack = Element<T>::kPack;
  for_each_column(shape, lane, [&](int cell, int slice) {
    const CellGradient<R> gradient = table.gradient(cell);
    for_each_chunk(shape, x, y, cell, slice, [&](Chunk<T>& x_chunk, Chunk<T>& y_chunk) {
      Chunk<T> xs = x_chunk;
      Chunk<T> ys = y_chunk;
#pragma unroll
      for (int w = 0; w < Chunk<T>::kWords; ++w) {
        R a[kPack];
        R b[kPack];
        Element<T>::unpack(xs.word[w], a);
        Element<T>::unpack(ys.word[w], b);
#pragma unroll
        for (int j = 0; j < kPack; ++j) apply(gradient, a[j], b[j]);
        xs.word[w] = Element<T>::pack(a);
        ys.word[w] = Element<T>::pack(b);
      }
      x_chunk = xs;
      y_chunk = ys;
    });
  });
}

// Walk::elements. body(index into x, index into y) for a lane's share of one cell; lanes start at different
// channels, which keeps them in different banks in either order.
template <class Shape, class Body>
__device__ inline void for_each_channel(const Shape& shape, bool x_channels_last, bool y_channels_last,
                                        int cell, int slice, const Body& body) {
  const int channels = shape.channels();
  const int x_step = shape.channel_stride(x_channels_last);
  const int y_step = shape.channel_stride(y_channels_last);
  const int x_first = cell * shape.cell_stride(x_channels_last);
  const int y_first = cell * shape.cell_stride(y_channels_last);
  const int rotation = cell % channels;
  for (int k = slice; k < channels; k += shape.slices()) {
    int channel = k + rotation;
    if (channel >= channels) channel -= channels;
    body(x_first + channel * x_step, y_first + channel * y_step);
  }
}

template <bool kTuned, typename T, class Shape>
__device__ inline void staged_moments(const Shape& shape, const T* x, const T* y, bool x_channels_last,
                                      bool y_channels_last,
                                      const CellTable<typename Element<T>::Result>& table, int lane) {
  using R = typename Element<T>::Result;
  const Walk walk = shape.layout.walk;
  if (walk == Walk::words) {
    word_moments(shape, x, y, table, lane);
  } else if (kTuned || walk == Walk::chunks) {
    chunk_moments(shape, x, y, table, lane);
  } else {
    for_each_column(shape, lane, [&](int cell, int slice) {
      CellMoments<R> sums = {};
      for_each_channel(shape, x_channels_last, y_channels_last, cell, slice, [&](int i, int j) {
        accumulate(sums, Element<T>::load(x[i]), Element<T>::load(y[j]));
      });
      table.set_moments(slice, cell, sums);
    });
  }
}

// Replaces both maps by their gradients.
template <bool kTuned, typename T, class Shape>
__device__ inline void staged_gradients(const Shape& shape, T* x, T* y, bool x_channels_last,
                                        bool y_channels_last,
                                        const CellTable<typename Element<T>::Result>& table, int lane) {
  using R = typename Element<T>::Result;
  const Walk walk = shape.layout.walk;
  if (walk == Walk::words) {
    word_gradients(shape, x, y, table, lane);
  } else if (kTuned || walk == Walk::chunks) {
    chunk_gradients(shape, x, y, table, lane);
  } else {
    for_each_column(shape, lane, [&](int cell, int slice) {
      const CellGradient<R> gradient = table.gradient(cell);
      for_each_channel(shape, x_channels_last, y_channels_last, cell, slice, [&](int i, int j) {
        R a = Element<T>::load(x[i]);
        R b = Element<T>::load(y[j]);
        apply(gradient, a, b);
        x[i] = Element<T>::store(a);
        y[j] = Element<T>::store(b);
      });
    });
  }
}

// --------------------------------------------------------------------------- general: maps in global memory

using GeneralGroup = BlockGroup<kGeneralThreads>;

// One block's share of one tile of cells: threads of a unit (32 cells, or 1 cell with the lanes along its
// channels) walk over every slices-th channel.
struct GeneralShare {
  int groups;  // units of the tile
  int slices;  // warps that share a unit
  int first;   // this warp's first unit, then every kWarps-th
  int slice;   // this warp's slice
  int lane;
  bool along_channels;

  __device__ GeneralShare(bool along_channels_, int count, int rank) : along_channels(along_channels_) {
    constexpr int kWarps = GeneralGroup::kWarps;
    const int warp = rank / kWarp;
    lane = rank % kWarp;
    groups = along_channels ? count : (count + kWarp - 1) / kWarp;
    slices = groups < kWarps ? kWarps / groups : 1;
    slice = slices == 1 ? 0 : warp / groups;
    first = slice < slices ? warp - slice * groups : groups;
  }

  __device__ int pitch() const { return along_channels ? groups : groups * kWarp; }

  // body(cell of the tile, first channel, channel step), for every lane of a warp or for none.
  template <class Body>
  __device__ void for_each_cell(const Body& body) const {
    for (int unit = first; unit < groups; unit += GeneralGroup::kWarps) {
      if (along_channels) {
        body(unit, slice * kWarp + lane, slices * kWarp);
      } else {
        body(unit * kWarp + lane, slice, slices);
      }
    }
  }
};

template <typename T, typename Void>
__device__ inline T* element(const MapAccess<Void>& map, int64_t pair, int64_t cell, int64_t channel) {
  return static_cast<T*>(map.data) +
         (pair * map.pair_stride + cell * map.cell_stride + channel * map.channel_stride);
}

template <typename T>
__device__ inline CellTable<typename Element<T>::Result> general_moments(
    const MapAccess<const void>& a, const MapAccess<const void>& b, int64_t channels, int64_t pair,
    int64_t first_cell, int count, const GeneralShare& share, typename Element<T>::Result* shared) {
  using R = typename Element<T>::Result;
  const CellTable<R> table = {shared, share.slices, share.pitch()};
  share.for_each_cell([&](int cell, int first_channel, int step) {
    CellMoments<R> sums = {};
    if (cell < count) {
      const T* x = static_cast<const T*>(a.data) + pair * a.pair_stride + (first_cell + cell) * a.cell_stride;
      const T* y = static_cast<const T*>(b.data) + pair * b.pair_stride + (first_cell + cell) * b.cell_stride;
#pragma unroll 8
      for (int64_t c = first_channel; c < channels; c += step) {
        accumulate(sums, Element<T>::load(x[c * a.channel_stride]),
                   Element<T>::load(y[c * b.channel_stride]));
      }
    }
    if (share.along_channels) {
      R values[3] = {sums.dot, sums.xx, sums.yy};
      WarpGroup{share.lane}.sum(values);
      if (share.lane == 0) table.set_moments(share.slice, cell, {values[0], values[1], values[2]});
    } else {
      table.set_moments(share.slice, cell, sums);
    }
  });
  return table;
}

template <typename T>
__device__ inline void general_gradients(const MapAccess<const void>& a, const MapAccess<const void>& b,
                                         const MapAccess<void>& grad_a, const MapAccess<void>& grad_b,
                                         int64_t channels, int64_t pair, int64_t first_cell, int count,
                                         const GeneralShare& share,
                                         const CellTable<typename Element<T>::Result>& table) {
  using R = typename Element<T>::Result;
  share.for_each_cell([&](int cell, int first_channel, int step) {
    if (cell >= count) return;
    const int64_t at = first_cell + cell;
    const T* __restrict__ x = element<const T>(a, pair, at, first_channel);
    const T* __restrict__ y = element<const T>(b, pair, at, first_channel);
    // A gradient that is not wanted is computed all the same, and not written.
    const bool want_x = grad_a.data != nullptr;
    const bool want_y = grad_b.data != nullptr;
    T* __restrict__ grad_x = want_x ? element<T>(grad_a, pair, at, first_channel) : nullptr;
    T* __restrict__ grad_y = want_y ? element<T>(grad_b, pair, at, first_channel) : nullptr;
    const int64_t x_step = step * a.channel_stride;
    const int64_t y_step = step * b.channel_stride;
    const int64_t grad_x_step = want_x ? step * grad_a.channel_stride : 0;
    const int64_t grad_y_step = want_y ? step * grad_b.channel_stride : 0;
    const CellGradient<R> gradient = table.gradient(cell);
#pragma unroll 4
    for (int64_t c = first_channel; c < channels; c += step) {
      R u = Element<T>::load(*x);
      R v = Element<T>::load(*y);
      apply(gradient, u, v);
      if (want_x) *grad_x = Element<T>::store(u);
      if (want_y) *grad_y = Element<T>::store(v);
      x += x_step;
      y += y_step;
      grad_x += grad_x_step;
      grad_y += grad_y_step;
    }
  });
}

// ------------------------------------------------------------------------------------------------ launching

// Enqueues kKernel(params). With XCOS_CUDA_EMULATOR, the functions of CUDA's runtime are the emulator's.
template <auto kKernel, class Params>
Status launch(const PairPlan& plan, Params params, Stream stream) {
  if (plan.staged) prefer_shared_memory<kKernel>();
  void* arguments[] = {&params};
  const dim3 grid(static_cast<unsigned>(plan.blocks));
  const dim3 block(static_cast<unsigned>(plan.threads));
  const cudaError_t error =
      cudaLaunchKernel(kKernel, grid, block, arguments, static_cast<size_t>(plan.shared_bytes),
                       static_cast<cudaStream_t>(stream));
  // A refused launch must not be reported again by whoever asks next.
  if (error != cudaSuccess) static_cast<void>(cudaGetLastError());
  return static_cast<Status>(error);
}

}  // namespace xcos::cuda
