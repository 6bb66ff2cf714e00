// Feature element types: what they accumulate in, and how several travel in one word.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#include "core/types.h"

namespace xcos::cuda {

// Result: type of sums and outputs. Word: the unit a lane reads from shared memory, kPack elements.
template <typename T>
struct Element;

template <typename T>
struct PlainElement {
  using Result = T;
  using Word = T;
  static constexpr int kPack = 1;

  static __device__ Result load(T v) { return v; }
  static __device__ T store(Result v) { return v; }
  static __device__ void unpack(Word word, Result (&v)[1]) { v[0] = word; }
  static __device__ Word pack(const Result (&v)[1]) { return v[0]; }
};

template <>
struct Element<float> : PlainElement<float> {};

template <>
struct Element<double> : PlainElement<double> {};

template <>
struct Element<__half> {
  using Result = float;
  using Word = uint32_t;
  static constexpr int kPack = 2;

  static __device__ Result load(__half v) { return __half2float(v); }
  static __device__ __half store(Result v) { return __float2half_rn(v); }
  static __device__ void unpack(Word word, Result (&v)[2]) {
    __half2 halves;
    memcpy(&halves, &word, sizeof(word));
    const float2 wide = __half22float2(halves);
    v[0] = wide.x;
    v[1] = wide.y;
  }
  static __device__ Word pack(const Result (&v)[2]) {
    const __half2 halves = __floats2half2_rn(v[0], v[1]);
    Word word;
    memcpy(&word, &halves, sizeof(word));
    return word;
  }
};

template <>
struct Element<__nv_bfloat16> {
  using Result = float;
  using Word = uint32_t;
  static constexpr int kPack = 2;

  static __device__ Result load(__nv_bfloat16 v) { return __bfloat162float(v); }
  static __device__ __nv_bfloat16 store(Result v) { return __float2bfloat16_rn(v); }
  static __device__ void unpack(Word word, Result (&v)[2]) {
    // The upper half of a float: one instruction each.
    v[0] = __uint_as_float(word << 16);
    v[1] = __uint_as_float(word & 0xffff0000u);
  }
  static __device__ Word pack(const Result (&v)[2]) {
    const __nv_bfloat162 halves = __floats2bfloat162_rn(v[0], v[1]);
    Word word;
    memcpy(&word, &halves, sizeof(word));
    return word;
  }
};

// 16 bytes as words, moved by one instruction.
template <typename T>
struct alignas(16) Chunk {
  static constexpr int kWords = 16 / sizeof(typename Element<T>::Word);
  typename Element<T>::Word word[kWords];
};

// One value of a run-time type, as R.
template <typename R>
__device__ inline R load_scalar(const void* data, Scalar scalar, int64_t index) {
  switch (scalar) {
    case Scalar::f16:
      return R(__half2float(static_cast<const __half*>(data)[index]));
    case Scalar::bf16:
      return R(__bfloat162float(static_cast<const __nv_bfloat16*>(data)[index]));
    case Scalar::f32:
      return R(static_cast<const float*>(data)[index]);
    default:
      return R(static_cast<const double*>(data)[index]);
  }
}

}  // namespace xcos::cuda
