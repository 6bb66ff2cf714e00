#include "cpu/xcos_matrix_fixed.h"

#include "cpu/face_tiles.h"

namespace xcos::cpu::XCOS_ISA {
namespace {

// Products of rows as rows lie in memory: a block of gallery faces stays in the first-level cache while all
// probes pass by, and each product of two rows has a vector of partial sums of its own. Half precision is
// widened block by block; bfloat16 goes to the processor's own dot product where there is one.

#if defined(__AVX512F__)
constexpr int kFaces = 6, kProbes = 4;  // 24 sums, 4 probes' values and a face's in 32 registers
#else
constexpr int kFaces = 4, kProbes = 2;
#endif
constexpr int64_t kProbesAtOnce = 64;  // probes that pass by together: they stay in the second-level cache

// Sums of four vectors' lanes, in an order that does not depend on how many of the four are of interest.
template <typename V, typename A>
XCOS_INLINE void sum_four(const V (&v)[4], int count, A* out) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<V, Vec<float, 16>>) {
    const __m512 a = (__m512)v[0], b = (__m512)v[1], c = (__m512)v[2], d = (__m512)v[3];
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512 abcd = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
    const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    alignas(16) float sums[4];
    _mm_store_ps(sums, quarter);
    for (int i = 0; i < count; ++i) out[i] = sums[i];
    return;
  }
#endif
  constexpr int N = sizeof(V) / sizeof(A);
  for (int i = 0; i < count; ++i) out[i] = sum_lanes<A, N>(v[i]);
}

// The step of an inner loop: kWidth elements of T from each row.
template <typename A, typename T>
struct Step {
  static constexpr int kWidth = native_lanes<A>();
  using Value = Vec<A, kWidth>;
  using Sum = Vec<A, kWidth>;
  static XCOS_INLINE Value load_row(const T* p) { return load<kWidth>(p); }
  static XCOS_INLINE Sum add(Value a, Value b, Sum sum) { return multiply_add<Sum>(a, b, sum); }
};

#if defined(__AVX512VNNI__)
// Compiled in where it is called only if the processor has it (has_bf16_products): this instruction set asks
// for VNNI alone, which is older, and no compiler uses these instructions of its own accord.
struct BF16Step {
  static constexpr int kWidth = 32;
  using Value = Vec<int32_t, 16>;
  using Sum = Vec<float, 16>;
  static XCOS_INLINE Value load_row(const BF16* p) { return (Value)_mm512_loadu_si512(p); }
  static XCOS_INLINE Sum add(Value a, Value b, Sum sum) {
    return (Sum)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(__m512i)a, (__m512bh)(__m512i)b);
  }
};
#endif

// M probes x N faces. Rows are padded with zeros to whole steps. out[m * row + n].
template <class S, typename T, typename A, int M, int N>
XCOS_INLINE void multiply_block(const T* probes, int64_t probe_stride, const T* faces, int64_t face_stride,
                                int64_t length, A* out, int64_t row) {
  using Sum = typename S::Sum;
  Sum sum[N][M] = {};
  for (int64_t k = 0; k < length; k += S::kWidth) {
    typename S::Value a[M];
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) a[m] = S::load_row(probes + m * probe_stride + k);
#pragma GCC unroll 6
    for (int n = 0; n < N; ++n) {
      const typename S::Value b = S::load_row(faces + n * face_stride + k);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) sum[n][m] = S::add(a[m], b, sum[n][m]);
    }
  }
#pragma GCC unroll 6
  for (int n = 0; n < N; ++n) {
    Sum four[4];
#pragma GCC unroll 4
    for (int m = 0; m < 4; ++m) four[m] = sum[n][m < M ? m : 0];
    A totals[4];
    sum_four(four, M, totals);
    for (int m = 0; m < M; ++m) out[m * row + n] = totals[m];
  }
}

template <class S, typename T, typename A>
struct Products {
  static void rows(const T* probes, int64_t probe_stride, int64_t probe_count, const T* faces,
                   int64_t face_stride, int face_count, int64_t length, A* out, int64_t row,
                   const char* ahead, int64_t ahead_bytes) {
    // The next faces are fetched while these are worked on, an even share with each group of probes.
    const int64_t groups = (probe_count + kProbes - 1) / kProbes;
    int64_t fetched = 0, group = 0;
    int64_t p = 0;
    for (; p + kProbes <= probe_count; p += kProbes) {
      for (++group; fetched < ahead_bytes * group / groups; fetched += 64)
        __builtin_prefetch(ahead + fetched, 0, 2);
      faces_for<kProbes>(probes + p * probe_stride, probe_stride, faces, face_stride, face_count, length,
                         out + p * row, row);
    }
    for (; fetched < ahead_bytes; fetched += 64) __builtin_prefetch(ahead + fetched, 0, 2);
    for (; p < probe_count; ++p)
      faces_for<1>(probes + p * probe_stride, probe_stride, faces, face_stride, face_count, length,
                   out + p * row, row);
  }

 private:
  template <int M>
  static XCOS_INLINE void faces_for(const T* probes, int64_t probe_stride, const T* faces,
                                    int64_t face_stride, int face_count, int64_t length, A* out,
                                    int64_t row) {
    if (face_count == kFaces)
      return multiply_block<S, T, A, M, kFaces>(probes, probe_stride, faces, face_stride, length, out, row);
    for (int n = 0; n < face_count; ++n)
      multiply_block<S, T, A, M, 1>(probes, probe_stride, faces + n * face_stride, face_stride, length,
                                    out + n, row);
  }
};

XCOS_INLINE int64_t padded_length(int64_t length) { return (length + 31) / 32 * 32; }

template <typename A, typename T, typename W>
class FixedTask {
 public:
  // T: stored type, W: type that is multiplied (A, or BF16).
  FixedTask(const FixedMatrixProblem& m, A* out)
      : m_(m),
        out_(out),
        length_(m.cells * m.channels),
        padded_(padded_length(length_)),
        norms_padded_(padded_length(m.cells)),
        in_place_(std::is_same_v<T, W> && padded_ == length_ && m.gallery_norms == nullptr) {}

  int64_t steps() const { return (m_.gallery + kFaces - 1) / kFaces; }

  void run(int64_t begin, int64_t end) const {
    const bool norms = m_.gallery_norms != nullptr;
    const int64_t most = m_.probes < kProbesAtOnce ? m_.probes : kProbesAtOnce;
    Buffer<W> probe_memory(probes_in_place() ? 1 : most * padded_);
    Buffer<A> probe_norms(norms ? most * norms_padded_ : 1);
    Buffer<W> face_memory(in_place_ ? 1 : kFaces * padded_);
    Buffer<A> face_norms(norms ? kFaces * norms_padded_ : 1);
    Buffer<A> denominators(norms ? kProbesAtOnce * kFaces : 1);
    for (int64_t first = 0; first < m_.probes; first += kProbesAtOnce) {
      const int64_t count = m_.probes - first < kProbesAtOnce ? m_.probes - first : kProbesAtOnce;
      const W* probes = probe_memory.get();
      int64_t probe_stride = padded_;
      if (probes_in_place()) {
        probes = face<W>(m_.probe_rows, m_.probe_stride, first);
        probe_stride = m_.probe_stride;
      } else {
        for (int64_t i = 0; i < count; ++i)
          widen(face<A>(m_.probe_rows, m_.probe_stride, first + i), nullptr,
                probe_memory.get() + i * padded_);
      }
      if (norms)
        for (int64_t i = 0; i < count; ++i)
          pad_norms(face<A>(m_.probe_norms, m_.probe_norms_stride, first + i),
                    probe_norms.get() + i * norms_padded_);
      for (int64_t step = begin; step < end; ++step) {
        const int64_t g = step * kFaces;
        const int n = static_cast<int>(m_.gallery - g < kFaces ? m_.gallery - g : kFaces);
        const W* faces = face_memory.get();
        int64_t stride = padded_;
        if (in_place_) {
          faces = reinterpret_cast<const W*>(face<T>(m_.gallery_features, m_.gallery_stride, g));
          stride = m_.gallery_stride;
        } else {
          for (int i = 0; i < n; ++i)
            widen(face<T>(m_.gallery_features, m_.gallery_stride, g + i),
                  norms ? face<A>(m_.gallery_norms, m_.gallery_norms_stride, g + i) : nullptr,
                  face_memory.get() + i * padded_);
        }
        const bool last = step + 1 >= end;
        const char* ahead = reinterpret_cast<const char*>(
            face<T>(m_.gallery_features, m_.gallery_stride, last ? g : g + kFaces));
        const int64_t next = last ? 0 : m_.gallery - g - kFaces < kFaces ? m_.gallery - g - kFaces : kFaces;
        const int64_t bytes =
            m_.gallery_stride == length_ ? next * length_ * static_cast<int64_t>(sizeof(T)) : 0;
        A* out = out_ + first * m_.gallery + g;
        products(probes, probe_stride, count, faces, stride, n, out, ahead, bytes);
        if (norms) {
          for (int i = 0; i < n; ++i)
            pad_norms(face<A>(m_.gallery_norms, m_.gallery_norms_stride, g + i),
                      face_norms.get() + i * norms_padded_);
          Products<Step<A, A>, A, A>::rows(probe_norms.get(), norms_padded_, count, face_norms.get(),
                                           norms_padded_, n, norms_padded_, denominators.get(), kFaces,
                                           nullptr, 0);
          for (int64_t p = 0; p < count; ++p) {
            for (int i = 0; i < n; ++i) {
              A& score = out[p * m_.gallery + i];
              const A total = denominators.get()[p * kFaces + i];
              score = total == A(0) ? A(0) : score / total;
            }
          }
        }
      }
    }
  }

 private:
  bool probes_in_place() const { return std::is_same_v<A, W> && padded_ == length_; }

  void products(const W* probes, int64_t probe_stride, int64_t count, const W* faces, int64_t stride, int n,
                A* out, const char* ahead, int64_t bytes) const {
    if constexpr (std::is_same_v<W, BF16>) {
#if defined(__AVX512VNNI__)
      Products<BF16Step, BF16, A>::rows(probes, probe_stride, count, faces, stride, n, padded_, out,
                                        m_.gallery, ahead, bytes);
#endif
    } else {
      Products<Step<A, W>, W, A>::rows(probes, probe_stride, count, faces, stride, n, padded_, out,
                                       m_.gallery, ahead, bytes);
    }
  }

  // A face's row as W, cells times their norms if there are such, padded with zeros.
  template <typename In>
  void widen(const In* in, const A* norms, W* out) const {
    constexpr int N = native_lanes<A>();
    for (int64_t cell = 0; cell < m_.cells; ++cell) {
      const A norm = norms == nullptr ? A(1) : norms[cell];
      const In* from = in + cell * m_.channels;
      W* to = out + cell * m_.channels;
      int64_t c = 0;
      for (; c + N <= m_.channels; c += N)
        store<N>(to + c, load<N>(from + c) * broadcast_value<Vec<A, N>>(norm));
      for (; c < m_.channels; ++c) store_one(to + c, load_one(from + c) * norm);
    }
    memset(static_cast<void*>(out + length_), 0, static_cast<size_t>(padded_ - length_) * sizeof(W));
  }

  void pad_norms(const A* in, A* out) const {
    memcpy(out, in, static_cast<size_t>(m_.cells) * sizeof(A));
    for (int64_t i = m_.cells; i < norms_padded_; ++i) out[i] = 0;
  }

  const FixedMatrixProblem& m_;
  A* out_;
  int64_t length_, padded_, norms_padded_;
  bool in_place_;
};

template <typename A, typename T, typename W>
void run_fixed(const FixedMatrixProblem& m, void* scores, ParallelFor parallel_for) {
  const FixedTask<A, T, W> task(m, static_cast<A*>(scores));
  const int64_t per_step = kFaces * m.cells * m.channels * m.probes;
  const int64_t grain = 262144 / (per_step < 1 ? 1 : per_step) + 1;
  parallel_for(
      0, task.steps(), grain,
      [](int64_t begin, int64_t end, void* context) {
        static_cast<const FixedTask<A, T, W>*>(context)->run(begin, end);
      },
      const_cast<FixedTask<A, T, W>*>(&task));
}

#if defined(__AVX512VNNI__)
bool has_bf16_products() { return __builtin_cpu_supports("avx512bf16"); }
#endif

}  // namespace

void xcos_matrix_fixed(const FixedMatrixProblem& problem, void* scores, ParallelFor parallel_for) {
  if (problem.probes == 0 || problem.gallery == 0) return;
  switch (problem.scalar) {
    case Scalar::f32:
      return run_fixed<float, float, float>(problem, scores, parallel_for);
    case Scalar::f64:
      return run_fixed<double, double, double>(problem, scores, parallel_for);
    case Scalar::f16:
      return run_fixed<float, F16, float>(problem, scores, parallel_for);
    case Scalar::bf16:
#if defined(__AVX512VNNI__)
      if (has_bf16_products()) return run_fixed<float, BF16, BF16>(problem, scores, parallel_for);
#endif
      return run_fixed<float, BF16, float>(problem, scores, parallel_for);
  }
}

}  // namespace xcos::cpu::XCOS_ISA
