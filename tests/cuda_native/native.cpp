// The machine of the driver is a GPU. The linker leads the CUDA functions that launchers call through hooks
// here
// (--wrap): the kernels' objects are those of any build, and tests can still see and steer launches.
#include "native.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>

#include "driver.h"

extern "C" {
cudaError_t __real_cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t);
cudaError_t __real_cudaFuncSetAttribute(const void*, cudaFuncAttribute, int);
cudaError_t __real_cudaFuncGetAttributes(cudaFuncAttributes*, const void*);
cudaError_t __real_cudaDeviceGetAttribute(int*, cudaDeviceAttr, int);
cudaError_t __real_cudaGetDevice(int*);
cudaError_t __real_cudaMalloc(void**, size_t);
cudaError_t __real_cudaFree(void*);
cudaError_t __real_cudaMemcpy(void*, const void*, size_t, cudaMemcpyKind);
}

namespace machine {

Settings settings;
int64_t max_grid = kNoLimit;
uint64_t launches = 0;
dim3 last_grid;
dim3 last_block;
uint64_t smaller_grants = 0;
int refusal = 0;

namespace {

std::mutex mutex;  // of what follows
std::set<const void*> launched;
std::map<const void*, int> granted;

bool exact = false;  // no guards: a sanitizer looks at the bounds
bool dry = false;    // no GPU is touched: what the host's part costs
bool passive = false;

}  // namespace

Passive::Passive() {
  driver::Mirror::upload_all();
  if (!dry) static_cast<void>(cudaDeviceSynchronize());  // other streams do not wait for the copies
  passive = true;
}

Passive::~Passive() {
  if (!dry) static_cast<void>(cudaDeviceSynchronize());
  passive = false;
  ++launches;  // whoever reads has to fetch
}

std::vector<std::string> kernels() {
  std::vector<std::string> names;
  for (const void* kernel : launched) {
    const char* name = nullptr;
    if (!dry && cudaFuncGetName(&name, kernel) == cudaSuccess) names.push_back(name);
  }
  std::sort(names.begin(), names.end());
  return names;
}

size_t guard_bytes() { return exact ? 0 : 256; }

bool takes(const std::string& argument) {
  exact = exact || argument == "--exact";
  dry = dry || argument == "--dry";
  return argument == "--exact" || argument == "--dry";
}

void begin() {
  if (dry) return;
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess && count > 0) return;
  std::fprintf(stderr, "no GPU: %s\n", error == cudaSuccess ? "none is visible" : cudaGetErrorString(error));
  std::exit(77);
}

}  // namespace machine

extern "C" {

cudaError_t __wrap_cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments,
                                    size_t shared, cudaStream_t stream) {
  {
    const std::lock_guard<std::mutex> lock(machine::mutex);
    machine::launched.insert(kernel);
  }
  bool refuse = false;
  if (!machine::passive) {
    driver::Mirror::upload_all();
    ++machine::launches;
    machine::last_grid = grid;
    machine::last_block = block;
    // CUDA itself refuses more threads than any block may have.
    refuse = machine::settings.refuse_next;
    if (refuse) block.x = 4096;
    machine::settings.refuse_next = false;
  }
  const cudaError_t error = machine::dry
                                ? refuse ? cudaErrorInvalidConfiguration : cudaSuccess
                                : __real_cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
  if (refuse) machine::refusal = error;
  return error;
}

cudaError_t __wrap_cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  const cudaError_t error =
      machine::dry ? cudaSuccess : __real_cudaFuncSetAttribute(kernel, attribute, value);
  if (error == cudaSuccess && attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    const std::lock_guard<std::mutex> lock(machine::mutex);
    int& grant = machine::granted[kernel];
    if (value < grant) ++machine::smaller_grants;
    grant = value;
  }
  return error;
}

cudaError_t __wrap_cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  if (!machine::dry) return __real_cudaFuncGetAttributes(attributes, kernel);
  *attributes = {};
  return cudaSuccess;
}

// Of an older device, or a smaller one, as the settings want it.
cudaError_t __wrap_cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  const machine::Settings& settings = machine::settings;
  const int capability = settings.capability != 0 ? settings.capability : machine::dry ? 90 : 0;
  const int shared = settings.shared_bytes != 0 ? settings.shared_bytes : machine::dry ? 227 * 1024 : 0;
  const int multiprocessors = settings.multiprocessors != 0 ? settings.multiprocessors
                              : machine::dry                ? 132
                                                            : 0;
  if (attribute == cudaDevAttrComputeCapabilityMajor && capability != 0) {
    *value = capability / 10;
  } else if (attribute == cudaDevAttrComputeCapabilityMinor && capability != 0) {
    *value = capability % 10;
  } else if (attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin && shared != 0) {
    *value = shared;
  } else if (attribute == cudaDevAttrMultiProcessorCount && multiprocessors != 0) {
    *value = multiprocessors;
  } else {
    return __real_cudaDeviceGetAttribute(value, attribute, device);
  }
  return cudaSuccess;
}

cudaError_t __wrap_cudaGetDevice(int* device) {
  if (!machine::dry) return __real_cudaGetDevice(device);
  *device = 0;
  return cudaSuccess;
}

cudaError_t __wrap_cudaMalloc(void** pointer, size_t bytes) {
  if (!machine::dry) return __real_cudaMalloc(pointer, bytes);
  *pointer = std::malloc(bytes);
  return cudaSuccess;
}

cudaError_t __wrap_cudaFree(void* pointer) {
  if (!machine::dry) return __real_cudaFree(pointer);
  std::free(pointer);
  return cudaSuccess;
}

cudaError_t __wrap_cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  if (!machine::dry) return __real_cudaMemcpy(to, from, bytes, kind);
  if (bytes > 0) std::memcpy(to, from, bytes);
  return cudaSuccess;
}

}  // extern "C"
