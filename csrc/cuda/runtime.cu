#include <cuda_runtime.h>

#include "cuda/runtime.h"

namespace xcos::cuda {

const char* error_string(Status status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

std::vector<int> compiled_architectures() {
#if defined(__CUDA_ARCH_LIST__)
  // nvcc's own list, in units of a tenth: 750, 800, 900.
  std::vector<int> list = {__CUDA_ARCH_LIST__};
  for (int& architecture : list) architecture /= 10;
  return list;
#else
  return {};
#endif
}

}  // namespace xcos::cuda
