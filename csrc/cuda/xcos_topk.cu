// Running top-k lists. A block owns a probe: its list lies in shared memory, sorted; scores stream by, and
// those that beat the list's last entry gather in a buffer, which is sorted and merged when it is full.
// Candidates are ordered totally (score, then index), so the list depends neither on the order in which
// threads append nor on when the buffer happens to be full.
#include "cuda/matrix_kernels.cuh"
#include "cuda/xcos_topk.h"

namespace xcos::cuda {
namespace {

constexpr int kTopkThreads = 512;
constexpr int kMostEntries = 2048;
constexpr int kReads = 4;  // scores that a thread has in flight

// Entries of the buffer; list and buffer together fit the 48 KB that every block may have.
template <typename R>
constexpr int kBuffer = sizeof(R) == 8 ? 512 : 1024;

template <typename R>
struct TopkParams {
  int64_t probes;
  int64_t count;
  const R* scores;
  int64_t scores_stride;
  int64_t first_index;
  int k;
  double min_score;
  R* values;
  int64_t* indices;
  const int64_t* exclude_indices;
  int64_t exclude_count;
  int64_t exclude_stride;
  const bool* exclude_mask;
  int64_t exclude_mask_stride;
  int64_t exclude_mask_step;
};

template <typename R>
struct Candidate {
  static constexpr R kInfinity = std::numeric_limits<R>::infinity();

  R value;
  int64_t index;

  static __device__ Candidate empty() { return {-kInfinity, -1}; }

  // An empty place, index -1, comes after whatever has its value.
  __device__ bool before(const Candidate& other) const {
    if (value != other.value) return value > other.value;
    return static_cast<uint64_t>(index) < static_cast<uint64_t>(other.index);
  }
};

template <typename R>
struct CandidateArray {
  R* values;
  int64_t* indices;

  __device__ Candidate<R> get(int at) const { return {values[at], indices[at]}; }
  __device__ void set(int at, const Candidate<R>& c) const {
    values[at] = c.value;
    indices[at] = c.index;
  }
  // Of `count` sorted entries, how many come before c; equal: or are c's equal.
  __device__ int rank(const Candidate<R>& c, int count, bool equal) const {
    int low = 0;
    int high = count;
    while (low < high) {
      const int middle = (low + high) / 2;
      const Candidate<R> there = get(middle);
      if (equal ? !c.before(there) : there.before(c)) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }
};

template <typename R>
constexpr int64_t topk_shared_bytes(int64_t k) {
  return (k + kBuffer<R>)*int64_t{sizeof(R) + sizeof(int64_t)} + int64_t{sizeof(int64_t)};
}

// Sorts `count` entries of the buffer, the rest of a power of two being filled up with empty places.
template <typename R>
__device__ inline void sort_buffer(const CandidateArray<R>& buffer, int count) {
  int size = 2;
  while (size < count) size *= 2;
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = count + thread; i < size; i += kTopkThreads) {
    buffer.set(i, Candidate<R>::empty());
  }
  for (int run = 2; run <= size; run *= 2) {
    for (int step = run / 2; step > 0; step /= 2) {
      __syncthreads();
      for (int t = thread; t < size / 2; t += kTopkThreads) {
        const int low = t / step * 2 * step + t % step;
        const int high = low + step;
        const Candidate<R> a = buffer.get(low);
        const Candidate<R> b = buffer.get(high);
        // Runs in alternating directions, the whole descending.
        if ((low & run) == 0 ? b.before(a) : a.before(b)) {
          buffer.set(low, b);
          buffer.set(high, a);
        }
      }
    }
  }
  __syncthreads();
}

// Merges the buffer's entries into the list: everybody's new place is its place plus its rank among the
// others. All threads; begins and ends with a barrier.
template <typename R>
__device__ inline void merge_buffer(const CandidateArray<R>& list, int k, const CandidateArray<R>& buffer,
                                    int count) {
  constexpr int kListOwn = kMostEntries / kTopkThreads;
  constexpr int kBufferOwn = (kBuffer<R> + kTopkThreads - 1) / kTopkThreads;
  __syncthreads();
  sort_buffer(buffer, count);
  Candidate<R> own[kListOwn + kBufferOwn];
  int place[kListOwn + kBufferOwn];
#pragma unroll
  for (int n = 0; n < kListOwn; ++n) {
    const int i = static_cast<int>(threadIdx.x) + n * kTopkThreads;
    place[n] = k;
    if (i >= k) continue;
    own[n] = list.get(i);
    place[n] = i + buffer.rank(own[n], count, false);
  }
#pragma unroll
  for (int n = kListOwn; n < kListOwn + kBufferOwn; ++n) {
    const int i = static_cast<int>(threadIdx.x) + (n - kListOwn) * kTopkThreads;
    place[n] = k;
    if (i >= count) continue;
    own[n] = buffer.get(i);
    place[n] = i + list.rank(own[n], k, true);
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < kListOwn + kBufferOwn; ++n) {
    if (place[n] < k) list.set(place[n], own[n]);
  }
  __syncthreads();
}

template <typename R>
__device__ inline bool excluded(const TopkParams<R>& p, int64_t probe, int64_t column) {
  if (p.exclude_mask != nullptr &&
      p.exclude_mask[probe * p.exclude_mask_stride + column * p.exclude_mask_step]) {
    return true;
  }
  for (int64_t e = 0; e < p.exclude_count; ++e) {
    if (p.exclude_indices[probe * p.exclude_stride + e] == p.first_index + column) return true;
  }
  return false;
}

template <typename R>
__global__ void __launch_bounds__(kTopkThreads, 1) topk_update(const __grid_constant__ TopkParams<R> p) {
  int64_t* const words = reinterpret_cast<int64_t*>(dynamic_shared());
  int* const gathered = reinterpret_cast<int*>(words);  // entries handed to the buffer, also those beyond it
  int64_t* const indices = words + 1;
  R* const values = reinterpret_cast<R*>(indices + p.k + kBuffer<R>);
  const CandidateArray<R> list = {values, indices};
  const CandidateArray<R> buffer = {values + p.k, indices + p.k};
  const int thread = static_cast<int>(threadIdx.x);

  for (int64_t probe = blockIdx.x; probe < p.probes; probe += gridDim.x) {
    for (int i = thread; i < p.k; i += kTopkThreads) {
      list.set(i, {p.values[probe * p.k + i], p.indices[probe * p.k + i]});
    }
    if (thread == 0) *gathered = 0;
    __syncthreads();
    Candidate<R> last = list.get(p.k - 1);
    const R* const scores = p.scores + probe * p.scores_stride;

    for (int64_t first = 0; first < p.count; first += kTopkThreads * kReads) {
      R score[kReads];
      unsigned pending = 0;
#pragma unroll
      for (int n = 0; n < kReads; ++n) {
        const int64_t column = first + n * kTopkThreads + thread;
        score[n] = R(0);
        if (column >= p.count) continue;
        score[n] = scores[column];
        pending |= 1u << n;
      }
#pragma unroll
      for (int n = 0; n < kReads; ++n) {
        const int64_t column = first + n * kTopkThreads + thread;
        // NaN is not before anything: all comparisons with it fail but this first one.
        if (score[n] != score[n] || !Candidate<R>{score[n], p.first_index + column}.before(last) ||
            static_cast<double>(score[n]) < p.min_score || (pending >> n & 1u) == 0 ||
            excluded(p, probe, column)) {
          pending &= ~(1u << n);
        }
      }
      for (;;) {
#pragma unroll
        for (int n = 0; n < kReads; ++n) {
          if ((pending >> n & 1u) == 0) continue;
          const Candidate<R> c = {score[n], p.first_index + first + n * kTopkThreads + thread};
          if (!c.before(last)) {
            pending &= ~(1u << n);
            continue;
          }
          const int at = atomicAdd(gathered, 1);
          if (at >= kBuffer<R>) break;  // full
          buffer.set(at, c);
          pending &= ~(1u << n);
        }
        if (__syncthreads_or(pending != 0) == 0) break;
        merge_buffer(list, p.k, buffer, kBuffer<R>);
        last = list.get(p.k - 1);
        if (thread == 0) *gathered = 0;
        __syncthreads();
      }
    }
    const int rest = *gathered;
    merge_buffer(list, p.k, buffer, rest);
    for (int i = thread; i < p.k; i += kTopkThreads) {
      const Candidate<R> c = list.get(i);
      p.values[probe * p.k + i] = c.value;
      p.indices[probe * p.k + i] = c.index;
    }
    __syncthreads();  // the list is read until here
  }
}

template <typename R>
Status update_lists(const TopkUpdate& u, Stream stream) {
  TopkParams<R> p = {};
  p.probes = u.probes;
  p.count = u.count;
  p.scores = static_cast<const R*>(u.scores);
  p.scores_stride = u.scores_stride;
  p.first_index = u.first_index;
  p.k = static_cast<int>(u.k);
  p.min_score = u.min_score;
  p.values = static_cast<R*>(u.values);
  p.indices = u.indices;
  p.exclude_indices = u.exclude_indices;
  p.exclude_count = u.exclude_indices == nullptr ? 0 : u.exclude_count;
  p.exclude_stride = u.exclude_stride;
  p.exclude_mask = u.exclude_mask;
  p.exclude_mask_stride = u.exclude_mask_stride;
  p.exclude_mask_step = u.exclude_mask_step;
  return launch_blocks<topk_update<R>>(u.probes, kTopkThreads, topk_shared_bytes<R>(u.k), p, stream);
}

}  // namespace

Status xcos_topk_update(const TopkUpdate& update, Stream stream) {
  if (update.probes == 0 || update.count == 0) return 0;
  if (update.k < 1 || update.k > kMostEntries) return static_cast<Status>(cudaErrorInvalidValue);
  if (update.scalar == Scalar::f32) return update_lists<float>(update, stream);
  if (update.scalar == Scalar::f64) return update_lists<double>(update, stream);
  return static_cast<Status>(cudaErrorInvalidValue);
}

}  // namespace xcos::cuda
