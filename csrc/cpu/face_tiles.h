// Faces of one side made ready for all-pairs kernels: the gallery's in tiles of one face a lane, so that a
// vector instruction serves as many pairs as it has lanes; the probe's as words that an instruction
// broadcasts. Two kinds of arithmetic share everything else:
//
//   Real<float>, Real<double>   one value a lane
//   Fixed16                     two 16-bit fixed-point values a lane (AVX-512 VNNI), for half-precision
//   templates
//
// Fixed16 is finer than bfloat16's 8 bits and as fine as float16's 11 for all but a face's smallest values,
// and it needs one instruction for the maximum of 32 values, where bfloat16 arithmetic has none. A pair's
// projections share a unit that depends on its two faces alone (HalfRange), so that the larger one takes 12
// to 14 bits; the rest of the 32-bit sum's room goes to the weights.
#pragma once

#include <cmath>
#include <cstdlib>
#include <limits>
#include <new>
#include <type_traits>

#include "core/xcos_matrix.h"
#include "cpu/vec.h"

namespace xcos::cpu::XCOS_ISA {
namespace {

// Uninitialised memory on a cache line.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count < 1 ? 1 : count) * sizeof(T) + 63) / 64 * 64;
    data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* get() { return data_; }
  const T* get() const { return data_; }

 private:
  T* data_;
};

template <typename V>
XCOS_INLINE V vector_max(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<V, Vec<float, 16>>) return (V)_mm512_max_ps((__m512)a, (__m512)b);
  if constexpr (std::is_same_v<V, Vec<double, 8>>) return (V)_mm512_max_pd((__m512d)a, (__m512d)b);
#endif
#if defined(__AVX2__)
  if constexpr (std::is_same_v<V, Vec<float, 8>>) return (V)_mm256_max_ps((__m256)a, (__m256)b);
  if constexpr (std::is_same_v<V, Vec<double, 4>>) return (V)_mm256_max_pd((__m256d)a, (__m256d)b);
#endif
#if defined(__x86_64__)
  if constexpr (std::is_same_v<V, Vec<float, 4>>) return (V)_mm_max_ps((__m128)a, (__m128)b);
  if constexpr (std::is_same_v<V, Vec<double, 2>>) return (V)_mm_max_pd((__m128d)a, (__m128d)b);
#endif
  return a > b ? a : b;
}

// a * b + c, fused where the processor can.
template <typename V>
XCOS_INLINE V multiply_add(V a, V b, V c) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<V, Vec<float, 16>>) return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  if constexpr (std::is_same_v<V, Vec<double, 8>>)
    return (V)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#endif
#if defined(__AVX2__)
  if constexpr (std::is_same_v<V, Vec<float, 8>>) return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  if constexpr (std::is_same_v<V, Vec<double, 4>>)
    return (V)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#endif
  return a * b + c;
}

template <typename V, typename A>
XCOS_INLINE V broadcast_value(A value) {
  return value - V{};  // minus, because adding to +0 would turn -0 around and so cost an addition
}

template <typename A>
struct Real {
  using Result = A;
  using Word = A;
  static constexpr int kLanes = native_lanes<A>();
  static constexpr int kStep = 1;  // channels in a word
  static constexpr bool kFixed = false;
  using Vector = Vec<A, kLanes>;
  using Packed = Vector;
  using Sum = Vector;

  static constexpr A kDotUnit = 1;  // what one unit of a dot product of features is worth

  static XCOS_INLINE Packed broadcast(const Word* w) { return broadcast_value<Packed>(*w); }
  static XCOS_INLINE Packed maximum(const Word* u, Packed v) { return vector_max(broadcast(u), v); }
  static XCOS_INLINE Sum multiply_add(Packed a, Packed b, Sum sum) {
    return ::xcos::cpu::XCOS_ISA::multiply_add<Vector>(a, b, sum);
  }
  static XCOS_INLINE Vector real(Sum sum) { return sum; }
};

#if defined(__AVX512VNNI__)
struct Fixed16 {
  using Result = float;
  using Word = int32_t;  // two int16, channel 2i below channel 2i + 1
  static constexpr int kLanes = 16;
  static constexpr int kStep = 2;
  static constexpr bool kFixed = true;
  using Vector = Vec<float, 16>;
  using Packed = Vec<int32_t, 16>;
  using Sum = Vec<int32_t, 16>;

  static constexpr float kFeatureUnit = 32767.0f;  // of unit-length cells: two of them give at most 2^30
  static constexpr float kDotUnit = 1.0f / (kFeatureUnit * kFeatureUnit);

  static XCOS_INLINE Packed broadcast(const Word* w) { return (Packed)_mm512_set1_epi32(*w); }
  static XCOS_INLINE Packed maximum(const Word* u, Packed v) {
    return (Packed)_mm512_max_epi16(_mm512_set1_epi32(*u), (__m512i)v);
  }
  static XCOS_INLINE Sum multiply_add(Packed a, Packed b, Sum sum) {
    return (Sum)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
  }
  static XCOS_INLINE Vector real(Sum sum) { return (Vector)_mm512_cvtepi32_ps((__m512i)sum); }
};
#endif

// Sizes of a problem in words of one arithmetic.
struct Sizes {
  int64_t channels, hidden, height, width, cells, orders;
  int64_t channel_words, hidden_words;  // per cell
  int64_t feature_words;                // per face: [cells, channel_words]
  int64_t projection_words;             // per face: [orders, hidden_words, cells]
  int64_t bias_values;                  // per face: [orders, cells]
};

XCOS_INLINE Sizes sizes_of(const MatrixProblem& m, int step) {
  Sizes s;
  s.channels = m.channels;
  s.hidden = m.hidden;
  s.height = m.height;
  s.width = m.width;
  s.cells = m.height * m.width;
  s.orders = m.orders;
  s.channel_words = (m.channels + step - 1) / step;
  s.hidden_words = (m.hidden + step - 1) / step;
  s.feature_words = s.cells * s.channel_words;
  s.projection_words = s.orders * s.hidden_words * s.cells;
  s.bias_values = s.orders * s.cells;
  return s;
}

template <typename T>
XCOS_INLINE const T* face(const void* data, int64_t stride, int64_t index) {
  return static_cast<const T*>(data) + index * stride;
}

// `count` values as A; the same bits whatever the vector width.
template <typename A, typename T>
XCOS_INLINE void convert(const T* in, int64_t count, A* out) {
  constexpr int N = native_lanes<A>();
  int64_t i = 0;
  for (; i + N <= count; i += N) store<N>(out + i, load<N>(in + i));
  for (; i < count; ++i) out[i] = load_one(in + i);
}

// kLanes rows of `count` words to `count` vectors of kLanes lanes. Words of 4 bytes take the blocks of the
// processor's own shuffles.
template <typename Word, int kLanes>
XCOS_INLINE void transpose_rows(const Word* const* rows, int64_t count, Word* out) {
  int64_t k = 0;
#if defined(__AVX512F__)
  if constexpr (sizeof(Word) == 4 && kLanes == 16) {
    for (; k + 16 <= count; k += 16) {
      __m512i a[16], b[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(rows[i] + k);
#pragma GCC unroll 8
      for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
      }
#pragma GCC unroll 4
      for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
      }
      // a[4 g + j]: word 4 q + j of rows 4 g .. 4 g + 3 in quarter q.
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        b[j] = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88);
        b[4 + j] = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd);
        b[8 + j] = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88);
        b[12 + j] = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd);
      }
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        _mm512_storeu_si512(out + (k + j) * 16, _mm512_shuffle_i32x4(b[j], b[8 + j], 0x88));
        _mm512_storeu_si512(out + (k + 4 + j) * 16, _mm512_shuffle_i32x4(b[4 + j], b[12 + j], 0x88));
        _mm512_storeu_si512(out + (k + 8 + j) * 16, _mm512_shuffle_i32x4(b[j], b[8 + j], 0xdd));
        _mm512_storeu_si512(out + (k + 12 + j) * 16, _mm512_shuffle_i32x4(b[4 + j], b[12 + j], 0xdd));
      }
    }
  }
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(Word) == 4 && kLanes == 8) {
    for (; k + 8 <= count; k += 8) {
      __m256i a[8], b[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[i] + k));
#pragma GCC unroll 4
      for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
      }
#pragma GCC unroll 2
      for (int i = 0; i < 8; i += 4) {
        a[i] = _mm256_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm256_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm256_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm256_unpackhi_epi64(b[i + 1], b[i + 3]);
      }
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const __m256i low = _mm256_permute2x128_si256(a[j], a[4 + j], 0x20);
        const __m256i high = _mm256_permute2x128_si256(a[j], a[4 + j], 0x31);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + (k + j) * 8), low);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + (k + 4 + j) * 8), high);
      }
    }
  }
#endif
  for (; k < count; ++k)
    for (int lane = 0; lane < kLanes; ++lane) out[k * kLanes + lane] = rows[lane][k];
}

// `count` words of a face's features, from word `first` on.
template <class P, typename T>
XCOS_INLINE void feature_words(const Sizes& s, const T* in, int64_t first, int64_t count,
                               typename P::Word* out) {
  if constexpr (!P::kFixed) {
    (void)s;
    convert<typename P::Word>(in + first, count, out);
  } else {
#if defined(__AVX512VNNI__)
    int64_t i = 0;
    if (s.channels % 2 == 0) {
      const __m512 unit = _mm512_set1_ps(P::kFeatureUnit);
      for (; i + 16 <= count; i += 16) {
        const T* from = in + 2 * (first + i);
        const __m512i low = _mm512_cvtps_epi32(_mm512_mul_ps((__m512)load<16>(from), unit));
        const __m512i high = _mm512_cvtps_epi32(_mm512_mul_ps((__m512)load<16>(from + 16), unit));
        const __m512i words = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtsepi32_epi16(low)),
                                                 _mm512_cvtsepi32_epi16(high), 1);
        _mm512_storeu_si512(out + i, words);
      }
    }
    for (; i < count; ++i) {
      const int64_t cell = (first + i) / s.channel_words, c = 2 * ((first + i) % s.channel_words);
      const T* from = in + cell * s.channels + c;
      const auto fixed = [](float v) {
        const float scaled = v * P::kFeatureUnit;
        const float bounded = scaled > 32767.0f ? 32767.0f : scaled < -32768.0f ? -32768.0f : scaled;
        return static_cast<int32_t>(_mm_cvtss_si32(_mm_set_ss(bounded)));
      };
      const int32_t low = fixed(load_one(from));
      const int32_t high = c + 1 < s.channels ? fixed(load_one(from + 1)) : 0;
      out[i] = (low & 0xffff) | static_cast<int32_t>(static_cast<uint32_t>(high) << 16);
    }
#endif
  }
}

// Row `row` (order and channels of a word) of a face's projections, all cells. scale: the reciprocal of the
// fixed-point unit.
template <class P, typename T>
XCOS_INLINE void projection_row(const Sizes& s, const T* in, int64_t row, float scale,
                                typename P::Word* out) {
  if constexpr (!P::kFixed) {
    (void)scale;
    convert<typename P::Word>(in + row * s.cells, s.cells, out);
  } else {
#if defined(__AVX512VNNI__)
    const int64_t order = row / s.hidden_words, channel = 2 * (row % s.hidden_words);
    const T* low = in + (order * s.hidden + channel) * s.cells;
    const bool pair = channel + 1 < s.hidden;
    const T* high = pair ? low + s.cells : low;
    int64_t i = 0;
    const __m512 factor = _mm512_set1_ps(scale);
    const __m512i mask = _mm512_set1_epi32(0xffff);
    for (; i + 16 <= s.cells; i += 16) {
      const __m512i a = _mm512_cvtps_epi32(_mm512_mul_ps((__m512)load<16>(low + i), factor));
      const __m512i b = _mm512_cvtps_epi32(_mm512_mul_ps((__m512)load<16>(high + i), factor));
      const __m512i upper = pair ? _mm512_slli_epi32(b, 16) : _mm512_setzero_si512();
      _mm512_storeu_si512(out + i, _mm512_or_si512(_mm512_and_si512(a, mask), upper));
    }
    for (; i < s.cells; ++i) {
      const int32_t a = _mm_cvtss_si32(_mm_set_ss(load_one(low + i) * scale));
      const int32_t b = pair ? _mm_cvtss_si32(_mm_set_ss(load_one(high + i) * scale)) : 0;
      out[i] = (a & 0xffff) | static_cast<int32_t>(static_cast<uint32_t>(b) << 16);
    }
#endif
  }
}

#if defined(__AVX512VNNI__)
// What decides a face's unit, read off the bits of its halves: magnitudes compare like integers.
//
// A pair's unit is the larger one of its two faces'. Units are a factor of 8 apart, so nearly all faces of a
// head have the same one, and a tile is gone through once; a tile or a probe of another costs another pass.
struct HalfRange {
  int exponent;  // all projections are below 2^exponent, a multiple of kUnitStep
  bool finite;   // projections and features
};

constexpr int kUnitStep = 3;
constexpr int kLeastExponent = -24;

template <typename T>
XCOS_INLINE uint16_t largest_bits(const T* in, int64_t count) {
  uint16_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint16_t bits = in[i].bits & 0x7fff;
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

template <typename T>
XCOS_INLINE HalfRange half_range(const MatrixProblem& m, const TemplateView& side, int64_t index) {
  constexpr uint16_t kInfinity = std::is_same_v<T, BF16> ? 0x7f80 : 0x7c00;
  const int64_t cells = m.height * m.width;
  const uint16_t projection =
      largest_bits(face<T>(side.projection, side.projection_stride, index), m.orders * m.hidden * cells);
  const uint16_t feature =
      largest_bits(face<T>(side.features, side.features_stride, index), cells * m.channels);
  HalfRange range{kLeastExponent, projection < kInfinity && feature < kInfinity};
  if (projection > 0 && range.finite) {
    T value;
    value.bits = projection;
    int exponent;
    std::frexp(load_one(&value), &exponent);
    while (range.exponent < exponent) range.exponent += kUnitStep;
  }
  return range;
}
#endif

// The reciprocal unit that puts values below 2^exponent below 2^14, half of one kept for rounding.
XCOS_INLINE float projection_scale(int exponent) { return std::ldexp(16383.0f / 16384.0f, 14 - exponent); }

constexpr int kNoUnit = -1000;

// kLanes faces of the gallery, one a lane. Places beyond the last face repeat it.
template <class P>
class FaceTile {
 public:
  using Word = typename P::Word;
  using Packed = typename P::Packed;
  using Result = typename P::Result;
  using Vector = typename P::Vector;

  explicit FaceTile(const Sizes& s)
      : sizes_(s),
        features_(s.feature_words),
        projection_(s.projection_words),
        bias_(s.bias_values),
        rows_(P::kLanes * kBlock) {}

  const Packed* features() const { return features_.get(); }      // [cells, channel_words]
  const Packed* projection() const { return projection_.get(); }  // [orders, hidden_words, cells]
  const Vector* bias() const { return bias_.get(); }              // [orders, cells]
  int count() const { return count_; }
  int exponent(int lane) const { return exponent_[lane]; }
  int unit() const { return unit_; }
  bool finite(int lane) const { return finite_[lane]; }

  // Faces [first, first + kLanes) of a side. Fixed16: projections wait for the unit.
  template <typename T>
  void pack([[maybe_unused]] const MatrixProblem& m, const TemplateView& side, int64_t first) {
    const int64_t left = side.faces - first;
    count_ = left < P::kLanes ? static_cast<int>(left) : P::kLanes;
    unit_ = kNoUnit;
    for (int lane = 0; lane < P::kLanes; ++lane) {
      index_[lane] = first + (lane < count_ ? lane : count_ - 1);
      finite_[lane] = true;
      exponent_[lane] = 0;
#if defined(__AVX512VNNI__)
      if constexpr (P::kFixed) {
        const HalfRange range = half_range<T>(m, side, index_[lane]);
        finite_[lane] = range.finite;
        exponent_[lane] = range.exponent;
      }
#endif
    }
    const T* values[P::kLanes];
    for (int lane = 0; lane < P::kLanes; ++lane)
      values[lane] = face<T>(side.features, side.features_stride, index_[lane]);
    for (int64_t k = 0; k < sizes_.feature_words; k += kBlock) {
      const int64_t n = sizes_.feature_words - k < kBlock ? sizes_.feature_words - k : kBlock;
      const Word* rows[P::kLanes];
      for (int lane = 0; lane < P::kLanes; ++lane) {
        if constexpr (std::is_same_v<Word, T>) {
          rows[lane] = values[lane] + k;
        } else {
          feature_words<P>(sizes_, values[lane], k, n, rows_.get() + lane * kBlock);
          rows[lane] = rows_.get() + lane * kBlock;
        }
      }
      transpose_rows<Word, P::kLanes>(rows, n, reinterpret_cast<Word*>(features_.get() + k));
    }
    const Result* biases[P::kLanes];
    for (int lane = 0; lane < P::kLanes; ++lane)
      biases[lane] = face<Result>(side.bias, side.bias_stride, index_[lane]);
    transpose_rows<Result, P::kLanes>(biases, sizes_.bias_values, reinterpret_cast<Result*>(bias_.get()));
    if constexpr (!P::kFixed) use_unit<T>(side, 0);
  }

  // Projections, for Fixed16 in the unit of this exponent; faces that need a larger one are left out.
  template <typename T>
  void use_unit(const TemplateView& side, int exponent) {
    if (exponent == unit_) return;
    unit_ = exponent;
    const float scale = P::kFixed ? projection_scale(exponent) : 1.0f;
    const int64_t total = sizes_.orders * sizes_.hidden_words;
    // As many rows of cells at a time as the working memory holds; a row longer than it goes in pieces of its
    // own.
    Buffer<Word>* rows_memory = &rows_;
    Buffer<Word> large(sizes_.cells > kBlock ? P::kLanes * sizes_.cells : 1);
    int64_t room = kBlock;
    if (sizes_.cells > kBlock) {
      rows_memory = &large;
      room = sizes_.cells;
    }
    const int64_t step = room / sizes_.cells;
    for (int64_t row = 0; row < total; row += step) {
      const int64_t n = total - row < step ? total - row : step;
      const Word* rows[P::kLanes];
      for (int lane = 0; lane < P::kLanes; ++lane) {
        const T* values = face<T>(side.projection, side.projection_stride, index_[lane]);
        Word* out = rows_memory->get() + lane * room;
        rows[lane] = out;
        if constexpr (std::is_same_v<Word, T>) {
          rows[lane] = values + row * sizes_.cells;
        } else {
          if (finite_[lane] && exponent_[lane] <= exponent) {
            for (int64_t i = 0; i < n; ++i)
              projection_row<P>(sizes_, values, row + i, scale, out + i * sizes_.cells);
          } else {
            for (int64_t i = 0; i < n * sizes_.cells; ++i) out[i] = Word(0);
          }
        }
      }
      transpose_rows<Word, P::kLanes>(rows, n * sizes_.cells,
                                      reinterpret_cast<Word*>(projection_.get() + row * sizes_.cells));
    }
  }

 private:
  static constexpr int64_t kBlock = 512;  // words of a face that are converted at a time: 32 KB a tile

  Sizes sizes_;
  Buffer<Packed> features_;
  Buffer<Packed> projection_;
  Buffer<Vector> bias_;
  Buffer<Word> rows_;
  int64_t index_[P::kLanes];
  bool finite_[P::kLanes];
  int exponent_[P::kLanes];
  int count_ = 0;
  int unit_ = kNoUnit;
};

// Consecutive probes as broadcastable words; read in place where they are stored that way already.
template <class P, typename T>
class ProbeBlock {
 public:
  using Word = typename P::Word;
  static constexpr bool kInPlace = std::is_same_v<Word, T>;

  ProbeBlock(const Sizes& s, int64_t most)
      : sizes_(s),
        features_(kInPlace ? 1 : most * s.feature_words),
        projection_(kInPlace ? 1 : most * s.projection_words),
        exponent_(most),
        finite_(most) {}

  int exponent(int64_t i) const { return exponent_.get()[i]; }
  bool finite(int64_t i) const { return finite_.get()[i]; }

  void prepare([[maybe_unused]] const MatrixProblem& m, const TemplateView& side, int64_t first,
               int64_t count) {
    side_ = side;
    first_ = first;
    count_ = count;
    unit_ = kNoUnit;
    for (int64_t i = 0; i < count; ++i) {
      finite_.get()[i] = true;
      exponent_.get()[i] = 0;
#if defined(__AVX512VNNI__)
      if constexpr (P::kFixed) {
        const HalfRange range = half_range<T>(m, side, first + i);
        finite_.get()[i] = range.finite;
        exponent_.get()[i] = range.exponent;
      }
#endif
      if constexpr (!kInPlace)
        feature_words<P>(sizes_, face<T>(side.features, side.features_stride, first + i), 0,
                         sizes_.feature_words, features_.get() + i * sizes_.feature_words);
    }
    if constexpr (!P::kFixed) use_unit(0);
  }

  // Projections, for Fixed16 in the unit of this exponent; probes that need a larger one are left out.
  void use_unit(int exponent) {
    if constexpr (!kInPlace) {
      if (exponent == unit_) return;
      const float scale = P::kFixed ? projection_scale(exponent) : 1.0f;
      for (int64_t i = 0; i < count_; ++i) {
        Word* out = projection_.get() + i * sizes_.projection_words;
        const T* values = face<T>(side_.projection, side_.projection_stride, first_ + i);
        if (!finite_.get()[i] || exponent_.get()[i] > exponent) continue;
        for (int64_t row = 0; row < sizes_.orders * sizes_.hidden_words; ++row)
          projection_row<P>(sizes_, values, row, scale, out + row * sizes_.cells);
      }
    }
    unit_ = exponent;
  }

  const Word* features(int64_t i) const {
    if constexpr (kInPlace) return face<T>(side_.features, side_.features_stride, first_ + i);
    return features_.get() + i * sizes_.feature_words;
  }
  const Word* projection(int64_t i) const {
    if constexpr (kInPlace) return face<T>(side_.projection, side_.projection_stride, first_ + i);
    return projection_.get() + i * sizes_.projection_words;
  }
  const typename P::Result* bias(int64_t i) const {
    return face<typename P::Result>(side_.bias, side_.bias_stride, first_ + i);
  }

 private:
  Sizes sizes_;
  TemplateView side_{};
  int64_t first_ = 0;
  int64_t count_ = 0;
  int unit_ = kNoUnit;
  Buffer<Word> features_;
  Buffer<Word> projection_;
  Buffer<int> exponent_;
  Buffer<bool> finite_;
};

}  // namespace
}  // namespace xcos::cpu::XCOS_ISA
