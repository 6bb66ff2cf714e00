// A block per pair; everything between the features and the score stays in shared memory. The two large
// convolutions are sums in registers: a thread has a run of cells of one grid row for two hidden channels,
// and takes the input channels from shared memory, 16 at a time, with the weights of these. Where that gives
// too few threads for a block, they share the channels and add their sums up in a fixed order.
#include <limits>

#include "core/cell_math.h"
#include "cuda/matrix_kernels.cuh"
#include "cuda/pair_kernels.cuh"
#include "cuda/xcos_head.h"

namespace xcos::cuda {
namespace {

constexpr int kHeadThreads = 256;
constexpr int kHeadBlocks = 3;                 // of an SM, at least, that registers must allow
constexpr int kHeadChunk = 16;                 // input channels in shared memory at a time
constexpr int kHeadRun = 7;                    // cells of a row that a thread sums up
constexpr int kHeadOutputs = kHeadHidden / 2;  // threads side by side, two channels each
constexpr int kHeadSums = 2 * kHeadRun;        // of a thread
constexpr int kHeadPitch = kHeadHidden + 2;    // of weights in shared memory: fewer banks meet
constexpr int kHeadSplits = 4;                 // most threads that share an item
constexpr int kHeadLanes = kHeadThreads / static_cast<int>(kHeadMostCells);  // threads a cell
static_assert(kHeadThreads == kHeadChunk * kHeadHidden && kHeadChunk == kHeadHidden);

// Shared memory in floats: what is of a fixed size.
constexpr int kHeadPartials = kHeadSums * (kHeadThreads - kHeadThreads / kHeadSplits);
constexpr int kHeadWeights = kHeadChunk * kHeadTaps * kHeadPitch;
constexpr int kHeadWeightRoom = kHeadWeights > kHeadPartials ? kHeadWeights : kHeadPartials;
constexpr int kHeadFolded = 4 * kHeadHidden + kHeadTaps * kHeadHidden + 5;
constexpr int kHeadFoldedRoom = (kHeadFolded + 3) / 4 * 4;
constexpr int kHeadCells = static_cast<int>(kHeadMostCells);
constexpr int kHeadSmallRoom = 4 * kHeadCells;  // cosines, logits of norms, logits of both orders
constexpr int kHeadSlack = 8;                   // a run may read beyond the last row

constexpr float kHeadNone = -std::numeric_limits<float>::infinity();

struct HeadParams {
  int64_t pairs;
  int64_t channels;
  int height;
  int width;
  int cells;
  int pitch;  // of a grid row in shared memory: a zero behind every row, and one before the first
  int plane;  // of a channel there
  int runs_across;
  int runs;
  MapAccess<const void> a;
  MapAccess<const void> b;
  Scalar parameters;
  HeadLayer embed;
  HeadLayer first;
  HeadLayer last;
  bool symmetric;
  bool residual;
  float temperature;
  float inverse_temperature;
  float eps;
  float* score;
  float* similarity;
  float* attention;
};

struct HeadShared {
  float* weights;   // [chunk, taps, pitch]; between chunks, partial sums
  float* input;     // [2 faces, chunk, plane]; later the hidden layer of both orders
  float* embedded;  // [2 faces, hidden, plane]
  float* scale;     // [2, hidden] of embed and first, then their shifts
  float* last;      // [taps, hidden], then its scale and shift and the three slopes
  float* cosine;    // [cells]
  float* norm_logits;
  float* logits;  // [2, cells]

  __device__ explicit HeadShared(int plane) {
    weights = reinterpret_cast<float*>(dynamic_shared());
    scale = weights + kHeadWeightRoom;
    last = scale + 4 * kHeadHidden;
    cosine = scale + kHeadFoldedRoom;
    norm_logits = cosine + kHeadCells;
    logits = norm_logits + kHeadCells;
    input = cosine + kHeadSmallRoom;
    embedded = input + 2 * kHeadChunk * plane + kHeadSlack;
  }
  static int64_t bytes(int64_t plane) {
    const int64_t maps = 2 * (2 * kHeadChunk * plane + kHeadSlack);
    return (kHeadWeightRoom + kHeadFoldedRoom + kHeadSmallRoom + maps) * static_cast<int64_t>(sizeof(float));
  }
  __device__ float* shift() const { return scale + 2 * kHeadHidden; }
  __device__ float* last_fold() const { return last + kHeadTaps * kHeadHidden; }
  __device__ float* slopes() const { return last_fold() + 2; }
};

__device__ inline float parameter(const HeadParams& p, const void* data, int64_t index) {
  return load_scalar<float>(data, p.parameters, index);
}

// The batch norm behind output o as a factor and a summand of the convolution's sums.
__device__ inline void fold(const HeadParams& p, const HeadLayer& layer, int o, float& scale, float& shift) {
  scale = 1.0f;
  shift = parameter(p, layer.bias, o);
  if (layer.norm_variance == nullptr) return;
  scale = parameter(p, layer.norm_weight, o) /
          root(parameter(p, layer.norm_variance, o) + static_cast<float>(layer.norm_eps));
  shift = (shift - parameter(p, layer.norm_mean, o)) * scale + parameter(p, layer.norm_bias, o);
}

// What all pairs of a block share.
__device__ inline void prepare(const HeadParams& p, const HeadShared& s) {
  const int t = threadIdx.x;
  // Layers are named, never chosen by reference: parameters that are pointed at would move to local memory.
  if (t < kHeadHidden) {
    fold(p, p.embed, t, s.scale[t], s.shift()[t]);
  } else if (t < 2 * kHeadHidden) {
    fold(p, p.first, t - kHeadHidden, s.scale[t], s.shift()[t]);
  } else if (t == 2 * kHeadHidden) {
    fold(p, p.last, 0, s.last_fold()[0], s.last_fold()[1]);
  } else if (t < 2 * kHeadHidden + 4) {
    const int i = t - 2 * kHeadHidden - 1;
    const void* slope = i == 0 ? p.embed.slope : i == 1 ? p.first.slope : p.last.slope;
    s.slopes()[i] = slope == nullptr ? 1.0f : parameter(p, slope, 0);
  }
  for (int i = t; i < kHeadTaps * kHeadHidden; i += kHeadThreads) {
    const int tap = i / kHeadHidden;
    s.last[i] = parameter(p, p.last.weight,
                          i % kHeadHidden * p.last.weight_strides[1] + tap / 3 * p.last.weight_strides[2] +
                              tap % 3 * p.last.weight_strides[3]);
  }
  // What belongs to no cell stays zero for good.
  const int maps = 2 * (2 * kHeadChunk * p.plane + kHeadSlack);
  for (int i = t; i < maps; i += kHeadThreads) s.input[i] = 0.0f;
}

// A chunk's weights on their way from global to shared memory: fetched while the chunk before is worked on. A
// thread has the taps of one output and one input channel.
struct HeadWeights {
  float value[kHeadTaps];

  // Input channels from `first` on, of embed or first; those beyond the layer's are zero.
  __device__ void fetch(const HeadParams& p, bool embed, int64_t first) {
    switch (p.parameters) {
      case Scalar::f16:
        return fetch_as<__half>(p, embed, first);
      case Scalar::bf16:
        return fetch_as<__nv_bfloat16>(p, embed, first);
      default:
        return fetch_as<float>(p, embed, first);
    }
  }
  template <typename P>
  __device__ void fetch_as(const HeadParams& p, bool embed, int64_t first) {
    const int64_t channel = first + threadIdx.x % kHeadChunk;
    const int o = threadIdx.x / kHeadChunk;
    const bool there = channel < (embed ? p.channels : 2 * kHeadHidden);
    const int64_t by_row = embed ? p.embed.weight_strides[2] : p.first.weight_strides[2];
    const int64_t by_column = embed ? p.embed.weight_strides[3] : p.first.weight_strides[3];
    const P* from = static_cast<const P*>(embed ? p.embed.weight : p.first.weight);
    from += o * (embed ? p.embed.weight_strides[0] : p.first.weight_strides[0]) +
            channel * (embed ? p.embed.weight_strides[1] : p.first.weight_strides[1]);
#pragma unroll
    for (int tap = 0; tap < kHeadTaps; ++tap)
      value[tap] = there ? Element<P>::load(from[tap / 3 * by_row + tap % 3 * by_column]) : 0.0f;
  }
  __device__ void place(float* weights) const {
    float* to = weights + threadIdx.x % kHeadChunk * (kHeadTaps * kHeadPitch) + threadIdx.x / kHeadChunk;
#pragma unroll
    for (int tap = 0; tap < kHeadTaps; ++tap) to[tap * kHeadPitch] = value[tap];
  }
};

// Channels first .. first + count of a face.
template <typename T>
__device__ inline void stage_face(const HeadParams& p, const MapAccess<const void>& map, int64_t pair,
                                  int64_t first, int count, float* to) {
  const T* from = static_cast<const T*>(map.data) + pair * map.pair_stride + first * map.channel_stride;
  const bool by_channel = map.channel_stride < map.cell_stride;  // channels lie closer together
  const int inner = by_channel ? count : p.cells;
#pragma unroll 4
  for (int i = threadIdx.x; i < count * p.cells; i += kHeadThreads) {
    const int slow = i / inner;
    const int fast = i - slow * inner;
    const int c = by_channel ? fast : slow;
    const int cell = by_channel ? slow : fast;
    const int row = cell / p.width;
    to[c * p.plane + 1 + row * p.pitch + cell - row * p.width] =
        Element<T>::load(from[c * map.channel_stride + cell * map.cell_stride]);
  }
}

// What a thread sums up in a convolution of `sides` maps: two channels of a run of cells.
struct HeadItem {
  int count;   // items of the convolution
  int splits;  // threads that share one
  int split;   // of these, the thread's number; splits and more: idle
  int index;
  int output;  // first of the two channels
  int side;
  int row;
  int column;

  __device__ HeadItem(const HeadParams& p, int sides, int pass) {
    count = sides * p.runs * kHeadOutputs;
    splits = 2 * count > kHeadThreads ? 1 : 4 * count > kHeadThreads ? 2 : kHeadSplits;
    const int here = count < kHeadThreads ? count : kHeadThreads;
    split = static_cast<int>(threadIdx.x) / here;
    index = pass * kHeadThreads + static_cast<int>(threadIdx.x) - split * here;
    if (index >= count) split = splits;
    output = index % kHeadOutputs * 2;
    const int run = index / kHeadOutputs % p.runs;
    side = index / kHeadOutputs / p.runs;
    row = run / p.runs_across;
    column = (run - row * p.runs_across) * kHeadRun;
  }
  static __device__ int passes(const HeadParams& p, int sides) {
    return (sides * p.runs * kHeadOutputs + kHeadThreads - 1) / kHeadThreads;
  }
  __device__ bool active() const { return split < splits; }
  // Where a cell of the run lies in a plane.
  __device__ int at(const HeadParams& p, int j) const { return 1 + row * p.pitch + column + j; }
};

// sums += the thread's share of a chunk. tile: [chunk, plane].
__device__ inline void convolve(const HeadParams& p, const HeadItem& item, const float* tile, int count,
                                const float* weights, float (&sums)[2][kHeadRun]) {
  const int share = kHeadChunk / item.splits;
  const int begin = item.split * share;
  const int end = begin + share < count ? begin + share : count;
  const int first_row = item.row == 0 ? 0 : -1;
  const int last_row = item.row == p.height - 1 ? 0 : 1;
#pragma unroll 1
  for (int c = begin; c < end; ++c) {
    const float* x = tile + c * p.plane + item.at(p, -1);
    const float* w = weights + c * (kHeadTaps * kHeadPitch) + item.output;
#pragma unroll 1
    for (int dy = first_row; dy <= last_row; ++dy) {
      float value[kHeadRun + 2];
#pragma unroll
      for (int j = 0; j < kHeadRun + 2; ++j) value[j] = x[dy * p.pitch + j];
#pragma unroll
      for (int dx = 0; dx < 3; ++dx) {
        const float2 weight = *reinterpret_cast<const float2*>(w + ((dy + 1) * 3 + dx) * kHeadPitch);
#pragma unroll
        for (int j = 0; j < kHeadRun; ++j) {
          sums[0][j] += value[j + dx] * weight.x;
          sums[1][j] += value[j + dx] * weight.y;
        }
      }
    }
  }
}

// Adds up what threads share, then folds, activates and writes [side, hidden, plane]. layer 0: embed, 1:
// first. All threads.
__device__ inline void finish(const HeadParams& p, const HeadShared& s, const HeadItem& item, int layer,
                              float (&sums)[2][kHeadRun], float* out) {
  if (item.splits > 1) {
    __syncthreads();  // the chunk's weights may still be read
    if (item.active() && item.split > 0) {
#pragma unroll
      for (int k = 0; k < kHeadSums; ++k)
        s.weights[((item.split - 1) * kHeadSums + k) * item.count + item.index] =
            sums[k / kHeadRun][k % kHeadRun];
    }
    __syncthreads();
  }
  if (!item.active() || item.split > 0) return;
#pragma unroll 1
  for (int split = 1; split < item.splits; ++split) {
#pragma unroll
    for (int k = 0; k < kHeadSums; ++k)
      sums[k / kHeadRun][k % kHeadRun] += s.weights[((split - 1) * kHeadSums + k) * item.count + item.index];
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int channel = item.output + half;
    const float scale = s.scale[layer * kHeadHidden + channel];
    const float shift = s.shift()[layer * kHeadHidden + channel];
    float* to = out + (item.side * kHeadHidden + channel) * p.plane + item.at(p, 0);
#pragma unroll
    for (int j = 0; j < kHeadRun; ++j) {
      if (item.column + j < p.width) to[j] = parametric(sums[half][j] * scale + shift, s.slopes()[layer]);
    }
  }
}

// Sum over the kHeadLanes threads of a cell.
__device__ inline float cell_sum(float value) {
#pragma unroll
  for (int step = kHeadLanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(kFullWarp, value, step);
  return value;
}

// W of the pair as the mean over its orders, and the score. One warp.
__device__ inline void weigh(const HeadParams& p, const HeadShared& s, int64_t pair) {
  constexpr int kPerLane = kHeadCells / kWarp;
  const WarpGroup warp{static_cast<int>(threadIdx.x)};
  const int orders = p.symmetric ? 2 : 1;
  float weight[kPerLane] = {};
#pragma unroll 1
  for (int order = 0; order < orders; ++order) {
    const float* z = s.logits + order * kHeadCells;
    float highest = kHeadNone;
    float e[kPerLane];
#pragma unroll
    for (int k = 0; k < kPerLane; ++k) {
      const int cell = warp.rank + k * kWarp;
      e[k] = cell < p.cells ? z[cell] : kHeadNone;
      highest = larger(highest, e[k]);
    }
    highest = warp.maximum(highest);
    float total[1] = {0.0f};
#pragma unroll
    for (int k = 0; k < kPerLane; ++k) {
      e[k] = warp.rank + k * kWarp < p.cells ? exponential((e[k] - highest) * p.inverse_temperature) : 0.0f;
      total[0] += e[k];
    }
    warp.sum(total);
    const float scale = (orders == 2 ? 0.5f : 1.0f) / total[0];
#pragma unroll
    for (int k = 0; k < kPerLane; ++k) weight[k] += e[k] * scale;
  }
  float score[1] = {0.0f};
#pragma unroll
  for (int k = 0; k < kPerLane; ++k) {
    const int cell = warp.rank + k * kWarp;
    if (cell >= p.cells) continue;
    score[0] += weight[k] * s.cosine[cell];
    if (p.attention != nullptr) p.attention[pair * p.cells + cell] = weight[k];
  }
  warp.sum(score);
  if (warp.rank == 0) p.score[pair] = score[0];
}

template <typename T>
__global__ void __launch_bounds__(kHeadThreads, kHeadBlocks)
    head_forward(const __grid_constant__ HeadParams p) {
  const HeadShared s(p.plane);
  const int orders = p.symmetric ? 2 : 1;
  const int embed_passes = HeadItem::passes(p, 2);
  const int first_passes = HeadItem::passes(p, orders);
  // A thread's cell, and its share of that cell's channels.
  const int cell = static_cast<int>(threadIdx.x) / kHeadLanes;
  const int lane = static_cast<int>(threadIdx.x) % kHeadLanes;
  const bool has_cell = cell < p.cells;
  const int cell_row = cell / p.width;
  const int cell_at = 1 + cell_row * p.pitch + cell - cell_row * p.width;
  HeadWeights weights;
  weights.fetch(p, true, 0);
  prepare(p, s);

  for (int64_t pair = blockIdx.x; pair < p.pairs; pair += gridDim.x) {
    CellMoments<float> moments = {0.0f, 0.0f, 0.0f};
#pragma unroll 1
    for (int pass = 0; pass < embed_passes; ++pass) {
      const HeadItem item(p, 2, pass);
      float sums[2][kHeadRun] = {};
#pragma unroll 1
      for (int64_t first = 0; first < p.channels; first += kHeadChunk) {
        const int count = p.channels - first < kHeadChunk ? static_cast<int>(p.channels - first) : kHeadChunk;
        __syncthreads();  // what was here may still be read
        weights.place(s.weights);
        stage_face<T>(p, p.a, pair, first, count, s.input);
        stage_face<T>(p, p.b, pair, first, count, s.input + kHeadChunk * p.plane);
        __syncthreads();
        const bool more = first + kHeadChunk < p.channels;
        weights.fetch(p, more || pass + 1 < embed_passes, more ? first + kHeadChunk : 0);
        if (pass == 0 && has_cell) {
          for (int c = lane; c < count; c += kHeadLanes) {
            const float x = s.input[c * p.plane + cell_at];
            const float y = s.input[(kHeadChunk + c) * p.plane + cell_at];
            moments.dot += x * y;
            moments.xx += x * x;
            moments.yy += y * y;
          }
        }
        if (item.active())
          convolve(p, item, s.input + item.side * kHeadChunk * p.plane, count, s.weights, sums);
      }
      finish(p, s, item, 0, sums, s.embedded);
    }

    moments.dot = cell_sum(moments.dot);
    moments.xx = cell_sum(moments.xx);
    moments.yy = cell_sum(moments.yy);
    if (has_cell && lane == 0) {
      const CellCosine<float> c = cell_cosine(moments, root(moments.xx), root(moments.yy), p.eps);
      s.cosine[cell] = c.cosine;
      s.norm_logits[cell] =
          p.residual ? p.temperature * (logf(clamp_norm(c.x_norm, p.eps)) + logf(clamp_norm(c.y_norm, p.eps)))
                     : 0.0f;
      if (p.similarity != nullptr) p.similarity[pair * p.cells + cell] = c.cosine;
    }

#pragma unroll 1
    for (int pass = 0; pass < first_passes; ++pass) {
      const HeadItem item(p, orders, pass);
      float sums[2][kHeadRun] = {};
#pragma unroll 1
      for (int part = 0; part < 2; ++part) {  // the order's first face, then its second
        __syncthreads();
        weights.place(s.weights);
        __syncthreads();
        // The last fetch is the next pair's first; where there is none, it is for nothing.
        weights.fetch(p, part == 1 && pass + 1 == first_passes, part == 0 ? kHeadHidden : 0);
        if (item.active())
          convolve(p, item, s.embedded + (item.side ^ part) * kHeadHidden * p.plane, kHeadChunk, s.weights,
                   sums);
      }
      finish(p, s, item, 1, sums, s.input);
    }
    __syncthreads();

    for (int order = 0; order < orders; ++order) {
      float sum = 0.0f;
      if (has_cell) {
        const int first_row = cell_row == 0 ? 0 : -1;
        const int last_row = cell_row == p.height - 1 ? 0 : 1;
        for (int c = lane; c < kHeadHidden; c += kHeadLanes) {
          const float* hidden = s.input + (order * kHeadHidden + c) * p.plane + cell_at;
          for (int dy = first_row; dy <= last_row; ++dy) {
#pragma unroll
            for (int dx = -1; dx <= 1; ++dx)
              sum += hidden[dy * p.pitch + dx] * s.last[(dy * 3 + dx + 4) * kHeadHidden + c];
          }
        }
      }
      sum = cell_sum(sum);
      if (has_cell && lane == 0)
        s.logits[order * kHeadCells + cell] =
            parametric(sum * s.last_fold()[0] + s.last_fold()[1], s.slopes()[2]) + s.norm_logits[cell];
    }
    __syncthreads();
    if (threadIdx.x < kWarp) weigh(p, s, pair);
  }
}

template <typename T>
Status forward(const HeadProblem& problem, const XcosScoreOutputs& outputs, Stream stream) {
  HeadParams p = {};
  p.pairs = problem.pair.shape.pairs;
  p.channels = problem.pair.shape.channels;
  p.height = static_cast<int>(problem.height);
  p.width = static_cast<int>(problem.width);
  p.cells = p.height * p.width;
  p.pitch = p.width + 1;
  p.plane = p.height * p.pitch + 1;
  p.runs_across = (p.width + kHeadRun - 1) / kHeadRun;
  p.runs = p.height * p.runs_across;
  p.a = access_of(problem.pair.a);
  p.b = access_of(problem.pair.b);
  p.parameters = problem.parameters;
  p.embed = problem.embed;
  p.first = problem.first;
  p.last = problem.last;
  p.symmetric = problem.symmetric;
  p.residual = problem.residual;
  p.temperature = positive<float>(problem.pair.temperature);
  p.inverse_temperature = 1.0f / p.temperature;
  p.eps = positive<float>(problem.pair.eps);
  p.score = static_cast<float*>(outputs.score);
  p.similarity = static_cast<float*>(outputs.similarity);
  p.attention = static_cast<float*>(outputs.attention);
  return launch_blocks<head_forward<T>>(p.pairs, kHeadThreads, HeadShared::bytes(p.plane), p, stream);
}

}  // namespace

Status xcos_head(const HeadProblem& problem, const XcosScoreOutputs& outputs, Stream stream) {
  if (problem.pair.shape.pairs == 0) return 0;
  switch (problem.pair.scalar) {
    case Scalar::f16:
      return forward<__half>(problem, outputs, stream);
    case Scalar::bf16:
      return forward<__nv_bfloat16>(problem, outputs, stream);
    case Scalar::f32:
      return forward<float>(problem, outputs, stream);
    case Scalar::f64:
      break;  // refused by the operator
  }
  return static_cast<Status>(cudaErrorInvalidValue);
}

}  // namespace xcos::cuda
