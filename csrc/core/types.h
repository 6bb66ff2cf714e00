// Vocabulary shared by every layer: plain data, no torch and no CUDA headers.
#pragma once

#include <cstdint>

// Cell mathematics runs on host and device. On the host it must be inlined always: the same header is
// compiled once per CPU instruction set, and an out-of-line copy would be shared between them by the linker.
#if defined(__CUDACC__)
#define XCOS_HD __host__ __device__
#else
#define XCOS_HD __attribute__((always_inline))
#endif

namespace xcos {

// Element type of a feature map. Half types accumulate in, and return, fp32.
enum class Scalar : int32_t { f16 = 0, bf16 = 1, f32 = 2, f64 = 3 };

// Bytes of one element.
constexpr int64_t scalar_size(Scalar s) { return s == Scalar::f64 ? 8 : s == Scalar::f32 ? 4 : 2; }

// Type of scores, maps and sums that belongs to a feature type.
constexpr Scalar result_scalar(Scalar s) { return s == Scalar::f64 ? Scalar::f64 : Scalar::f32; }

// Where the cell weights W come from. The values are part of the operator schema.
enum class Attention : int32_t {
  uniform = 0,  // W = 1 / cells
  norm = 1,     // W proportional to |a_ij| |b_ij|
  weights = 2,  // W given, used as it is
  logits = 3,   // W = softmax(given / temperature) over the cells of one pair
};

// One [pairs, channels, cells] feature map; strides in elements. pair_stride 0 means one map for all pairs.
struct FeatureView {
  const void* data;
  int64_t pair_stride;
  int64_t channel_stride;
  int64_t cell_stride;
};

struct MutableFeatureView {
  void* data;  // null: this gradient is not wanted
  int64_t pair_stride;
  int64_t channel_stride;
  int64_t cell_stride;
};

// Attention values: cells of a pair lie side by side. pair_stride 0 means one [H, W] map for all pairs.
struct AttentionView {
  const void* data;  // null unless the mode is weights or logits
  Scalar scalar;     // any, independent of the features' type
  int64_t pair_stride;
};

struct PairShape {
  int64_t pairs;     // N, may be 0
  int64_t channels;  // C >= 1
  int64_t cells;     // H * W >= 1
};

}  // namespace xcos
