// What the files of the driver share: memory with guards, comparisons, counters.
#pragma once

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "core/types.h"
#include "cuda/runtime.h"
#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"
#include "machine.h"
#include "memory.h"

namespace driver {

using xcos::Scalar;

using Random = std::mt19937_64;

const char* const kScalarNames[] = {"f16", "bf16", "f32", "f64"};

constexpr Scalar kScalars[] = {Scalar::f16, Scalar::bf16, Scalar::f32, Scalar::f64};

inline int64_t failures = 0;
inline int64_t cases = 0;
inline std::string current_case;

__attribute__((format(printf, 1, 2))) inline void complain(const char* format, ...) {
  static std::mutex mutex;  // of groups with threads
  const std::lock_guard<std::mutex> lock(mutex);
  if (++failures <= 20) {
    va_list list;
    va_start(list, format);
    std::fprintf(stderr, "FAILED %s: ", current_case.c_str());
    std::vfprintf(stderr, format, list);
    std::fputc('\n', stderr);
    va_end(list);
  }
}

inline double get(Scalar scalar, const void* data, int64_t index) {
  switch (scalar) {
    case Scalar::f16:
      return __half2float(static_cast<const __half*>(data)[index]);
    case Scalar::bf16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[index]);
    case Scalar::f32:
      return static_cast<const float*>(data)[index];
    default:
      return static_cast<const double*>(data)[index];
  }
}

inline void set(Scalar scalar, void* data, int64_t index, double value) {
  switch (scalar) {
    case Scalar::f16:
      static_cast<__half*>(data)[index] = __float2half_rn(float(value));
      break;
    case Scalar::bf16:
      static_cast<__nv_bfloat16*>(data)[index] = __float2bfloat16_rn(float(value));
      break;
    case Scalar::f32:
      static_cast<float*>(data)[index] = float(value);
      break;
    default:
      static_cast<double*>(data)[index] = value;
  }
}

// Elements of one of the operators' types on the device. put() counts until the next launch, at() after it.
class Memory {
 public:
  Memory() = default;
  Memory(int64_t count, Scalar scalar, bool unaligned = false)
      : scalar_(scalar), first_(unaligned ? 1 : 0), size_(xcos::scalar_size(scalar)) {
    storage_ = std::make_shared<Storage>(size_t((count + first_) * size_));
  }

  void* data() const { return storage_ == nullptr ? nullptr : storage_->device() + first_ * size_; }
  double at(int64_t index) const { return get(scalar_, storage_->read(), first_ + index); }
  void put(int64_t index, double value) const { set(scalar_, storage_->write(), first_ + index, value); }
  bool untouched(int64_t index) const {
    const unsigned char* at = storage_->read() + (first_ + index) * size_;
    return std::all_of(at, at + size_, [](unsigned char byte) { return byte == 0xff; });
  }
  std::vector<unsigned char> copy() const {
    if (storage_ == nullptr) return {};
    const unsigned char* at = storage_->read();
    return {at, at + storage_->length()};
  }
  const std::shared_ptr<Storage>& storage() const { return storage_; }

 private:
  Scalar scalar_ = Scalar::f32;
  int64_t first_ = 0;
  int64_t size_ = 0;
  std::shared_ptr<Storage> storage_;
};

// What every case does first: as many blocks as there is work for.
inline void plainly() {
  machine::settings.order = machine::Order::forward;
  machine::settings.multiprocessors = 0;
  machine::max_grid = machine::kNoLimit;
}

// And once more: in another order of the threads, with 1 .. `grids` blocks, which are as large as on a device
// that a few of them fill. The same bits have to come out.
inline void otherwise(uint64_t seed, uint64_t grids = 3) {
  machine::settings.order = seed % 2 == 0 ? machine::Order::reverse : machine::Order::shuffled;
  machine::settings.seed = seed;
  machine::settings.multiprocessors = 1;
  machine::max_grid = 1 + int64_t(seed % grids);
}

// The short form of a group, for sanitizers of a GPU: of all cases with one key, the first.
inline bool shortened = false;

inline bool take(const std::string& key) {
  static std::set<std::string> taken;
  return !shortened || taken.insert(key).second;
}

// Calls of an operator on memory of its own, for groups that launch otherwise than one after the other.
struct Task {
  std::string name;
  std::function<int(xcos::cuda::Stream)> launch;
  std::vector<std::shared_ptr<Storage>> outputs;
};

// Every operator, on problems whose size depends on the variant, 0 .. 3.
std::vector<Task> tasks(int variant);
void add_pair_tasks(std::vector<Task>& all, int variant);
void add_matrix_tasks(std::vector<Task>& all, int variant);
void add_matrix_backward_tasks(std::vector<Task>& all, int variant);
void add_topk_tasks(std::vector<Task>& all, int variant);
void add_match_tasks(std::vector<Task>& all, int variant);
void add_head_tasks(std::vector<Task>& all, int variant);

// |got - expected| is bounded by absolute + relative |expected|; NaN only where NaN is expected.
inline void compare(const char* what, int64_t pair, int64_t index, double got, double expected,
                    double absolute, double relative) {
  if (std::isnan(expected) && std::isnan(got)) return;
  if (!(std::fabs(got - expected) <= absolute + relative * std::fabs(expected)) && got != expected) {
    complain("%s[%" PRId64 ", %" PRId64 "] is %.9g, expected %.9g", what, pair, index, got, expected);
  }
}

inline void expect(bool condition, const char* what) {
  ++cases;
  if (!condition) complain("%s", what);
}

// After settings.refuse_next: the launcher's answer is that of the launch.
inline void expect_refused(int status) {
  ++cases;
  if (status != 0 && status == machine::refusal) return;
  complain("the launch error is returned: got %d, the launch returned %d", status, machine::refusal);
}

template <typename T, size_t kCount>
T pick(Random& random, const T (&values)[kCount]) {
  return values[random() % kCount];
}

using Groups = std::map<std::string, void (*)()>;

// What the emulator's limits of a launch have to be, and a GPU's are: part of group "launch".
void check_limits();

// Groups of the other files; own_groups: what only a GPU can run.
Groups own_groups();
Groups matrix_groups();
Groups matrix_backward_groups();
Groups topk_groups();
Groups match_groups();
Groups head_groups();

}  // namespace driver
