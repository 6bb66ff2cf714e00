// What the files of the driver share: memory with guards, comparisons, counters.
#pragma once

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "core/types.h"
#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

namespace driver {

using xcos::Scalar;

using Random = std::mt19937_64;

const char* const kScalarNames[] = {"f16", "bf16", "f32", "f64"};

constexpr Scalar kScalars[] = {Scalar::f16, Scalar::bf16, Scalar::f32, Scalar::f64};

inline int64_t failures = 0;
inline int64_t cases = 0;
inline std::string current_case;

__attribute__((format(printf, 1, 2))) inline void complain(const char* format, ...) {
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

// Exactly as large as what it holds, so that AddressSanitizer sees the first byte beyond; full of 0xff, a NaN
// of every type, until written.
class Memory {
 public:
  Memory() = default;
  Memory(int64_t count, Scalar scalar, bool unaligned = false) : scalar_(scalar) {
    const int64_t size = xcos::scalar_size(scalar);
    bytes_.reset(static_cast<unsigned char*>(std::malloc(size_t((count + unaligned) * size))));
    length_ = size_t((count + unaligned) * size);
    std::memset(bytes_.get(), 0xff, length_);
    data_ = bytes_.get() + (unaligned ? size : 0);
  }

  void* data() const { return data_; }
  double at(int64_t index) const { return get(scalar_, data_, index); }
  void put(int64_t index, double value) const { set(scalar_, data_, index, value); }
  bool untouched(int64_t index) const {
    const int64_t size = xcos::scalar_size(scalar_);
    const unsigned char* at = data_ + index * size;
    return std::all_of(at, at + size, [](unsigned char byte) { return byte == 0xff; });
  }
  std::vector<unsigned char> copy() const { return {bytes_.get(), bytes_.get() + length_}; }

 private:
  struct Free {
    void operator()(unsigned char* p) const { std::free(p); }
  };
  Scalar scalar_ = Scalar::f32;
  std::unique_ptr<unsigned char, Free> bytes_;
  size_t length_ = 0;
  unsigned char* data_ = nullptr;
};

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

template <typename T, size_t kCount>
T pick(Random& random, const T (&values)[kCount]) {
  return values[random() % kCount];
}

using Groups = std::map<std::string, void (*)()>;

// Groups of the other files.
Groups matrix_groups();
Groups matrix_backward_groups();
Groups topk_groups();
Groups match_groups();
Groups head_groups();

}  // namespace driver
