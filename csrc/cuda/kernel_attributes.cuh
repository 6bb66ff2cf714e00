// Attributes of kernels that a device is told once. They belong to the kernel, not to a launch: what one
// thread sets, the launches of all others see, so nothing here depends on the problem at hand.
#pragma once

#include <atomic>
#include <cstdint>

#include "cuda/device.cuh"
#include "cuda/runtime.h"

namespace xcos::cuda {

constexpr int64_t kDefaultShared = 48 * 1024;

// Runs prepare(device) unless `prepared`, a bit for each device, says that it has succeeded before. Threads
// that come first together all run it. Devices beyond the 64th are prepared every time.
template <class Prepare>
Status once_per_device(std::atomic<uint64_t>& prepared, const Prepare& prepare) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    const uint64_t bit = device >= 0 && device < 64 ? uint64_t{1} << device : 0;
    if ((prepared.load(std::memory_order_acquire) & bit) != 0) return 0;
    error = prepare(device);
    if (error == cudaSuccess) prepared.fetch_or(bit, std::memory_order_release);
  }
  // A refusal must not be reported again by whoever asks next.
  if (error != cudaSuccess) static_cast<void>(cudaGetLastError());
  return static_cast<Status>(error);
}

// Before kKernel is launched with so many bytes of shared memory. Blocks have to ask for more than 48 KB;
// what is granted then is all that a block of the current device may have, whatever the launch needs: a
// smaller grant would be taken from a launch of another thread.
template <auto kKernel>
Status allow_shared(int64_t bytes) {
  if (bytes <= kDefaultShared) return 0;
  static std::atomic<uint64_t> prepared{0};
  return once_per_device(prepared, [](int device) {
    int most = 0;
    cudaFuncAttributes attributes = {};
    cudaError_t error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kKernel);
    if (error != cudaSuccess) return error;
    return cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                most - static_cast<int>(attributes.sharedSizeBytes));
  });
}

// Says that kKernel's blocks live on shared memory: the split between L1 and shared memory is otherwise the
// driver's guess. A hint, so its failure is no error.
template <auto kKernel>
void prefer_shared_memory() {
  static std::atomic<uint64_t> prepared{0};
  static_cast<void>(once_per_device(prepared, [](int) {
    if (cudaFuncSetAttribute(kKernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                             cudaSharedmemCarveoutMaxShared) != cudaSuccess) {
      static_cast<void>(cudaGetLastError());
    }
    return cudaSuccess;
  }));
}

}  // namespace xcos::cuda
