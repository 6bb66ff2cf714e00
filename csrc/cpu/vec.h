// Fixed-width vectors on the compiler's vector extension: one source, every instruction set. Included only by
// kernel files, once per set; everything here has internal linkage (see isa.h).
#pragma once

#include <cstdint>
#include <cstring>

#include "core/half.h"
#include "core/types.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace xcos::cpu::XCOS_ISA {
namespace {

#define XCOS_INLINE inline __attribute__((always_inline))

// Keeps a loaded vector in its register. GCC otherwise folds the load into each instruction that uses it, and
// a vector that straddles two cache lines is then paid for twice.
#if defined(__AVX512F__)
#define XCOS_KEEP(v) asm("" : "+v"(v))
#elif defined(__x86_64__)
#define XCOS_KEEP(v) asm("" : "+x"(v))
#else
#define XCOS_KEEP(v)
#endif

// Storage types of half precision; the bits only, arithmetic happens in float.
struct F16 {
  uint16_t bits;
};
struct BF16 {
  uint16_t bits;
};

template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};

template <typename A, int N>
struct VecOf {
  typedef A type __attribute__((vector_size(N * sizeof(A))));
};
template <typename A, int N>
using Vec = typename VecOf<A, N>::type;

// Lanes of a full vector of this instruction set.
template <typename A>
constexpr int native_lanes() {
#if defined(__AVX512F__)
  return 64 / sizeof(A);
#elif defined(__AVX2__)
  return 32 / sizeof(A);
#else
  return 16 / sizeof(A);
#endif
}

XCOS_INLINE float load_one(const float* p) { return *p; }
XCOS_INLINE double load_one(const double* p) { return *p; }
XCOS_INLINE float load_one(const BF16* p) { return bf16_to_float(p->bits); }
XCOS_INLINE float load_one(const F16* p) {
#if defined(__F16C__)
  return _cvtsh_ss(p->bits);
#else
  return f16_to_float(p->bits);
#endif
}

XCOS_INLINE void store_one(float* p, float v) { *p = v; }
XCOS_INLINE void store_one(double* p, double v) { *p = v; }
XCOS_INLINE void store_one(BF16* p, float v) { p->bits = float_to_bf16(v); }
XCOS_INLINE void store_one(F16* p, float v) {
#if defined(__F16C__)
  p->bits = _cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT);
#else
  p->bits = float_to_f16(v);
#endif
}

template <int N>
XCOS_INLINE Vec<float, N> load(const float* p) {
  Vec<float, N> v;
  memcpy(&v, p, sizeof(v));
  return v;
}
template <int N>
XCOS_INLINE Vec<double, N> load(const double* p) {
  Vec<double, N> v;
  memcpy(&v, p, sizeof(v));
  return v;
}
template <int N>
XCOS_INLINE Vec<float, N> load(const BF16* p) {
  Vec<uint16_t, N> bits;
  memcpy(&bits, p, sizeof(bits));
  const Vec<uint32_t, N> wide = __builtin_convertvector(bits, Vec<uint32_t, N>) << 16;
  return reinterpret_cast<Vec<float, N>>(wide);
}
template <int N>
XCOS_INLINE Vec<float, N> load(const F16* p) {
  Vec<float, N> v;
#if defined(__AVX512F__)
  if constexpr (N == 16) {
    const __m512 wide = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    memcpy(&v, &wide, sizeof(v));
    return v;
  }
#endif
#if defined(__F16C__)
  if constexpr (N == 8) {
    const __m256 wide = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    memcpy(&v, &wide, sizeof(v));
    return v;
  }
#endif
  for (int i = 0; i < N; ++i) v[i] = load_one(p + i);
  return v;
}

template <int N>
XCOS_INLINE void store(float* p, Vec<float, N> v) {
  memcpy(p, &v, sizeof(v));
}
template <int N>
XCOS_INLINE void store(double* p, Vec<double, N> v) {
  memcpy(p, &v, sizeof(v));
}
template <int N>
XCOS_INLINE void store(BF16* p, Vec<float, N> v) {
  const Vec<uint32_t, N> bits = reinterpret_cast<Vec<uint32_t, N>>(v);
  const Vec<uint32_t, N> rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const auto is_nan = v != v;
  const Vec<uint32_t, N> quiet = rounded - rounded + 0x7fc0u;
  const Vec<uint32_t, N> chosen = is_nan ? quiet : rounded;
  const Vec<uint16_t, N> narrow = __builtin_convertvector(chosen, Vec<uint16_t, N>);
  memcpy(p, &narrow, sizeof(narrow));
}
template <int N>
XCOS_INLINE void store(F16* p, Vec<float, N> v) {
#if defined(__AVX512F__)
  if constexpr (N == 16) {
    __m512 wide;
    memcpy(&wide, &v, sizeof(v));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(wide, _MM_FROUND_TO_NEAREST_INT));
    return;
  }
#endif
#if defined(__F16C__)
  if constexpr (N == 8) {
    __m256 wide;
    memcpy(&wide, &v, sizeof(v));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(wide, _MM_FROUND_TO_NEAREST_INT));
    return;
  }
#endif
  for (int i = 0; i < N; ++i) store_one(p + i, v[i]);
}

// A store past the caches, for results too large to be found there again; p aligned to the vector's size in
// memory. fence_streams() must follow before another thread may look.
template <bool kStream, int N, typename T, typename V>
XCOS_INLINE void store_result(T* p, V v) {
#if defined(__x86_64__)
  if constexpr (kStream) {
    alignas(64) T line[N];
    store<N>(line, v);
    constexpr size_t size = sizeof(line);
#if defined(__AVX512F__)
    if constexpr (size == 64) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(p), _mm512_load_si512(line));
      return;
    }
#endif
#if defined(__AVX2__)
    if constexpr (size == 32) {
      _mm256_stream_si256(reinterpret_cast<__m256i*>(p), _mm256_load_si256(reinterpret_cast<__m256i*>(line)));
      return;
    }
#endif
    if constexpr (size == 16) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(p), _mm_load_si128(reinterpret_cast<__m128i*>(line)));
      return;
    }
  }
#endif
  store<N>(p, v);
}

XCOS_INLINE void fence_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Sum of the lanes, always in the same order.
template <typename A, int N>
XCOS_INLINE A sum_lanes(Vec<A, N> v) {
  if constexpr (N == 1) {
    return v[0];
  } else {
    Vec<A, N / 2> low, high;
    memcpy(&low, &v, sizeof(low));
    memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof(low), sizeof(high));
    return sum_lanes<A, N / 2>(low + high);
  }
}

// exp(x) for x <= 0, within 2 ulp in float; -inf gives 0 and NaN stays NaN. Written branch-free so that loops
// over it vectorise: x = n ln 2 + r, 2^n by the exponent bits, e^r by a degree-6 polynomial (minimax on |r|
// <= ln 2 / 2).
XCOS_INLINE float exp_nonpositive(float x) {
  const float lowest = -87.0f;
  const float clamped = x < lowest ? lowest : x;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float shifted = clamped * 1.44269504f + magic;
  const float n = shifted - magic;
  const float r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const float scale = bits_to_float((float_to_bits(shifted) + 127u) << 23);
  const float value = p * scale;
  return x < lowest ? 0.0f : value;
}
XCOS_INLINE double exp_nonpositive(double x) { return __builtin_exp(x); }

}  // namespace
}  // namespace xcos::cpu::XCOS_ISA
