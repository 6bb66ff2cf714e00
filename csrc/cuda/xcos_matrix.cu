// Scores of all pairs, any shape and type. A lane owns two pairs (one in float64): a warp's lanes are 32
// gallery faces, its registers two probes. The block walks over the map a row at a time, in strips of eight
// columns; a row of both sides' projections is staged in shared memory, a few channels at a time, its maximum
// taken, and spread over the three output rows that it touches. An output row that is complete meets its
// cosines and disappears in a running score, so nothing grows with the map.
#include "cuda/matrix_kernels.cuh"
#include "cuda/matrix_mma.h"
#include "cuda/xcos_matrix.h"

namespace xcos::cuda {
namespace {

constexpr int kPlainWarps = 8;
constexpr int kPlainThreads = kPlainWarps * kWarp;
constexpr int kFaces = kWarp;           // gallery faces of a block
constexpr int kFacePitch = kFaces + 1;  // against bank conflicts of the staging stores
constexpr int kColumns = 8;             // output columns of a strip
constexpr int kSpan = kColumns + 2;     // its input columns
constexpr int kChunk = 8;               // channels staged at a time
constexpr int kWeightPitch = 12;        // nine weights of a channel, in 16-byte vectors

template <typename R>
constexpr int kPairs = sizeof(R) == 8 ? 1 : 2;  // probes of a warp

template <typename R>
constexpr int64_t plain_shared_bytes(int warps) {
  return (kChunk * kWeightPitch + kChunk * kSpan * (kFacePitch + warps * kPairs<R>)) * int64_t{sizeof(R)};
}

// Where the faces of a block's tile begin; faces beyond the last are that one again.
struct Tile {
  int64_t first;
  int64_t faces;

  __device__ int64_t face(int slot) const { return first + slot < faces ? first + slot : faces - 1; }
};

// Copies [channels, columns] of `count` faces' projections to shared memory as [channels, kSpan, pitch].
// Lanes lie along the columns, which lie side by side in memory.
template <typename T, typename R>
__device__ inline void stage_projection(const MatrixParams<T, R>& p, const MatrixSide<T, R>& side,
                                        const Tile& tile, int count, int pitch, int order, int64_t channel,
                                        int channels, int64_t row, int64_t column, int low, int high,
                                        R* shared) {
  const int shift = high - low <= 8 ? 3 : 4;
  const int lane = static_cast<int>(threadIdx.x) & ((1 << shift) - 1);
  const int group = static_cast<int>(threadIdx.x) >> shift;
  const int groups = static_cast<int>(blockDim.x) >> shift;
  const int j = low + lane;
  if (j >= high) return;
  const int64_t offset = (order * p.hidden + channel) * p.cells + row * p.width + column + j;
  for (int k = group; k < channels * count; k += groups) {
    const int c = k / count;
    const int slot = k - c * count;
    shared[(c * kSpan + j) * pitch + slot] =
        Element<T>::load(side.projection[tile.face(slot) * side.projection_stride + offset + c * p.cells]);
  }
}

// The same of the features, [cells, channels] in memory: lanes lie along the channels.
template <typename T, typename R>
__device__ inline void stage_features(const MatrixParams<T, R>& p, const MatrixSide<T, R>& side,
                                      const Tile& tile, int count, int pitch, int64_t channel, int channels,
                                      int64_t cell, int columns, R* shared) {
  const int c = static_cast<int>(threadIdx.x) % kChunk;
  if (c >= channels) return;
  for (int slot = static_cast<int>(threadIdx.x) / kChunk; slot < count;
       slot += static_cast<int>(blockDim.x) / kChunk) {
    const T* from = side.features + tile.face(slot) * side.features_stride + cell * p.channels + channel + c;
    R* to = shared + c * kSpan * pitch + slot;
    for (int j = 0; j < columns; ++j) to[j * pitch] = Element<T>::load(from[j * p.channels]);
  }
}

template <typename T>
__global__ void __launch_bounds__(kPlainThreads, sizeof(typename Element<T>::Result) == 8 ? 1 : 2)
    matrix_plain(const __grid_constant__ MatrixParams<T, typename Element<T>::Result> p) {
  using R = typename Element<T>::Result;
  constexpr int kOwn = kPairs<R>;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int probes = static_cast<int>(blockDim.x) / kWarp * kOwn;    // of a block
  R* const weights = reinterpret_cast<R*>(dynamic_shared());         // [kChunk, kWeightPitch]
  R* const gallery_tile = weights + kChunk * kWeightPitch;           // [kChunk, kSpan, kFacePitch]
  R* const probe_tile = gallery_tile + kChunk * kSpan * kFacePitch;  // [kChunk, kSpan, probes]
  const R slope = p.slope[0];

  const int64_t gallery_tiles = (p.gallery.faces + kFaces - 1) / kFaces;
  const int64_t items = gallery_tiles * ((p.probes.faces + probes - 1) / probes);
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int64_t probe_item = item / gallery_tiles;
    const Tile gallery = {(item - probe_item * gallery_tiles) * kFaces, p.gallery.faces};
    const Tile probe = {probe_item * probes, p.probes.faces};
    const R* const gallery_bias = p.gallery.bias + gallery.face(lane) * p.gallery.bias_stride;
    R score[kOwn] = {};

    for (int order = 0; order < p.orders; ++order) {
      RunningScore<R> running[kOwn];
#pragma unroll
      for (int n = 0; n < kOwn; ++n) running[n].clear();
      int64_t seen = 0;  // cells, of every pair
      for (int64_t left = 0; left < p.width; left += kColumns) {
        const int columns = static_cast<int>(p.width - left < kColumns ? p.width - left : kColumns);
        // Input columns left - 1 + j, j in [low, high).
        const int low = left == 0 ? 1 : 0;
        const int high = left + columns < p.width ? columns + 2 : columns + 1;
        R rows[kOwn][3][kColumns] = {};  // logits without bias, of rows row - 1, row, row + 1
        for (int64_t row = 0; row <= p.height; ++row) {
          for (int64_t channel = 0; row < p.height && channel < p.hidden; channel += kChunk) {
            const int channels = static_cast<int>(p.hidden - channel < kChunk ? p.hidden - channel : kChunk);
            __syncthreads();  // a former tile may still be read
            for (int k = static_cast<int>(threadIdx.x); k < 9 * channels; k += static_cast<int>(blockDim.x)) {
              weights[k / 9 * kWeightPitch + k % 9] = p.weight[channel * 9 + k];
            }
            stage_projection(p, p.gallery, gallery, kFaces, kFacePitch, order, channel, channels, row,
                             left - 1, low, high, gallery_tile);
            stage_projection(p, p.probes, probe, probes, probes, order, channel, channels, row, left - 1, low,
                             high, probe_tile);
            __syncthreads();
#pragma unroll 1
            for (int c = 0; c < channels; ++c) {
              R w[9];
#pragma unroll
              for (int k = 0; k < 9; ++k) w[k] = weights[c * kWeightPitch + k];
#pragma unroll
              for (int j = 0; j < kSpan; ++j) {
                if (j < low || j >= high) continue;
                const R v = gallery_tile[(c * kSpan + j) * kFacePitch + lane];
#pragma unroll
                for (int n = 0; n < kOwn; ++n) {
                  const R u = probe_tile[(c * kSpan + j) * probes + warp * kOwn + n];
                  const R h = larger_or_nan(u, v);
                  // weight[k, l] leads from input (row, j) to output (row + 1 - k, j - l), columns counted
                  // from the strip's first.
#pragma unroll
                  for (int l = 0; l < 3; ++l) {
                    if (j - l < 0 || j - l >= kColumns) continue;
#pragma unroll
                    for (int k = 0; k < 3; ++k) rows[n][2 - k][j - l] += w[3 * k + l] * h;
                  }
                }
              }
            }
          }

          if (row > 0) {
            R cosine[kOwn][kColumns] = {};
            const int64_t cell = (row - 1) * p.width + left;
            for (int64_t channel = 0; channel < p.channels; channel += kChunk) {
              const int channels =
                  static_cast<int>(p.channels - channel < kChunk ? p.channels - channel : kChunk);
              __syncthreads();
              stage_features(p, p.gallery, gallery, kFaces, kFacePitch, channel, channels, cell, columns,
                             gallery_tile);
              stage_features(p, p.probes, probe, probes, probes, channel, channels, cell, columns,
                             probe_tile);
              __syncthreads();
#pragma unroll 1
              for (int c = 0; c < channels; ++c) {
#pragma unroll
                for (int j = 0; j < kColumns; ++j) {
                  if (j >= columns) break;
                  const R y = gallery_tile[(c * kSpan + j) * kFacePitch + lane];
#pragma unroll
                  for (int n = 0; n < kOwn; ++n) {
                    cosine[n][j] += y * probe_tile[(c * kSpan + j) * probes + warp * kOwn + n];
                  }
                }
              }
            }
            const int64_t at = order * p.cells + cell;
#pragma unroll
            for (int n = 0; n < kOwn; ++n) {
              const R* probe_bias = p.probes.bias + probe.face(warp * kOwn + n) * p.probes.bias_stride;
              R largest = RunningScore<R>::kLowest;
#pragma unroll
              for (int j = 0; j < kColumns; ++j) {
                if (j >= columns) break;
                R& z = rows[n][0][j];
                z = parametric(probe_bias[at + j] + gallery_bias[at + j] + z, slope);
                largest = z > largest ? z : largest;
              }
              if (p.softmax) running[n].raise(largest, p.inverse_temperature);
#pragma unroll
              for (int j = 0; j < kColumns; ++j) {
                if (j >= columns) break;
                if (p.softmax) {
                  running[n].add_exponential(rows[n][0][j], cosine[n][j], p.inverse_temperature);
                } else {
                  running[n].add_shifted(rows[n][0][j], cosine[n][j], static_cast<R>(seen + j));
                }
              }
            }
            seen += columns;
          }
#pragma unroll
          for (int n = 0; n < kOwn; ++n) {
#pragma unroll
            for (int j = 0; j < kColumns; ++j) {
              rows[n][0][j] = rows[n][1][j];
              rows[n][1][j] = rows[n][2][j];
              rows[n][2][j] = R(0);
            }
          }
        }
      }
#pragma unroll
      for (int n = 0; n < kOwn; ++n) score[n] += running[n].result(p.softmax, static_cast<R>(p.cells));
    }
#pragma unroll
    for (int n = 0; n < kOwn; ++n) {
      const int64_t row = probe.first + warp * kOwn + n;
      if (row < p.probes.faces && gallery.first + lane < p.gallery.faces) {
        p.scores[row * p.gallery.faces + gallery.first + lane] = score[n] / static_cast<R>(p.orders);
      }
    }
  }
}

template <typename T>
Status plain(const MatrixProblem& problem, void* scores, Stream stream) {
  using R = typename Element<T>::Result;
  MatrixParams<T, R> p = matrix_params<T, R>(problem);
  p.scores = static_cast<R*>(scores);
  // With few probes, small blocks: no idle warps.
  const int64_t wanted = ceil_divide(p.probes.faces, kPairs<R>);
  const int warps = static_cast<int>(wanted < kPlainWarps ? wanted : kPlainWarps);
  const int64_t items =
      ceil_divide(p.gallery.faces, kFaces) * ceil_divide(p.probes.faces, int64_t{warps} * kPairs<R>);
  return launch_blocks<matrix_plain<T>>(items, warps * kWarp, plain_shared_bytes<R>(warps), p, stream);
}

}  // namespace

Status xcos_matrix(const MatrixProblem& problem, void* scores, Stream stream) {
  if (problem.probes.faces == 0 || problem.gallery.faces == 0) return 0;
  if (matrix_mma_takes(problem)) return matrix_mma(problem, scores, stream);
  switch (problem.scalar) {
    case Scalar::f16:
      return plain<__half>(problem, scores, stream);
    case Scalar::bf16:
      return plain<__nv_bfloat16>(problem, scores, stream);
    case Scalar::f32:
      return plain<float>(problem, scores, stream);
    case Scalar::f64:
      return plain<double>(problem, scores, stream);
  }
  return static_cast<Status>(cudaErrorInvalidValue);
}

}  // namespace xcos::cuda
