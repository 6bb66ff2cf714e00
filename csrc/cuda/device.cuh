// The primitives that kernels use beyond plain C++, each a function, so that the kernel sources themselves
// also run on a CPU under tests/cuda_emulator (which defines XCOS_CUDA_EMULATOR and supplies its own
// cuda_runtime.h).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace xcos::cuda {

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

// Whether the code under compilation may use the tensor cores' products of halves.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kTensorCores = false;
#else
constexpr bool kTensorCores = true;
#endif

// The block's dynamic shared memory, 16-byte aligned.
__device__ inline unsigned char* dynamic_shared() {
#if defined(XCOS_CUDA_EMULATOR)
  return emulator::dynamic_shared();
#else
  extern __shared__ __align__(16) unsigned char xcos_dynamic_shared[];
  return xcos_dynamic_shared;
#endif
}

// Starts copying kBytes (4, 8 or 16, both sides aligned to it) from global to shared memory. The data is
// there for the calling thread after copy_async_wait(), for others after a barrier behind that.
template <int kBytes>
__device__ inline void copy_async(void* shared, const void* global) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
#if defined(XCOS_CUDA_EMULATOR)
  emulator::copy_async(shared, global, kBytes);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16) {
    // .cg: features are used once, so L1 is left to the attention values.
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(global), "n"(kBytes) : "memory");
  }
#else
  if constexpr (kBytes == 16) {
    *static_cast<uint4*>(shared) = *static_cast<const uint4*>(global);
  } else if constexpr (kBytes == 8) {
    *static_cast<uint2*>(shared) = *static_cast<const uint2*>(global);
  } else {
    *static_cast<uint32_t*>(shared) = *static_cast<const uint32_t*>(global);
  }
#endif
}

__device__ inline void copy_async_wait() {
#if defined(XCOS_CUDA_EMULATOR)
  emulator::copy_async_wait();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

__device__ inline float root(float v) { return sqrtf(v); }
__device__ inline double root(double v) { return sqrt(v); }
__device__ inline float exponential(float v) { return expf(v); }
__device__ inline double exponential(double v) { return exp(v); }

// The larger one; NaN is passed over.
__device__ inline float larger(float a, float b) { return fmaxf(a, b); }

// The larger one; NaN if either is.
__device__ inline float larger_or_nan(float a, float b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  float out;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(a), "f"(b));
  return out;
#else
  return a > b || a != a ? a : b;
#endif
}
__device__ inline double larger_or_nan(double a, double b) { return a > b || a != a ? a : b; }

// a * b, never fused with an addition.
__device__ inline float rounded_product(float a, float b) { return __fmul_rn(a, b); }
__device__ inline double rounded_product(double a, double b) { return __dmul_rn(a, b); }

// 2^v to two units in the last place, results below 2^-126 being 0.
__device__ inline float power_of_two(float v) {
#if defined(XCOS_CUDA_EMULATOR)
  return exp2f(v);
#else
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(v));
  return out;
#endif
}

// The larger ones of two packed 16-bit values; NaN if either is. sm_80 and later.
template <typename T>
__device__ inline uint32_t packed_maximum(uint32_t a, uint32_t b) {
#if defined(XCOS_CUDA_EMULATOR)
  return emulator::packed_maximum(a, b, emulator::widen<T>);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t out;
  if constexpr (std::is_same_v<T, __half>) {
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
  } else {
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
  }
  return out;
#else
  return a + b;  // never run
#endif
}

// d += A B on the tensor cores: A [16, 16] and B [16, 8] of T, sums in fp32. With q = lane / 4 and t = lane %
// 4, a lane holds
//   a.x: A[q, 2t .. 2t+1]  a.y: A[q+8, 2t ..]  a.z: A[q, 2t+8 ..]  a.w: A[q+8, 2t+8 ..]
//   b.x: B[2t .. 2t+1, q]  b.y: B[2t+8 .., q]
//   d[0], d[1]: D[q, 2t .. 2t+1]  d[2], d[3]: D[q+8, 2t ..]
// All lanes of the warp; sm_80 and later.
template <typename T>
__device__ inline void multiply_tiles(float (&d)[4], const uint4& a, const uint2& b) {
#if defined(XCOS_CUDA_EMULATOR)
  emulator::mma_16x8x16(d, a, b, emulator::widen<T>);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y));
  }
#endif
}

// Threads that work on one pair. sum and maximum give every thread the same bits, in an order that is fixed.
struct WarpGroup {
  int rank;

  static constexpr int kSize = kWarp;

  __device__ void sync() const { __syncwarp(); }

  template <typename R, int kCount>
  __device__ void sum(R (&values)[kCount]) const {
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) values[k] += __shfl_xor_sync(kFullWarp, values[k], step);
    }
  }

  // NaN is passed over.
  template <typename R>
  __device__ R maximum(R value) const {
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) {
      const R other = __shfl_xor_sync(kFullWarp, value, step);
      value = other > value ? other : value;
    }
    return value;
  }
};

// A whole block of kThreads. scratch: shared memory for kScratch doubles.
template <int kThreads>
struct BlockGroup {
  int rank;
  void* scratch;

  static constexpr int kSize = kThreads;
  static constexpr int kWarps = kThreads / kWarp;
  static constexpr int kScratch = 3 * kWarps;

  __device__ void sync() const { __syncthreads(); }

  template <typename R, int kCount>
  __device__ void sum(R (&values)[kCount]) const {
    static_assert(kCount * kWarps <= kScratch, "scratch is too small");
    R* partial = static_cast<R*>(scratch);
    WarpGroup{rank % kWarp}.sum(values);
    __syncthreads();  // a former reduction may still be read
    if (rank % kWarp == 0) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) partial[k * kWarps + rank / kWarp] = values[k];
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      R total = partial[k * kWarps];
#pragma unroll
      for (int w = 1; w < kWarps; ++w) total += partial[k * kWarps + w];
      values[k] = total;
    }
  }

  template <typename R>
  __device__ R maximum(R value) const {
    R* partial = static_cast<R*>(scratch);
    value = WarpGroup{rank % kWarp}.maximum(value);
    __syncthreads();
    if (rank % kWarp == 0) partial[rank / kWarp] = value;
    __syncthreads();
    R largest = partial[0];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) largest = partial[w] > largest ? partial[w] : largest;
    return largest;
  }
};

// Hands indices below count out to the threads of a group, side by side: body(index, slot). With kCount > 0
// the count is a compile-time constant and the loop is unrolled, so what a body keeps by slot stays in
// registers.
template <int kCount, class Group, class Index, class Body>
__device__ inline void spread(const Group& group, Index count, const Body& body) {
  if constexpr (kCount > 0) {
#pragma unroll
    for (int slot = 0; slot < (kCount + Group::kSize - 1) / Group::kSize; ++slot) {
      const int index = group.rank + slot * Group::kSize;
      if ((slot + 1) * Group::kSize <= kCount || index < kCount) body(static_cast<Index>(index), slot);
    }
  } else {
#pragma unroll 1
    for (Index index = group.rank; index < count; index += Group::kSize) body(index, 0);
  }
}

// How many values a thread keeps of kCount spread over its group; at least one, so that it sizes an array.
template <int kCount, class Group>
constexpr int kSlots = kCount > 0 ? (kCount + Group::kSize - 1) / Group::kSize : 1;

}  // namespace xcos::cuda
