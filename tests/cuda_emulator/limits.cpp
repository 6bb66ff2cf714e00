// The limits of a launch: the emulator has to refuse what a GPU refuses.
#include "driver.h"

namespace driver {
namespace {

struct Nothing {
  int unused;
};

__global__ void nothing(Nothing) {}

}  // namespace

void check_limits() {
  Nothing none = {0};
  void* arguments[] = {&none};
  const auto launch = [&](dim3 grid, dim3 block, size_t shared) {
    const cudaError_t error = cudaLaunchKernel(nothing, grid, block, arguments, shared, nullptr);
    static_cast<void>(cudaGetLastError());
    return error;
  };
  // Which error it is differs from driver to driver.
  const auto refused = [](cudaError_t error, cudaError_t expected) {
    return machine::kEmulated ? error == expected : error != cudaSuccess;
  };
  const auto refuses = [&](dim3 grid, dim3 block, const char* what) {
    expect(refused(launch(grid, block, 0), cudaErrorInvalidConfiguration), what);
  };
  expect(launch(dim3(2), dim3(1024), 48 * 1024) == cudaSuccess, "the largest block runs");
  refuses(dim3(0), dim3(32), "an empty grid is refused");
  refuses(dim3(0x80000000u), dim3(32), "grid.x beyond 2^31 - 1");
  refuses(dim3(1, 65536), dim3(32), "grid.y beyond 65535");
  refuses(dim3(1, 1, 65536), dim3(32), "grid.z beyond 65535");
  refuses(dim3(1), dim3(1025), "more than 1024 threads");
  refuses(dim3(1), dim3(512, 4), "more than 1024 threads in all");
  expect(refused(launch(dim3(1), dim3(32), 48 * 1024 + 1), cudaErrorInvalidValue),
         "more than 48 KB of shared memory");
  int most = 0;
  expect(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0) == cudaSuccess,
         "attribute");
  const auto grant = [](int bytes) {
    return cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  };
  expect(grant(60 * 1024) == cudaSuccess, "more is granted on request");
  expect(launch(dim3(1), dim3(32), 60 * 1024) == cudaSuccess, "what was granted");
  expect(refused(launch(dim3(1), dim3(32), 60 * 1024 + 1), cudaErrorInvalidValue), "more than was granted");
  expect(refused(grant(most + 1), cudaErrorInvalidValue), "more than the device has");
  static_cast<void>(cudaGetLastError());
}

}  // namespace driver
