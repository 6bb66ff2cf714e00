// Stands in for CUDA's cuda_runtime.h, so that kernel sources compile with a host compiler and run on the
// CPU: see
// ../README.md. Only what the kernels of this repository use; an unknown name is a compile error, not a
// guess.
#pragma once

#include <math.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct float2 {
  float x, y;
};

struct alignas(16) float4 {
  float x, y, z, w;
};

struct alignas(8) uint2 {
  uint32_t x, y;
};

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// The values are CUDA's own.
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9
};

using cudaStream_t = struct EmulatedStream*;

inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dmul_rn(double a, double b) { return a * b; }

// Of the fiber that runs.
extern dim3 threadIdx;
extern dim3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;

namespace emulator {

// address: what grant() knows the kernel by.
cudaError_t launch(const void* address, const std::function<void()>& kernel, dim3 grid, dim3 block,
                   size_t shared_bytes);

// Lets a kernel be launched with so much shared memory.
cudaError_t grant(const void* address, int bytes);

unsigned char* dynamic_shared();

// Takes effect at copy_async_wait, as late as the hardware may do it.
void copy_async(void* shared, const void* global, int bytes);
void copy_async_wait();

// Every lane of mask hands in a value and gets the one of lane ^ step.
uint64_t exchange(int operation, unsigned mask, uint64_t value, int step);

constexpr int kMmaOperation = 1000;

// The tensor cores' mma.m16n8k16 of two 16-bit types with sums in fp32, all lanes of a warp together: d += A
// B, with the fragments laid out as the PTX manual says. widen: from an element's bits to its value.
void mma_16x8x16(float (&d)[4], const uint4& a, const uint2& b, float (*widen)(uint16_t));

// An element's value from its bits; cuda_fp16.h and cuda_bf16.h know them.
template <typename T>
float widen(uint16_t bits);

// The larger halves of two words; NaN if either is.
uint32_t packed_maximum(uint32_t a, uint32_t b, float (*widen)(uint16_t));

}  // namespace emulator

void __syncthreads();
int __syncthreads_or(int predicate);
int atomicAdd(int* address, int value);
void __syncwarp(unsigned mask = 0xffffffffu);

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int step) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) <= 8, "not a type of __shfl_xor_sync");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(value));
  bits = emulator::exchange(1 + step, mask, bits, step);
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

template <class Params>
cudaError_t cudaLaunchKernel(void (*kernel)(Params), dim3 grid, dim3 block, void** arguments,
                             size_t shared_bytes, cudaStream_t) {
  const Params& params = *static_cast<const Params*>(arguments[0]);
  return emulator::launch(
      reinterpret_cast<const void*>(kernel), [&] { kernel(params); }, grid, block, shared_bytes);
}

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9
};
enum { cudaSharedmemCarveoutMaxShared = 100 };

template <class Params>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Params), cudaFuncAttribute attribute, int value) {
  if (kernel == nullptr) return cudaErrorInvalidValue;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  return emulator::grant(reinterpret_cast<const void*>(kernel), value);
}

struct cudaFuncAttributes {
  size_t sharedSizeBytes;  // of static shared memory, which no kernel has
};

template <class Params>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*)(Params)) {
  *attributes = {};
  return cudaSuccess;
}

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2 };

// Exactly as many bytes, so that AddressSanitizer sees the next one.
cudaError_t cudaMalloc(void** pointer, size_t bytes);
cudaError_t cudaFree(void* pointer);
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind);

cudaError_t cudaGetDevice(int* device);
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
const char* cudaGetErrorString(cudaError_t error);
