// How one call is mapped onto the GPU: which kernel, how maps travel, launch geometry. Host arithmetic only.
//
// staged:  a warp per pair; both maps are copied to shared memory first. The path of small maps such as
// 32x7x7. general: a block per pair (or per part of a pair), features straight from global memory. Any size.
#pragma once

#include <cstdint>

#include "core/xcos_score.h"

namespace xcos::cuda {

constexpr int kStagedThreads = 128;      // most threads of a staged block
constexpr int kStagedBlocks = 6;         // staged blocks of an SM, at least, that registers must allow
constexpr int kStagedBytes = 48 * 1024;  // shared memory that every block may have without asking
constexpr int kGeneralThreads = 256;
constexpr int kGeneralBlocks = 2;              // as kStagedBlocks
constexpr int kGeneralTile = kGeneralThreads;  // cells a general block works on at a time
constexpr int kTunedChannels = 32;
constexpr int kTunedCells = 49;

#if !defined(XCOS_CUDA_MAX_GRID)
#define XCOS_CUDA_MAX_GRID 0x7fffffff  // gridDim.x; kernels loop over what does not fit
#endif

// How the lanes of a warp share out a pair in shared memory.
enum class Walk : int32_t {
  words,     // both maps [channels, cells]; a lane owns a column of 4- or 8-byte words
  chunks,    // both maps [cells, channels]; a lane owns a cell and reads 16 bytes at a time
  elements,  // any mixture
};

template <typename Void>
struct MapAccess {
  Void* data;  // null: an output that is not wanted
  int64_t pair_stride;
  int64_t channel_stride;
  int64_t cell_stride;
  bool vectors;        // copied in 16-byte vectors, in memory order
  bool channels_last;  // [cells, channels] in shared memory
};

struct StagedLayout {
  int32_t channels;
  int32_t cells;
  Walk walk;
  int32_t slices;          // lanes that share a column or cell; more than one only below 32 cells
  int32_t rotation_shift;  // chunks: lanes l and l + 2^shift start at different chunks
  int32_t table_parts;     // partial sums of one cell
  int32_t map_bytes;       // of one map in shared memory
  int32_t warp_bytes;
  int32_t warps;  // of a block
};

struct GeneralLayout {
  bool along_channels;  // lanes lie along channels, not cells
  int64_t tiles;        // of a pair's cells
  int64_t parts;        // blocks that share a pair
};

struct PairPlan {
  bool staged;
  bool tuned;  // staged, of the compile-time shape, everything in vectors
  StagedLayout layout;
  GeneralLayout general;
  int64_t blocks;
  int32_t threads;
  int32_t shared_bytes;
};

constexpr int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }
constexpr int64_t divide_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit; }

// Lanes l and l' of the eight that a 16-byte shared memory access serves at a time fall into the same banks
// when l * chunks = l' * chunks (mod 8), that is when l = l' (mod 8 / gcd); the shift makes those start at
// different chunks.
XCOS_HD constexpr int32_t rotation_shift_of(int64_t chunks) {
  return chunks % 8 == 0 ? 0 : chunks % 4 == 0 ? 1 : chunks % 2 == 0 ? 2 : 3;
}

inline MapAccess<const void> access_of(const FeatureView& view) {
  return {view.data, view.pair_stride, view.channel_stride, view.cell_stride, false, false};
}

inline MapAccess<void> access_of(const MutableFeatureView& view) {
  return {view.data, view.pair_stride, view.channel_stride, view.cell_stride, false, false};
}

// Decides whether a map can be copied as it lies in memory, and in which order that leaves it.
template <typename Void>
void find_vectors(const PairShape& shape, Scalar scalar, MapAccess<Void>& map) {
  const bool one_channel = shape.channels == 1;
  const bool one_cell = shape.cells == 1;
  const bool by_channel =
      (one_cell || map.cell_stride == 1) && (one_channel || map.channel_stride == shape.cells);
  const bool by_cell =
      (one_channel || map.channel_stride == 1) && (one_cell || map.cell_stride == shape.channels);
  const int64_t size = scalar_size(scalar);
  const bool aligned = reinterpret_cast<uintptr_t>(map.data) % 16 == 0 &&
                       (shape.pairs == 1 || map.pair_stride * size % 16 == 0) &&
                       shape.channels * shape.cells * size % 16 == 0;
  map.vectors = aligned && (by_channel || by_cell);
  map.channels_last = map.vectors && !by_channel;
}

// a, b: inputs; grad_a, grad_b: outputs of the backward pass, or null. divisible: cells of a pair do not
// depend on each other, so several blocks may share one pair.
inline PairPlan plan_pairs(const PairProblem& problem, MapAccess<const void>& a, MapAccess<const void>& b,
                           MapAccess<void>* grad_a, MapAccess<void>* grad_b, bool divisible) {
  const PairShape& shape = problem.shape;
  const int64_t size = scalar_size(problem.scalar);
  const int64_t result_size = scalar_size(result_scalar(problem.scalar));
  PairPlan plan = {};

  find_vectors(shape, problem.scalar, a);
  find_vectors(shape, problem.scalar, b);
  StagedLayout& layout = plan.layout;
  // The bounds come first: they keep the products below from overflowing.
  if (shape.channels <= kStagedBytes && shape.cells <= kStagedBytes &&
      shape.channels * shape.cells * size <= kStagedBytes) {
    layout.channels = static_cast<int32_t>(shape.channels);
    layout.cells = static_cast<int32_t>(shape.cells);
    const int pack = size == 2 ? 2 : 1;
    const int64_t row_bytes = shape.channels * size;
    layout.walk = Walk::elements;
    if (!a.channels_last && !b.channels_last && shape.channels % pack == 0) layout.walk = Walk::words;
    if (a.channels_last && b.channels_last && row_bytes % 16 == 0) layout.walk = Walk::chunks;
    layout.slices = shape.cells >= 32 ? 1 : 32 / layout.cells;
    layout.rotation_shift = rotation_shift_of(row_bytes / 16);
    layout.table_parts = layout.slices * (layout.walk == Walk::words ? pack : 1);
    // Moments take three rows of parts; four coefficients take their place later.
    const int64_t rows = 3 * layout.table_parts > 4 ? 3 * layout.table_parts : 4;
    layout.map_bytes = static_cast<int32_t>(round_up(shape.channels * shape.cells * size, 16));
    const int64_t warp_bytes = 2 * layout.map_bytes + round_up(rows * shape.cells * result_size, 16);
    plan.staged = warp_bytes <= kStagedBytes;
    if (plan.staged) {
      layout.warp_bytes = static_cast<int32_t>(warp_bytes);
      const int64_t fitting = kStagedBytes / warp_bytes;
      const int64_t most = kStagedThreads / 32;
      layout.warps = static_cast<int32_t>(fitting < most ? fitting : most);
    }
  }

  bool output_vectors = true;
  for (MapAccess<void>* map : {grad_a, grad_b}) {
    if (map == nullptr || map->data == nullptr) continue;
    find_vectors(shape, problem.scalar, *map);
    // A gradient lies in shared memory where, and in the order in which, its feature map was.
    const MapAccess<const void>& source = map == grad_a ? a : b;
    map->vectors = map->vectors && map->channels_last == source.channels_last;
    map->channels_last = source.channels_last;
    output_vectors = output_vectors && map->vectors;
  }

  if (plan.staged) {
    plan.tuned = shape.channels == kTunedChannels && shape.cells == kTunedCells && a.vectors && b.vectors &&
                 output_vectors && layout.walk != Walk::elements;
    if (layout.warps > shape.pairs) layout.warps = static_cast<int32_t>(shape.pairs);
    plan.threads = 32 * layout.warps;
    plan.shared_bytes = layout.warps * layout.warp_bytes;
    plan.blocks = divide_up(shape.pairs, layout.warps);
  } else {
    // Lanes along channels where channels lie side by side and there are enough to fill a warp.
    const bool side_by_side = a.channel_stride < a.cell_stride || shape.cells == 1;
    plan.general.along_channels = side_by_side && shape.channels >= 32;
    plan.general.tiles = divide_up(shape.cells, kGeneralTile);
    // Enough blocks for any GPU; more would only repeat per-pair work.
    const int64_t wanted = divide_up(4096, shape.pairs);
    plan.general.parts = !divisible ? 1 : wanted < plan.general.tiles ? wanted : plan.general.tiles;
    plan.threads = kGeneralThreads;
    // Table (at most 4 rows of a tile) and the group's scratch.
    plan.shared_bytes = static_cast<int32_t>(4 * kGeneralTile * result_size + 3 * (kGeneralThreads / 32) * 8);
    plan.blocks = shape.pairs > INT64_MAX / plan.general.parts ? INT64_MAX : shape.pairs * plan.general.parts;
  }
  if (plan.blocks > XCOS_CUDA_MAX_GRID) plan.blocks = XCOS_CUDA_MAX_GRID;
  return plan;
}

}  // namespace xcos::cuda
