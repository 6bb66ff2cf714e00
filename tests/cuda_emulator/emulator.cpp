// Runs one block at a time; every CUDA thread is a fiber that runs until its next barrier, shuffle or end.
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <numeric>
#include <random>
#include <set>
#include <vector>

#include "cuda_runtime.h"
#include "driver.h"

dim3 threadIdx;
dim3 blockIdx;
dim3 blockDim;
dim3 gridDim;

namespace machine {

Settings settings;
int64_t max_grid = kNoLimit;
uint64_t launches = 0;
dim3 last_grid;
dim3 last_block;
uint64_t smaller_grants = 0;
int refusal = 0;

namespace {

std::set<const void*> launched;

}  // namespace

// Where they lie in the program: equal from run to run.
std::vector<std::string> kernels() {
  std::vector<std::string> names;
  for (const void* kernel : launched) {
    names.push_back(
        std::to_string(static_cast<const char*>(kernel) - reinterpret_cast<const char*>(&kernels)));
  }
  return names;
}

size_t guard_bytes() { return 0; }  // AddressSanitizer has its own
bool takes(const std::string&) { return false; }
void begin() {}

}  // namespace machine

namespace driver {

Groups own_groups() { return {}; }

}  // namespace driver

namespace emulator {
namespace {

using machine::Order;
using machine::settings;

constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kDefaultSharedBytes = 48 * 1024;  // of a block that did not ask for more
constexpr size_t kSharedBytes = 227 * 1024;        // the most that any device grants
constexpr unsigned kWarp = 32;

struct PendingCopy {
  void* to;
  const void* from;
  int bytes;
};

enum class State { ready, at_warp_barrier, at_block_barrier, finished };

struct Fiber {
  ucontext_t context;
  void* stack = nullptr;
  void* fake_stack = nullptr;
  State state = State::ready;
  dim3 index;
  unsigned lane = 0;
  unsigned warp = 0;
  std::vector<PendingCopy> copies;
};

struct Warp {
  unsigned arrived = 0;
  unsigned mask = 0;
  int operation = 0;
  uint64_t values[kWarp];
  uint64_t results[kWarp];
  uint32_t fragments[kWarp][6];
  uint32_t ready_fragments[kWarp][6];
};

cudaError_t last_error = cudaSuccess;
std::vector<Fiber> fibers;
std::vector<Warp> warps;
unsigned threads = 0;
unsigned at_block_barrier = 0;
const char* barrier_kind = nullptr;  // of the barrier that the first thread has reached
int barrier_votes = 0;
int barrier_result = 0;
std::map<std::pair<int, const void*>, size_t> granted;  // shared memory of a kernel on a device
Fiber* current = nullptr;
ucontext_t scheduler_context;
void* scheduler_fake_stack = nullptr;
const void* scheduler_stack = nullptr;
size_t scheduler_stack_bytes = 0;
const std::function<void()>* running_kernel = nullptr;
alignas(1024) unsigned char shared_memory[kSharedBytes];

[[noreturn]] void fail(const char* message) {
  std::fprintf(stderr, "emulator: %s (block %u, thread %u)\n", message, blockIdx.x,
               current != nullptr ? current->index.x : 0u);
  std::fflush(nullptr);
  std::_Exit(86);
}

void to_scheduler(bool for_good) {
  Fiber* self = current;
  __sanitizer_start_switch_fiber(for_good ? nullptr : &self->fake_stack, scheduler_stack,
                                 scheduler_stack_bytes);
  swapcontext(&self->context, &scheduler_context);
  __sanitizer_finish_switch_fiber(self->fake_stack, nullptr, nullptr);
}

void fiber_main() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
  (*running_kernel)();
  if (!current->copies.empty()) fail("a thread ended with asynchronous copies that it never waited for");
  current->state = State::finished;
  to_scheduler(true);
}

void resume(Fiber& fiber) {
  current = &fiber;
  threadIdx = fiber.index;
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, fiber.stack, kStackBytes);
  swapcontext(&scheduler_context, &fiber.context);
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
  current = nullptr;
}

void prepare(Fiber& fiber, unsigned number) {
  if (fiber.stack == nullptr) {
    fiber.stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (fiber.stack == MAP_FAILED) fail("no memory for a fiber");
  }
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
  fiber.fake_stack = nullptr;
  fiber.state = State::ready;
  fiber.index = dim3(number % blockDim.x, number / blockDim.x % blockDim.y, number / blockDim.x / blockDim.y);
  fiber.lane = number % kWarp;
  fiber.warp = number / kWarp;
}

void run_block(size_t shared_bytes, std::mt19937_64& random) {
  ASAN_UNPOISON_MEMORY_REGION(shared_memory, kSharedBytes);
  std::memset(shared_memory, 0xff, kSharedBytes);  // NaN in every floating-point type
  ASAN_POISON_MEMORY_REGION(shared_memory + shared_bytes, kSharedBytes - shared_bytes);
  for (unsigned i = 0; i < threads; ++i) prepare(fibers[i], i);
  for (Warp& warp : warps) warp.arrived = 0;
  at_block_barrier = 0;

  std::vector<unsigned> turns(threads);
  std::iota(turns.begin(), turns.end(), 0u);
  if (settings.order == Order::reverse) std::reverse(turns.begin(), turns.end());
  unsigned finished = 0;
  const auto run_all = [&](size_t begin, size_t end) {
    bool progress = false;
    for (size_t k = begin; k < end; ++k) {
      Fiber& fiber = fibers[turns[k]];
      if (fiber.state != State::ready) continue;
      resume(fiber);
      progress = true;
      if (fiber.state == State::finished) ++finished;
    }
    return progress;
  };
  while (finished < threads) {
    bool progress = false;
    if (settings.order == Order::shuffled) {
      // One turn of a warp drawn at random, or all it can take until a barrier of the block.
      std::vector<size_t> order(warps.size());
      std::iota(order.begin(), order.end(), size_t{0});
      std::shuffle(order.begin(), order.end(), random);
      for (size_t warp : order) {
        const size_t begin = warp * kWarp, end = std::min<size_t>(begin + kWarp, threads);
        std::shuffle(turns.begin() + long(begin), turns.begin() + long(end), random);
        const bool far = random() % 2 == 0;
        while (run_all(begin, end)) {
          progress = true;
          if (!far) break;
        }
        if (progress) break;
      }
    } else {
      // A warp runs as far ahead of the others as barriers of the block let it.
      for (size_t begin = 0; begin < threads; begin += kWarp) {
        while (run_all(begin, std::min<size_t>(begin + kWarp, threads))) progress = true;
      }
    }
    if (!progress) fail("deadlock: threads wait at a barrier that others do not reach");
  }
  ASAN_UNPOISON_MEMORY_REGION(shared_memory, kSharedBytes);
}

int most_shared() { return settings.shared_bytes != 0 ? settings.shared_bytes : int(kSharedBytes); }

cudaError_t refuse(cudaError_t error) {
  last_error = error;
  return error;
}

}  // namespace

cudaError_t grant(const void* kernel, int bytes) {
  if (bytes < 0 || bytes > most_shared()) return refuse(cudaErrorInvalidValue);
  size_t& grant = granted[{settings.device, kernel}];
  if (size_t(bytes) < grant) ++machine::smaller_grants;
  grant = size_t(bytes);
  return cudaSuccess;
}

cudaError_t launch(const void* address, const std::function<void()>& kernel, dim3 grid, dim3 block,
                   size_t shared_bytes) {
  driver::Mirror::upload_all();
  ++machine::launches;
  machine::last_grid = grid;
  machine::last_block = block;
  machine::launched.insert(address);
  if (settings.refuse_next) {
    settings.refuse_next = false;
    machine::refusal = cudaErrorInvalidConfiguration;
    return refuse(cudaErrorInvalidConfiguration);
  }
  const bool empty =
      grid.x == 0 || grid.y == 0 || grid.z == 0 || block.x == 0 || block.y == 0 || block.z == 0;
  if (empty || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    return refuse(cudaErrorInvalidConfiguration);
  if (block.x > 1024 || block.y > 1024 || block.z > 64) return refuse(cudaErrorInvalidConfiguration);
  if (uint64_t{block.x} * block.y * block.z > 1024) return refuse(cudaErrorInvalidConfiguration);
  const auto found = granted.find({settings.device, address});
  const size_t most = found == granted.end() ? kDefaultSharedBytes : found->second;
  if (shared_bytes > std::max(most, kDefaultSharedBytes)) return refuse(cudaErrorInvalidValue);

  gridDim = grid;
  blockDim = block;
  threads = block.x * block.y * block.z;
  if (fibers.size() < threads) fibers.resize(threads);
  warps.assign((threads + kWarp - 1) / kWarp, Warp{});
  running_kernel = &kernel;
  std::mt19937_64 random(settings.seed);
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        run_block(shared_bytes, random);
      }
    }
  }
  return cudaSuccess;
}

unsigned char* dynamic_shared() { return shared_memory; }

void copy_async(void* shared, const void* global, int bytes) {
  const unsigned char* to = static_cast<unsigned char*>(shared);
  if (to < shared_memory || to >= shared_memory + kSharedBytes)
    fail("asynchronous copy to non-shared memory");
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % unsigned(bytes) != 0) {
    fail("asynchronous copy is not aligned");
  }
  current->copies.push_back({shared, global, bytes});
}

void copy_async_wait() {
  for (const PendingCopy& copy : current->copies) std::memcpy(copy.to, copy.from, size_t(copy.bytes));
  current->copies.clear();
}

uint64_t exchange(int operation, unsigned mask, uint64_t value, int step) {
  Fiber& self = *current;
  Warp& warp = warps[self.warp];
  const unsigned lanes = std::min(kWarp, threads - self.warp * kWarp);
  const unsigned existing = lanes == kWarp ? 0xffffffffu : (1u << lanes) - 1;
  if ((mask & ~existing) != 0) fail("a warp operation names lanes that do not exist");
  if ((mask >> self.lane & 1u) == 0) fail("a warp operation whose mask lacks the calling lane");
  if (step >= int(kWarp) || (mask >> (self.lane ^ unsigned(step)) & 1u) == 0) {
    fail("a shuffle from a lane outside the mask");
  }
  if (warp.arrived == 0) {
    warp.operation = operation;
    warp.mask = mask;
  } else if (warp.operation != operation || warp.mask != mask) {
    fail("lanes of a warp diverged: they wait at different warp operations");
  }
  warp.values[self.lane] = value;
  warp.arrived |= 1u << self.lane;
  if (warp.arrived == mask) {
    // Nobody can overwrite results before all lanes have read them: the next exchange needs them all.
    std::copy(warp.values, warp.values + kWarp, warp.results);
    warp.arrived = 0;
    for (unsigned lane = 0; lane < lanes; ++lane) {
      Fiber& other = fibers[self.warp * kWarp + lane];
      if ((mask >> lane & 1u) != 0) other.state = State::ready;
    }
  } else {
    self.state = State::at_warp_barrier;
    to_scheduler(false);
  }
  return warp.results[self.lane ^ unsigned(step)];
}

uint32_t packed_maximum(uint32_t a, uint32_t b, float (*widen)(uint16_t)) {
  uint32_t out = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const uint16_t left = uint16_t(a >> shift), right = uint16_t(b >> shift);
    const float x = widen(left), y = widen(right);
    const uint16_t larger = std::isnan(x) || std::isnan(y) ? 0x7fff : x > y ? left : right;
    out |= uint32_t(larger) << shift;
  }
  return out;
}

void mma_16x8x16(float (&d)[4], const uint4& a, const uint2& b, float (*widen)(uint16_t)) {
  Fiber& self = *current;
  Warp& warp = warps[self.warp];
  const uint32_t own[6] = {a.x, a.y, a.z, a.w, b.x, b.y};
  std::copy(own, own + 6, warp.fragments[self.lane]);
  // The last lane to come finds everybody's fragments; nobody can replace them before all lanes are through,
  // because that takes another operation of the whole warp.
  if (__builtin_popcount(warp.arrived) == int(kWarp) - 1) {
    std::memcpy(warp.ready_fragments, warp.fragments, sizeof(warp.fragments));
  }
  exchange(kMmaOperation, 0xffffffffu, 0, 0);
  const auto element = [&](unsigned lane, int word, unsigned half) {
    return widen(uint16_t(warp.ready_fragments[lane][word] >> 16 * half));
  };
  for (unsigned out = 0; out < 4; ++out) {
    const unsigned row = self.lane / 4 + (out >= 2 ? 8 : 0), column = self.lane % 4 * 2 + out % 2;
    for (unsigned k = 0; k < 16; ++k) {
      const float left = element(row % 8 * 4 + k % 8 / 2, int(row / 8 + k / 8 * 2), k % 2);
      const float right = element(column * 4 + k % 8 / 2, 4 + int(k / 8), k % 2);
      d[out] += left * right;
    }
  }
}

}  // namespace emulator

using namespace emulator;

void __syncwarp(unsigned mask) { exchange(0, mask, 0, 0); }

static int block_barrier(const char* kind, int vote) {
  if (at_block_barrier == 0) {
    barrier_kind = kind;
    barrier_votes = 0;
  } else if (barrier_kind != kind) {
    fail("threads of a block diverged: they wait at different kinds of barriers");
  }
  barrier_votes |= vote;
  if (++at_block_barrier == threads) {
    at_block_barrier = 0;
    barrier_result = barrier_votes;
    for (unsigned i = 0; i < threads; ++i) fibers[i].state = State::ready;
  } else {
    current->state = State::at_block_barrier;
    to_scheduler(false);
  }
  // Nobody can change it before all threads have read it: that takes another barrier.
  return barrier_result;
}

static const char kPlainBarrier[] = "plain";
static const char kVoteBarrier[] = "vote";

void __syncthreads() { block_barrier(kPlainBarrier, 0); }

int __syncthreads_or(int predicate) { return block_barrier(kVoteBarrier, predicate != 0); }

int atomicAdd(int* address, int value) {
  const int old = *address;
  *address += value;
  return old;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = settings.multiprocessors != 0 ? settings.multiprocessors : 132;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = (settings.capability != 0 ? settings.capability : 90) / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = (settings.capability != 0 ? settings.capability : 90) % 10;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = most_shared();
      break;
  }
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = settings.device;
  return cudaSuccess;
}

// Beyond what AddressSanitizer allocates: address space that is filled only where somebody writes.
static std::map<void*, size_t> reserved;

cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  if (bytes < (size_t{1} << 30)) {
    *pointer = std::malloc(bytes);
    return *pointer == nullptr ? refuse(cudaErrorMemoryAllocation) : cudaSuccess;
  }
  void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) return refuse(cudaErrorMemoryAllocation);
  reserved[*pointer = at] = bytes;
  return cudaSuccess;
}

cudaError_t cudaFree(void* pointer) {
  const auto found = reserved.find(pointer);
  if (found == reserved.end()) {
    std::free(pointer);
  } else {
    munmap(pointer, found->second);
    reserved.erase(found);
  }
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  if (bytes > 0) std::memcpy(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

cudaError_t cudaPeekAtLastError() { return last_error; }

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
  }
  return "unrecognized error code";
}
