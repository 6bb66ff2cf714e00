#include "planted.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <set>
#include <vector>

#include "cuda/device.cuh"
#include "cuda/xcos_matrix.h"
#include "cuda_runtime.h"
#include "matrix_case.h"

namespace {

struct Params {
  float* data;
  int count;
};

using xcos::cuda::copy_async;
using xcos::cuda::copy_async_wait;

__device__ float* shared() { return reinterpret_cast<float*>(xcos::cuda::dynamic_shared()); }

__global__ void shared_overflow(Params p) {
  shared()[threadIdx.x + 1] = 1.0f;  // one past the end in the last thread
  p.data[threadIdx.x] = shared()[threadIdx.x];
}

__global__ void global_overflow(Params p) { p.data[threadIdx.x + (threadIdx.x == 63 ? 1 : 0)] = 1.0f; }

__global__ void global_overread(Params p) {
  float sum = 0;
  for (int i = 0; i <= p.count; ++i) sum += p.data[i];
  p.data[threadIdx.x] = sum;
}

__global__ void divergent_barrier(Params p) {
  if (threadIdx.x != 5) __syncthreads();
  p.data[threadIdx.x] = 1.0f;
}

__global__ void divergent_shuffle(Params p) {
  float value = p.data[threadIdx.x];
  if (threadIdx.x % 2 == 0) {
    value += __shfl_xor_sync(0xffffffffu, value, 1);
  } else {
    __syncwarp();
  }
  p.data[threadIdx.x] = value;
}

__global__ void wrong_mask(Params) { __syncwarp(0x0000ffffu); }

__global__ void missing_wait(Params p) { copy_async<4>(shared() + threadIdx.x, p.data + threadIdx.x); }

__global__ void misaligned_copy(Params p) {
  copy_async<16>(shared(), p.data + 1);
  copy_async_wait();
}

__global__ void misaligned_load(Params p) {
  struct alignas(16) Vector {
    float v[4];
  };
  p.data[0] = reinterpret_cast<const Vector*>(p.data + 1)->v[0];
}

// Lane l reads what lane l + 1 writes. Caught by the value, in one of the two orders.
__global__ void missing_barrier(Params p) {
  shared()[threadIdx.x] = float(threadIdx.x);
  p.data[threadIdx.x] = shared()[(threadIdx.x + 1) % 64];
}

// The same, the other way round: lane l overwrites what lane l + 1 has yet to read.
__global__ void missing_second_barrier(Params p) {
  shared()[threadIdx.x] = float(threadIdx.x);
  __syncthreads();
  const float value = shared()[(threadIdx.x + 1) % 64];
  shared()[threadIdx.x] = -1.0f;
  p.data[threadIdx.x] = value;
}

// One lane stays away from the tensor cores.
__global__ void divergent_product(Params p) {
  float sums[4] = {};
  if (threadIdx.x != 5) xcos::cuda::multiply_tiles<__half>(sums, make_uint4(1, 2, 3, 4), make_uint2(5, 6));
  p.data[threadIdx.x] = sums[0];
}

__global__ void mixed_barriers(Params p) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    p.data[threadIdx.x] = float(__syncthreads_or(1));
  }
}

// Those that also end, and leave the machine alone, on a GPU without a sanitizer: kNative.
const std::set<std::string> kNative = {"divergent-barrier",     "global-overflow",  "global-overread",
                                       "missing-barrier",       "missing-face-mma", "missing-face-plain",
                                       "missing-second-barrier"};

const std::map<std::string, void (*)(Params)> kKernels = {
    {"shared-overflow", shared_overflow},
    {"global-overflow", global_overflow},
    {"global-overread", global_overread},
    {"divergent-barrier", divergent_barrier},
    {"divergent-product", divergent_product},
    {"divergent-shuffle", divergent_shuffle},
    {"wrong-mask", wrong_mask},
    {"missing-wait", missing_wait},
    {"mixed-barriers", mixed_barriers},
    {"misaligned-copy", misaligned_copy},
    {"misaligned-load", misaligned_load},
    {"missing-barrier", missing_barrier},
    {"missing-second-barrier", missing_second_barrier},
};

// The real kernels, told of one gallery face more than there is: they have to be seen reading beyond the
// memory.
void score_one_face_too_many(xcos::Scalar scalar) {
  driver::MatrixCase c;
  c.scalar = scalar;
  c.gallery = 16;
  driver::MatrixData data(c);
  data.problem.gallery.faces = 17;
  const driver::Memory scores(c.probes * 17, data.result);
  static_cast<void>(xcos::cuda::xcos_matrix(data.problem, scores.data(), nullptr));
  static_cast<void>(scores.copy());  // waits
}

const std::map<std::string, xcos::Scalar> kFaces = {{"missing-face-mma", xcos::Scalar::f16},
                                                    {"missing-face-plain", xcos::Scalar::f32}};

}  // namespace

std::vector<std::string> planted_names() {
  std::vector<std::string> names;
  for (const auto& [name, kernel] : kKernels) names.push_back(name);
  for (const auto& [name, scalar] : kFaces) names.push_back(name);
  if (!machine::kEmulated) {
    const auto unfit = [](const std::string& name) { return kNative.count(name) == 0; };
    names.erase(std::remove_if(names.begin(), names.end(), unfit), names.end());
  }
  std::sort(names.begin(), names.end());
  return names;
}

void run_planted(const std::string& name) {
  if (kFaces.count(name) != 0) {
    score_one_face_too_many(kFaces.at(name));
    return;
  }
  std::vector<unsigned char> first;
  for (machine::Order order : {machine::Order::forward, machine::Order::reverse}) {
    machine::settings.order = order;
    const driver::Memory data(64, xcos::Scalar::f32);
    for (int64_t i = 0; i < 64; ++i) data.put(i, 1.0);
    Params params = {static_cast<float*>(data.data()), 64};
    void* arguments[] = {&params};
    if (cudaLaunchKernel(kKernels.at(name), dim3(1), dim3(64), arguments, 64 * sizeof(float), nullptr) !=
        cudaSuccess) {
      std::fprintf(stderr, "the launch was refused\n");
      std::exit(3);
    }
    const std::vector<unsigned char> bytes = data.copy();
    if (first.empty()) {
      first = bytes;
    } else if (machine::kEmulated && first != bytes) {
      std::fprintf(stderr, "the result depends on the order of the threads\n");
      std::exit(87);
    }
  }
}
