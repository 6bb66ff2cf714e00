// Scores of all pairs on the tensor cores. A block keeps a tile of 16 gallery faces in shared memory; each of
// its warps scores groups of four probes against it.
//
// The 3x3 sum over hidden channels of the maximum is a product for every input cell: A [16 faces, 16 hidden
// channels] is max(u, v), made in registers, and B [16 channels, 8 columns] is the band of weights that leads
// from this input cell to the output cells of one row. Each input cell so feeds the rows above, of and below
// it. A row that is complete has its logits in the accumulators: lane (q, t) holds faces q and q + 8, cells
// 2t and 2t + 1. Cosines come out in the same place: A is the gallery faces' features of one cell, and B has
// the features of two probes in the two columns of the lane that owns the cell, zeros elsewhere. PReLU and a
// running softmax follow in registers; four lanes merge at the end.
//
// The order of channels in a product is free as long as both sides agree: lane t takes channels 4t .. 4t + 3
// of 16 (or 8t .. 8t + 7 of 32), which lie side by side in memory. The tile is kept as A fragments, 16 bytes
// a lane.
#include <algorithm>
#include <vector>

#include "cuda/matrix_kernels.cuh"
#include "cuda/matrix_mma.h"

// What benchmarks/gpu/variants.py compares: warps of a full block, warps of the smallest one, blocks that the
// compiler is to make room for on a multiprocessor.
#if !defined(XCOS_MMA_WARPS)
#define XCOS_MMA_WARPS 8
#endif
#if !defined(XCOS_MMA_LEAST_WARPS)
#define XCOS_MMA_LEAST_WARPS 2  // for staging
#endif
#if !defined(XCOS_MMA_BLOCKS)
#define XCOS_MMA_BLOCKS 1
#endif

namespace xcos::cuda {
namespace {

constexpr int kTile = 16;  // gallery faces of a block
constexpr int kGroup = 4;  // probes of a warp
constexpr int kMostWarps = XCOS_MMA_WARPS;
constexpr int kLeastWarps = XCOS_MMA_LEAST_WARPS;
constexpr int kColumns = 8;  // of a product, and the widest map
constexpr int kMostChannels = 1024;
constexpr int kMostCells = 1024;
constexpr int kTunedChannels = 32;
constexpr int kTunedHidden = 16;
constexpr int kTunedSide = 7;
constexpr int kBandBytes = 3 * kColumns * kWarp * 8;  // of 16 hidden channels
constexpr int kZeroBytes = 16;

// Shared memory in bytes from its beginning, and strides from face to face.
struct MmaLayout {
  int channels;
  int hidden;
  int height;
  int width;
  int projection_stride;  // from cell to cell
  int features_stride;    // the same
  int features;           // projections of the tile come first, [orders, cells, hidden / 16, lanes, 4 words]
  int bias;               // [orders, height, lanes, 4]
  int zero;
  int band;            // [hidden / 16, 3, columns, lanes]; of the tuned shape only while it is built
  int probes;          // a warp's part each
  int probe_features;  // within it, after the projections: one row, [kGroup, width, channels]
  int probe_bias;      // [height, kGroup, columns]
  int warp_bytes;
  int warps;
  int bytes;
};

// From cell to cell of a tile's fragments: 16 channels are 512 bytes. Projections are stored several cells at
// a time; the rest spreads these stores over more banks.
constexpr int projection_bytes(int hidden) { return hidden / 16 * 512 + 64; }
constexpr int features_bytes(int channels) { return channels / 16 * 512; }

constexpr bool is_tuned(int channels, int hidden, int height, int width) {
  return channels == kTunedChannels && hidden == kTunedHidden && height == kTunedSide && width == kTunedSide;
}

constexpr MmaLayout mma_layout(int channels, int hidden, int height, int width, int orders, int warps) {
  MmaLayout l = {};
  const int cells = height * width;
  l.channels = channels;
  l.hidden = hidden;
  l.height = height;
  l.width = width;
  l.projection_stride = projection_bytes(hidden);
  const bool tuned = is_tuned(channels, hidden, height, width);
  l.features_stride = features_bytes(channels);
  l.features = orders * cells * l.projection_stride;
  l.bias = l.features + cells * l.features_stride;
  l.zero = l.bias + orders * height * kWarp * 16;
  l.band = l.zero + kZeroBytes;
  const int band_bytes = hidden / 16 * kBandBytes;
  l.probes = tuned ? l.band : l.band + band_bytes;
  l.probe_features = kGroup / 2 * cells * hidden / 16 * 64;
  l.probe_bias = l.probe_features + kGroup * width * channels * 2;
  l.warp_bytes = l.probe_bias + height * kGroup * kColumns * 4;
  l.warps = warps;
  l.bytes = l.probes + warps * l.warp_bytes;
  if (l.bytes < l.band + band_bytes) l.bytes = l.band + band_bytes;
  return l;
}

template <typename T>
struct MmaParams {
  MatrixParams<T, float> matrix;
  MmaLayout layout;
  float exponent;       // log2(e) / temperature
  int64_t tiles;        // of the gallery
  int64_t groups;       // of the probes
  int64_t part_groups;  // groups that a block scores at a time
  int64_t parts;
};

template <bool kTuned>
struct MmaShape {
  const MmaLayout& l;

  static constexpr int kTunedProjection = projection_bytes(kTunedHidden);
  static constexpr int kTunedFeatures = features_bytes(kTunedChannels);

  __device__ int channels() const { return kTuned ? kTunedChannels : l.channels; }
  __device__ int hidden() const { return kTuned ? kTunedHidden : l.hidden; }
  __device__ int height() const { return kTuned ? kTunedSide : l.height; }
  __device__ int width() const { return kTuned ? kTunedSide : l.width; }
  __device__ int cells() const { return height() * width(); }
  __device__ int hidden_blocks() const { return hidden() / 16; }
  __device__ int projection_stride() const { return kTuned ? kTunedProjection : l.projection_stride; }
  __device__ int features_stride() const { return kTuned ? kTunedFeatures : l.features_stride; }
  // Bands of the tuned shape stay in registers.
  static constexpr int kBands = kTuned ? 3 * kTunedSide : 1;
};

template <typename W>
__device__ inline W load_shared(const unsigned char* at) {
  return *reinterpret_cast<const W*>(at);
}

// Two channels of one cell, packed, from a projection that lies [hidden, cells] in memory.
template <typename T>
__device__ inline uint32_t gather_channels(const T* at, int cells) {
  const T two[2] = {at[0], at[cells]};
  uint32_t out;
  memcpy(&out, two, sizeof(out));
  return out;
}

// The gallery tile as A fragments, and its bias as accumulators hold it. Faces beyond the last are that one
// again. copy_async_wait() and a barrier finish it.
template <typename T, bool kTuned>
__device__ inline void stage_gallery(const MmaParams<T>& p, const MmaShape<kTuned>& shape, int64_t tile,
                                     unsigned char* shared) {
  const MatrixSide<T, float>& side = p.matrix.gallery;
  const int thread = static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(blockDim.x);
  const int lane = thread % kWarp;
  const int64_t first = tile * kTile;
  const auto face_of = [&](int slot) { return first + slot < side.faces ? first + slot : side.faces - 1; };
  const int words = shape.channels() / 2;
  for (int e = thread; e < kTile * words; e += threads) {
    const int slot = e / words;
    const int word = e - slot * words;
    // Which lane t, which 16 channels, and which half of them.
    const int t = kTuned ? word / 4 : word % 8 / 2;
    const int block = kTuned ? word % 4 / 2 : word / 8;
    unsigned char* to =
        shared + p.layout.features + block * 512 + (slot % 8 * 4 + t) * 16 + (word % 2 * 2 + slot / 8) * 4;
    const T* from = side.features + face_of(slot) * side.features_stride + 2 * word;
#pragma unroll 8
    for (int cell = 0; cell < shape.cells(); ++cell) {
      copy_async<4>(to + cell * shape.features_stride(), from + cell * shape.channels());
    }
  }
  // A warp takes a face at a time, its lanes 8 cells by 4 times 4 channels.
  for (int slot = thread / kWarp; slot < p.matrix.orders * kTile; slot += threads / kWarp) {
    const int order = slot / kTile;
    const int face = slot % kTile;
    const T* from = side.projection + face_of(face) * side.projection_stride +
                    (order * shape.hidden() + lane % 4 * 4) * shape.cells();
    unsigned char* to = shared + order * shape.cells() * shape.projection_stride() +
                        (face % 8 * 4 + lane % 4) * 16 + face / 8 * 4;
    for (int block = 0; block < shape.hidden_blocks(); ++block) {
#pragma unroll 7
      for (int cell = lane / 4; cell < shape.cells(); cell += kWarp / 4) {
        unsigned char* at = to + cell * shape.projection_stride() + block * 512;
        const T* four = from + block * 16 * shape.cells() + cell;
        *reinterpret_cast<uint32_t*>(at) = gather_channels(four, shape.cells());
        *reinterpret_cast<uint32_t*>(at + 8) = gather_channels(four + 2 * shape.cells(), shape.cells());
      }
    }
  }
  for (int e = thread; e < p.matrix.orders * shape.height() * kWarp; e += threads) {
    const int lane = e % kWarp;
    const int row = e / kWarp;  // of order 0, then of order 1
    const int column = lane % 4 * 2;
    float values[4];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const float* from = side.bias + face_of(lane / 4 + n / 2 * 8) * side.bias_stride + row * shape.width();
      values[n] = column + n % 2 < shape.width() ? from[column + n % 2] : 0.0f;
    }
    *reinterpret_cast<float4*>(shared + p.layout.bias + e * 16) =
        make_float4(values[0], values[1], values[2], values[3]);
  }
}

// A warp's four probes: projections of two beside each other, and bias by rows.
template <typename T, bool kTuned>
__device__ inline void stage_probes(const MmaParams<T>& p, const MmaShape<kTuned>& shape, int64_t group,
                                    int order, unsigned char* own, int lane) {
  const MatrixSide<T, float>& side = p.matrix.probes;
  const auto face_of = [&](int slot) {
    const int64_t face = group * kGroup + slot;
    return face < side.faces ? face : side.faces - 1;
  };
  const int64_t offset = (int64_t{order} * shape.hidden() + lane % 4 * 4) * shape.cells();
#pragma unroll
  for (int pair = 0; pair < kGroup / 2; ++pair) {
    const T* a = side.projection + face_of(2 * pair) * side.projection_stride + offset;
    const T* b = side.projection + face_of(2 * pair + 1) * side.projection_stride + offset;
    unsigned char* to = own + pair * shape.cells() * shape.hidden_blocks() * 64 + lane % 4 * 16;
    for (int block = 0; block < shape.hidden_blocks(); ++block) {
#pragma unroll 2
      for (int cell = lane / 4; cell < shape.cells(); cell += kWarp / 4) {
        const int at = block * 16 * shape.cells() + cell;
        const int half = at + 2 * shape.cells();
        *reinterpret_cast<uint4*>(to + (cell * shape.hidden_blocks() + block) * 64) =
            make_uint4(gather_channels(a + at, shape.cells()), gather_channels(a + half, shape.cells()),
                       gather_channels(b + at, shape.cells()), gather_channels(b + half, shape.cells()));
      }
    }
  }
  float* bias = reinterpret_cast<float*>(own + p.layout.probe_bias);
  for (int e = lane; e < shape.height() * kGroup * kColumns; e += kWarp) {
    const int column = e % kColumns;
    const int row = e / kColumns / kGroup;
    const float* from = side.bias + face_of(e / kColumns % kGroup) * side.bias_stride + order * shape.cells();
    bias[e] = column < shape.width() ? from[row * shape.width() + column] : 0.0f;
  }
}

// Starts copying one row of the four probes' features; eight lanes have a probe. from: the probe's features,
// at this lane's first chunk of 16 bytes.
template <typename T, bool kTuned>
__device__ inline void stage_probe_row(const MmaShape<kTuned>& shape, const T* from, int row,
                                       unsigned char* to, int lane) {
  const int chunks = shape.width() * shape.channels() / 8;  // of a probe
  from += row * shape.width() * shape.channels();
  to += (lane / 8 * chunks + lane % 8) * 16;
#pragma unroll 4
  for (int k = 0; k < (chunks + 7) / 8; ++k) {
    if (8 * k + lane % 8 < chunks) copy_async<16>(to + 128 * k, from + 64 * k);
  }
}

// The weights of every band, rounded to T, as B fragments: band (r, j) leads from input column j to output
// row row - 1 + r.
template <typename T, bool kTuned>
__device__ inline void build_bands(const MmaParams<T>& p, const MmaShape<kTuned>& shape,
                                   unsigned char* bands) {
  for (int e = static_cast<int>(threadIdx.x); e < shape.hidden_blocks() * 3 * kColumns * kWarp;
       e += static_cast<int>(blockDim.x)) {
    const int lane = e % kWarp;
    const int j = e / kWarp % kColumns;
    const int r = e / kWarp / kColumns % 3;
    const int block = e / kWarp / kColumns / 3;
    const int column = lane / 4;   // of the output
    const int l = j - column + 1;  // of the weight
    const int channel = 16 * block + lane % 4 * 4;
    float four[4];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const bool inside = l >= 0 && l < 3 && column < shape.width() && j < shape.width();
      four[n] = inside ? p.matrix.weight[(channel + n) * 9 + 3 * (2 - r) + l] : 0.0f;
    }
    // Whole words: a memcpy of four halves is stores of bytes in PTX, and ptxas 13.0 made one of them the
    // value itself, converted to an integer.
    *reinterpret_cast<uint2*>(bands + e * 8) =
        make_uint2(Element<T>::pack({four[0], four[1]}), Element<T>::pack({four[2], four[3]}));
  }
}

// A lane's part of one pair's running score: RunningScore without branches, two cells at a time, and with
// exponentials as powers of two (logits come multiplied by log2(e) / T). A lane of a narrow map may have one
// cell in a row, or none. Where two products are added, one is rounded by itself: which of them the compiler
// fuses with the addition would else depend on the place in the tile, and so would the bits.
struct LaneScore {
  float extreme;
  float total;
  float weighted;
  float plain;

  static constexpr float kHighest = std::numeric_limits<float>::max();

  __device__ void clear(bool softmax) {
    extreme = softmax ? -kHighest : kHighest;
    total = weighted = plain = 0.0f;
  }

  __device__ void add_softmax(const float (&logits)[2], float cosine_0, float cosine_1, bool first,
                              bool second) {
    const float z_0 = first ? logits[0] : -kHighest;
    const float z_1 = second ? logits[1] : -kHighest;
    const float largest = larger(larger(z_0, z_1), extreme);
    const float scale = power_of_two(extreme - largest);
    const float e_0 = power_of_two(z_0 - largest);
    const float e_1 = power_of_two(z_1 - largest);
    total = total * scale + (e_0 + e_1);
    weighted = weighted * scale + (e_0 * cosine_0 + rounded_product(e_1, cosine_1));
    extreme = largest;
  }

  // seen: cells that came before.
  __device__ void add_min_shift(const float (&logits)[2], float cosine_0, float cosine_1, bool first,
                                bool second, float seen) {
    float smallest = first && logits[0] < extreme ? logits[0] : extreme;
    smallest = second && logits[1] < smallest ? logits[1] : smallest;
    const float step = seen > 0.0f ? extreme - smallest : 0.0f;
    const float d_0 = first ? logits[0] - smallest : 0.0f;
    const float d_1 = second ? logits[1] - smallest : 0.0f;
    total = (total + step * seen) + (d_0 + d_1);
    weighted = (weighted + step * plain) + (d_0 * cosine_0 + rounded_product(d_1, cosine_1));
    plain += cosine_0 + cosine_1;
    extreme = smallest;
  }

  // With the lane whose number differs in bit `step`.
  __device__ void merge_softmax(int step) {
    const float other = __shfl_xor_sync(kFullWarp, extreme, step);
    const float largest = larger(other, extreme);
    const float own_scale = power_of_two(extreme - largest);
    const float other_scale = power_of_two(other - largest);
    total = rounded_product(total, own_scale) +
            rounded_product(__shfl_xor_sync(kFullWarp, total, step), other_scale);
    weighted = rounded_product(weighted, own_scale) +
               rounded_product(__shfl_xor_sync(kFullWarp, weighted, step), other_scale);
    extreme = largest;
  }

  __device__ void merge_min_shift(int step, float seen, float other_seen) {
    const float other = __shfl_xor_sync(kFullWarp, extreme, step);
    const float other_plain = __shfl_xor_sync(kFullWarp, plain, step);
    const float smallest = other < extreme ? other : extreme;
    const float own_step = seen > 0.0f ? extreme - smallest : 0.0f;
    const float other_step = other_seen > 0.0f ? other - smallest : 0.0f;
    total = (total + rounded_product(own_step, seen)) +
            (__shfl_xor_sync(kFullWarp, total, step) + rounded_product(other_step, other_seen));
    weighted = (weighted + rounded_product(own_step, plain)) +
               (__shfl_xor_sync(kFullWarp, weighted, step) + rounded_product(other_step, other_plain));
    plain += other_plain;
    extreme = smallest;
  }
};

// body(probe, half): half 0 is face q of the tile, 1 is face q + 8.
template <class Body>
__device__ inline void for_each_score(const Body& body) {
#pragma unroll
  for (int n = 0; n < kGroup; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) body(n, half);
  }
}

template <int kValue>
using Constant = std::integral_constant<int, kValue>;

// Adds what one input row gives to output rows row - 1 + r, r in [kFrom, kTo).
template <typename T, bool kTuned, int kFrom, int kTo>
__device__ inline void accumulate_row(const MmaParams<T>& p, const MmaShape<kTuned>& shape,
                                      const uint2 (&kept_bands)[MmaShape<kTuned>::kBands],
                                      const unsigned char* shared, const unsigned char* projection,
                                      const unsigned char* own, int row, int lane,
                                      float (&rows)[kGroup][3][4]) {
  const int hidden_blocks = shape.hidden_blocks();
#pragma unroll
  for (int j = 0; j < (kTuned ? kTunedSide : kColumns); ++j) {
    if (j >= shape.width()) break;
    const int cell = row * shape.width() + j;
#pragma unroll 1
    for (int block = 0; block < hidden_blocks; ++block) {
      const uint4 v = load_shared<uint4>(projection + cell * shape.projection_stride() + block * 512);
      uint4 h[kGroup];
#pragma unroll
      for (int pair = 0; pair < kGroup / 2; ++pair) {
        const uint4 u = load_shared<uint4>(
            own + ((pair * shape.cells() + cell) * hidden_blocks + block) * 64 + lane % 4 * 16);
        h[2 * pair] = make_uint4(packed_maximum<T>(v.x, u.x), packed_maximum<T>(v.y, u.x),
                                 packed_maximum<T>(v.z, u.y), packed_maximum<T>(v.w, u.y));
        h[2 * pair + 1] = make_uint4(packed_maximum<T>(v.x, u.z), packed_maximum<T>(v.y, u.z),
                                     packed_maximum<T>(v.z, u.w), packed_maximum<T>(v.w, u.w));
      }
#pragma unroll
      for (int r = kFrom; r < kTo; ++r) {
        uint2 band;
        if constexpr (kTuned) {
          band = kept_bands[r * kTunedSide + j];
        } else {
          band = load_shared<uint2>(shared + p.layout.band +
                                    (((block * 3 + r) * kColumns + j) * kWarp + lane) * 8);
        }
#pragma unroll
        for (int n = 0; n < kGroup; ++n) multiply_tiles<T>(rows[n][r], h[n], band);
      }
    }
  }
}

// One order's scores of a warp's four probes against the tile, in result[probe][face q or q + 8] of every
// lane.
template <typename T, bool kTuned>
__device__ inline void score_group(const MmaParams<T>& p, const MmaShape<kTuned>& shape,
                                   const uint2 (&kept_bands)[MmaShape<kTuned>::kBands],
                                   const unsigned char* shared, unsigned char* own, int64_t group, int order,
                                   float slope, int lane, float (&result)[kGroup][2]) {
  const int q = lane / 4;
  const int t = lane % 4;
  const int width = shape.width();
  const int height = shape.height();
  const bool softmax = p.matrix.softmax;
  const unsigned char* const projection =
      shared + order * shape.cells() * shape.projection_stride() + lane * 16;
  const unsigned char* const features = shared + p.layout.features + lane * 16;
  const unsigned char* const probe_row =
      own + p.layout.probe_features + q % 2 * width * shape.channels() * 2 + t * (kTuned ? 16 : 8);
  const MatrixSide<T, float>& probes = p.matrix.probes;
  const int64_t copied =
      group * kGroup + lane / 8 < probes.faces ? group * kGroup + lane / 8 : probes.faces - 1;
  const T* const copied_features = probes.features + copied * probes.features_stride + lane % 8 * 8;
  const unsigned char* const zero = shared + p.layout.zero;

  const float positive = softmax ? p.exponent : 1.0f;
  const float negative = positive * slope;
  // Rounded by itself, as parametric().
  const auto scaled = [&](float y) { return rounded_product(y, y > 0.0f ? positive : negative); };
  LaneScore state[kGroup][2];
  for_each_score([&](int n, int half) { state[n][half].clear(softmax); });
  float rows[kGroup][3][4];  // logits of rows row - 1, row, row + 1
#pragma unroll
  for (int n = 0; n < kGroup; ++n) {
#pragma unroll
    for (int r = 0; r < 3; ++r) {
#pragma unroll
      for (int k = 0; k < 4; ++k) rows[n][r][k] = 0.0f;
    }
  }
  float seen = 0.0f;  // cells of this lane
#pragma unroll 1
  for (int row = 0; row <= height; ++row) {
    if (row > 0) stage_probe_row(shape, copied_features, row - 1, own + p.layout.probe_features, lane);
    if (row < height) {
      const auto accumulate = [&](auto from, auto to) {
        accumulate_row<T, kTuned, decltype(from)::value, decltype(to)::value>(
            p, shape, kept_bands, shared, projection, own, row, lane, rows);
      };
      // Rows beyond the map take part in no sum that is read; the tuned shape does not compute them.
      if (kTuned && row == 0) {
        accumulate(Constant<1>{}, Constant<3>{});
      } else if (kTuned && row + 1 == height) {
        accumulate(Constant<0>{}, Constant<2>{});
      } else {
        accumulate(Constant<0>{}, Constant<3>{});
      }
    }

    if (row > 0) {
      copy_async_wait();
      __syncwarp();
      float cosines[kGroup / 2][2][4];  // of two probes, at cells 2t and 2t + 1
#pragma unroll
      for (int pair = 0; pair < kGroup / 2; ++pair) {
#pragma unroll
        for (int k = 0; k < 4; ++k) cosines[pair][0][k] = cosines[pair][1][k] = 0.0f;
      }
#pragma unroll
      for (int j = 0; j < (kTuned ? kTunedSide : kColumns); ++j) {
        if (j >= width) break;
        const unsigned char* const x = features + ((row - 1) * width + j) * shape.features_stride();
        const bool owner = q / 2 == j / 2;
        if constexpr (kTuned) {
          const uint4 low = load_shared<uint4>(x);
          const uint4 high = load_shared<uint4>(x + 512);
#pragma unroll
          for (int pair = 0; pair < kGroup / 2; ++pair) {
            const uint4 y =
                load_shared<uint4>(owner ? probe_row + (2 * pair * width + j) * shape.channels() * 2 : zero);
            multiply_tiles<T>(cosines[pair][j % 2], low, make_uint2(y.x, y.y));
            multiply_tiles<T>(cosines[pair][j % 2], high, make_uint2(y.z, y.w));
          }
        } else {
#pragma unroll 1
          for (int block = 0; block < shape.channels() / 16; ++block) {
            const uint4 a = load_shared<uint4>(x + block * 512);
#pragma unroll
            for (int pair = 0; pair < kGroup / 2; ++pair) {
              const unsigned char* y = probe_row + (2 * pair * width + j) * shape.channels() * 2 + block * 32;
              multiply_tiles<T>(cosines[pair][j % 2], a, load_shared<uint2>(owner ? y : zero));
            }
          }
        }
      }
      __syncwarp();  // the row is read until here

      const float4 tile_bias =
          load_shared<float4>(shared + p.layout.bias + ((order * height + row - 1) * kWarp + lane) * 16);
      const bool first = kTuned || 2 * t < width;
      const bool second = 2 * t + 1 < width;
      float logits[kGroup][2][2];  // by probe, face and cell; those of a softmax in powers of two
#pragma unroll
      for (int n = 0; n < kGroup; ++n) {
        const float2 bias = load_shared<float2>(own + p.layout.probe_bias +
                                                (((row - 1) * kGroup + n) * kColumns + 2 * t) * 4);
        logits[n][0][0] = scaled((bias.x + tile_bias.x) + rows[n][0][0]);
        logits[n][0][1] = scaled((bias.y + tile_bias.y) + rows[n][0][1]);
        logits[n][1][0] = scaled((bias.x + tile_bias.z) + rows[n][0][2]);
        logits[n][1][1] = scaled((bias.y + tile_bias.w) + rows[n][0][3]);
      }
      if (softmax) {
        for_each_score([&](int n, int half) {
          state[n][half].add_softmax(logits[n][half], cosines[n / 2][0][2 * half + n % 2],
                                     cosines[n / 2][1][2 * half + n % 2], first, second);
        });
      } else {
        for_each_score([&](int n, int half) {
          state[n][half].add_min_shift(logits[n][half], cosines[n / 2][0][2 * half + n % 2],
                                       cosines[n / 2][1][2 * half + n % 2], first, second, seen);
        });
      }
      seen += (first ? 1.0f : 0.0f) + (second ? 1.0f : 0.0f);
    }
#pragma unroll
    for (int n = 0; n < kGroup; ++n) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        rows[n][0][k] = rows[n][1][k];
        rows[n][1][k] = rows[n][2][k];
        rows[n][2][k] = 0.0f;
      }
    }
  }

  // The four lanes of a face have different cells.
#pragma unroll
  for (int step = 1; step <= 2; step *= 2) {
    const float other_seen = __shfl_xor_sync(kFullWarp, seen, step);
    if (softmax) {
      for_each_score([&](int n, int half) { state[n][half].merge_softmax(step); });
    } else {
      for_each_score([&](int n, int half) { state[n][half].merge_min_shift(step, seen, other_seen); });
    }
    seen += other_seen;
  }
  for_each_score([&](int n, int half) {
    const LaneScore& last = state[n][half];
    result[n][half] +=
        RunningScore<float>{last.extreme, last.total, last.weighted, last.plain}.result(softmax, seen);
  });
}

template <typename T, bool kTuned>
__global__ void __launch_bounds__(kMostWarps* kWarp, XCOS_MMA_BLOCKS)
    matrix_tensor(const __grid_constant__ MmaParams<T> p) {
  if (!kTensorCores) return;
  const MmaShape<kTuned> shape = {p.layout};
  unsigned char* const shared = dynamic_shared();
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  unsigned char* const own = shared + p.layout.probes + warp * p.layout.warp_bytes;
  const float slope = p.matrix.slope[0];
  const int q = lane / 4;
  const int t = lane % 4;

  build_bands(p, shape, shared + p.layout.band);
  if (threadIdx.x < kZeroBytes / 4) reinterpret_cast<float*>(shared + p.layout.zero)[threadIdx.x] = 0.0f;
  __syncthreads();
  uint2 bands[MmaShape<kTuned>::kBands] = {};
  if constexpr (kTuned) {
#pragma unroll
    for (int n = 0; n < MmaShape<kTuned>::kBands; ++n) {
      const int r = n / kTunedSide;
      const int j = n % kTunedSide;
      bands[n] = load_shared<uint2>(shared + p.layout.band + ((r * kColumns + j) * kWarp + lane) * 8);
    }
  }

  int64_t staged = -1;  // the group and order that the warp's part holds
  for (int64_t item = blockIdx.x; item < p.tiles * p.parts; item += gridDim.x) {
    const int64_t tile = item / p.parts;
    const int64_t part = item - tile * p.parts;
    __syncthreads();  // bands, or a former tile, may still be read
    stage_gallery(p, shape, tile, shared);
    copy_async_wait();
    __syncthreads();
    const int64_t end = (part + 1) * p.part_groups < p.groups ? (part + 1) * p.part_groups : p.groups;
    for (int64_t group = part * p.part_groups + warp; group < end; group += warps) {
      float result[kGroup][2] = {};
      for (int order = 0; order < p.matrix.orders; ++order) {
        if (staged != group * p.matrix.orders + order) {
          staged = group * p.matrix.orders + order;
          __syncwarp();  // the former group may still be read
          stage_probes(p, shape, group, order, own, lane);
          __syncwarp();
        }
        score_group(p, shape, bands, shared, own, group, order, slope, lane, result);
      }
      const float share = p.matrix.orders == 2 ? 0.5f : 1.0f;
#pragma unroll
      for (int n = 0; n < kGroup; ++n) {
        const int64_t probe = group * kGroup + n;
        if (t != n || probe >= p.matrix.probes.faces) continue;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int64_t face = tile * kTile + q + 8 * half;
          if (face >= p.matrix.gallery.faces) continue;
          p.matrix.scores[probe * p.matrix.gallery.faces + face] = result[n][half] * share;
        }
      }
    }
  }
}

// Whether the code that a device of this capability runs has the products in it: code for older devices,
// compiled anew by the driver from PTX, has not.
bool has_tensor_code(int capability) {
  if (capability < 80) return false;
  const std::vector<int> compiled = compiled_architectures();
  return compiled.empty() || std::any_of(compiled.begin(), compiled.end(),
                                         [&](int one) { return one >= 80 && one <= capability; });
}

// The layout with as many warps as there is shared memory for, at most `wanted`; warps 0: none fits.
MmaLayout fitting_layout(const MatrixProblem& problem, int wanted) {
  int device = 0;
  int major = 0;
  int minor = 0;
  int most = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    return {};
  }
  if (!has_tensor_code(10 * major + minor)) return {};
  for (int warps = wanted; warps > 0; --warps) {
    const MmaLayout layout = mma_layout(static_cast<int>(problem.channels), static_cast<int>(problem.hidden),
                                        static_cast<int>(problem.height), static_cast<int>(problem.width),
                                        static_cast<int>(problem.orders), warps);
    if (layout.bytes <= most) return layout;
  }
  return {};
}

// A multiprocessor holds one full block. What does not fill them all is spread over more of them in smaller
// blocks.
int wanted_warps(int64_t tiles, int64_t groups) {
  const int most = static_cast<int>(groups < kMostWarps ? groups : kMostWarps);
  int device = 0;
  int multiprocessors = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
  }
  for (int warps = kLeastWarps; warps < most; warps *= 2) {
    if (tiles * ceil_divide(groups, warps) <= multiprocessors) return warps;
  }
  return most < kLeastWarps ? kLeastWarps : most;
}

template <auto kKernel, class Params>
Status launch_tensor(const Params& p, Stream stream) {
  const Status granted = allow_shared<kKernel>(p.layout.bytes);
  if (granted != 0) return granted;
  return launch_blocks<kKernel>(p.tiles * p.parts, p.layout.warps * kWarp, p.layout.bytes, p, stream);
}

template <typename T>
Status launch_mma(const MatrixProblem& problem, void* scores, Stream stream) {
  MmaParams<T> p = {};
  p.matrix = matrix_params<T, float>(problem);
  p.matrix.scores = static_cast<float*>(scores);
  p.exponent = static_cast<float>(1.4426950408889634 / problem.temperature);
  // Smaller temperatures than this leave one cell; logits must not overflow.
  if (!(p.exponent < 1e30f)) p.exponent = 1e30f;
  p.tiles = ceil_divide(problem.gallery.faces, kTile);
  p.groups = ceil_divide(problem.probes.faces, kGroup);
  p.layout = fitting_layout(problem, wanted_warps(p.tiles, p.groups));
  // All probes against a tile while it is at hand, unless that leaves multiprocessors without work.
  const int64_t rounds = ceil_divide(p.groups, p.layout.warps);
  const int64_t parts = p.tiles >= 512 ? 1 : ceil_divide(512, p.tiles);
  const int64_t part_rounds = parts >= rounds ? 1 : ceil_divide(rounds, parts);
  p.part_groups = part_rounds * p.layout.warps;
  p.parts = ceil_divide(p.groups, p.part_groups);
  const bool tuned = is_tuned(p.layout.channels, p.layout.hidden, p.layout.height, p.layout.width);
  return tuned ? launch_tensor<matrix_tensor<T, true>>(p, stream)
               : launch_tensor<matrix_tensor<T, false>>(p, stream);
}

bool reaches_vectors(const TemplateView& side) {
  return reinterpret_cast<uintptr_t>(side.features) % 16 == 0 &&
         (side.faces == 1 || side.features_stride % 8 == 0);
}

}  // namespace

bool matrix_mma_takes(const MatrixProblem& problem) {
  if (scalar_size(problem.scalar) != 2) return false;
  if (problem.channels % 16 != 0 || problem.hidden % 16 != 0 || problem.width > kColumns) return false;
  // The bounds keep the layout's products from overflowing.
  if (problem.channels > kMostChannels || problem.hidden > kMostChannels || problem.height > kMostCells)
    return false;
  if (!reaches_vectors(problem.probes) || !reaches_vectors(problem.gallery)) return false;
  return fitting_layout(problem, 1).warps > 0;
}

Status matrix_mma(const MatrixProblem& problem, void* scores, Stream stream) {
  if (problem.scalar == Scalar::f16) return launch_mma<__half>(problem, scores, stream);
  return launch_mma<__nv_bfloat16>(problem, scores, stream);
}

}  // namespace xcos::cuda
