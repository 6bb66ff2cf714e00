// Times the tensor-core kernel of xcos_matrix as it was compiled into this program: one variant a program
// (variants.py).
//
//   variant PROBES GALLERY f16|bf16 SECONDS      one JSON line: launch times, and a checksum of the scores
//   variant PROBES GALLERY f16|bf16 once         one launch, to be profiled
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "cuda/matrix_mma.h"
#include "cuda/runtime.h"

namespace {

constexpr int64_t kChannels = 32, kHidden = 16, kSide = 7, kCells = kSide * kSide;

void check(int status, const char* what) {
  if (status == 0) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(static_cast<cudaError_t>(status)));
  std::exit(1);
}

// Numbers that look drawn at random and are the same in every variant.
__device__ float drawn(uint64_t index, uint64_t stream) {
  uint64_t x = (index + 1) * 0x9e3779b97f4a7c15ull + stream * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return static_cast<float>((x ^ (x >> 31)) >> 40) * 0x1p-23f - 1.0f;  // -1 .. 1
}

template <typename T>
__device__ void store(T* at, float value);
template <>
__device__ void store(float* at, float value) {
  *at = value;
}
template <>
__device__ void store(uint16_t* at,
                      float value) {  // float16 or bfloat16, by truncation of a small set of values
  *at = static_cast<uint16_t>(__float_as_uint(value) >> 16);
}

template <typename T>
__global__ void fill(T* data, int64_t count, uint64_t stream, float scale, bool f16) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * blockDim.x) {
    const float value = scale * drawn(static_cast<uint64_t>(i), stream);
    if (!f16) {
      store(data + i, value);
      continue;
    }
    // Exponent and ten bits of the fraction; values here are neither tiny nor large.
    const unsigned bits = __float_as_uint(value);
    const int exponent = static_cast<int>(bits >> 23 & 255) - 112;
    const unsigned half = exponent <= 0 ? 0u
                                        : (bits >> 16 & 0x8000u) | static_cast<unsigned>(exponent) << 10 |
                                              (bits >> 13 & 0x3ffu);
    store(data + i, __uint_as_float(half << 16));
  }
}

void* make(int64_t count, bool narrow, bool f16, uint64_t stream, float scale) {
  void* data = nullptr;
  check(cudaMalloc(&data, static_cast<size_t>(count) * (narrow ? 2 : 4)), "cudaMalloc");
  if (narrow) {
    fill<uint16_t><<<1024, 256>>>(static_cast<uint16_t*>(data), count, stream, scale, f16);
  } else {
    fill<float><<<1024, 256>>>(static_cast<float*>(data), count, stream, scale, false);
  }
  check(cudaGetLastError(), "fill");
  return data;
}

xcos::TemplateView faces(int64_t count, bool f16, uint64_t stream) {
  return {count,
          make(count * kCells * kChannels, true, f16, stream, 0.3f),  // cells of about unit length
          kCells * kChannels,
          make(count * kHidden * kCells, true, f16, stream + 1, 1.0f),
          kHidden * kCells,
          make(count * kCells, false, false, stream + 2, 1.0f),
          kCells};
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) {
    std::fprintf(stderr, "usage: %s PROBES GALLERY f16|bf16 SECONDS|once\n", argv[0]);
    return 2;
  }
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::fprintf(stderr, "no GPU\n");
    return 77;
  }
  const int64_t probes = std::atoll(argv[1]), gallery = std::atoll(argv[2]);
  const bool f16 = std::strcmp(argv[3], "f16") == 0;
  const bool once = std::strcmp(argv[4], "once") == 0;
  xcos::MatrixProblem problem = {};
  problem.channels = kChannels;
  problem.hidden = kHidden;
  problem.height = problem.width = kSide;
  problem.orders = 1;
  problem.scalar = f16 ? xcos::Scalar::f16 : xcos::Scalar::bf16;
  problem.probes = faces(probes, f16, 1);
  problem.gallery = faces(gallery, f16, 11);
  problem.weight = make(kHidden * 9, false, false, 21, 0.3f);
  problem.slope = make(1, false, false, 22, 0.25f);
  problem.temperature = 1;
  problem.normalize = xcos::Normalize::softmax;
  float* scores = nullptr;
  check(cudaMalloc(&scores, static_cast<size_t>(probes * gallery) * 4), "cudaMalloc");
  check(cudaMemset(scores, 0xff, static_cast<size_t>(probes * gallery) * 4), "cudaMemset");
  if (!xcos::cuda::matrix_mma_takes(problem)) {
    std::fprintf(stderr, "the tensor-core path does not take this problem here\n");
    return 1;
  }
  const auto launch = [&] { check(xcos::cuda::matrix_mma(problem, scores, nullptr), "matrix_mma"); };
  launch();
  check(cudaDeviceSynchronize(), "the kernel");
  if (once) return 0;

  // Scores of some pairs, to be compared between variants: NaN where nothing was written.
  std::vector<float> some(static_cast<size_t>(std::min<int64_t>(probes * gallery, 1 << 16)));
  check(cudaMemcpy(some.data(), scores, some.size() * 4, cudaMemcpyDeviceToHost), "cudaMemcpy");
  double sum = 0, magnitude = 0;
  for (float s : some) {
    sum += s;
    magnitude += std::fabs(s);
  }
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin), "cudaEventCreate");
  check(cudaEventCreate(&end), "cudaEventCreate");
  std::vector<float> times;
  const auto started = std::chrono::steady_clock::now();
  const double seconds = std::atof(argv[4]);
  while (times.size() < 7 ||
         (std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count() < seconds &&
          times.size() < 1000)) {
    check(cudaEventRecord(begin), "cudaEventRecord");
    launch();
    check(cudaEventRecord(end), "cudaEventRecord");
    check(cudaEventSynchronize(end), "the kernel");
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, begin, end), "cudaEventElapsedTime");
    times.push_back(milliseconds * 1e-3f);
  }
  std::sort(times.begin(), times.end());
  const size_t n = times.size();
  std::printf(
      "{\"probes\": %lld, \"gallery\": %lld, \"type\": \"%s\", \"rounds\": %zu, \"low\": %.9g, \"median\": "
      "%.9g, "
      "\"high\": %.9g, \"pairs_per_s\": %.6g, \"sum\": %.9g, \"magnitude\": %.9g, \"finite\": %s}\n",
      static_cast<long long>(probes), static_cast<long long>(gallery), argv[3], n, times[n / 4], times[n / 2],
      times[3 * n / 4], double(probes) * double(gallery) / times[n / 2], sum, magnitude,
      std::isfinite(sum) ? "true" : "false");
  return 0;
}
