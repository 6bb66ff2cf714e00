// Stands in for CUDA's cuda_fp16.h; conversions round to nearest even, as the intrinsics of the same name do.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};

struct __half2 {
  __half x, y;
};

inline float __half2float(__half h) {
  const uint32_t sign = uint32_t(h.bits & 0x8000u) << 16;
  const uint32_t exponent = (h.bits >> 10) & 0x1fu;
  const uint32_t fraction = h.bits & 0x3ffu;
  if (exponent == 0) {
    const float magnitude = float(fraction) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  const uint32_t wide = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
  float out;
  std::memcpy(&out, &wide, sizeof(out));
  return out;
}

inline __half __float2half_rn(float value) {
  uint32_t wide;
  std::memcpy(&wide, &value, sizeof(wide));
  const uint16_t sign = uint16_t((wide >> 16) & 0x8000u);
  const uint32_t magnitude = wide & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {0x7fff};
  if (magnitude >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // 65520 and more
  if (magnitude < 0x38800000u) {
    // Below 2^-14 the unit is 2^-24: adding 0.5 makes the float's own rounding do the work.
    float absolute;
    std::memcpy(&absolute, &magnitude, sizeof(absolute));
    const float shifted = absolute + 0.5f;
    uint32_t bits;
    std::memcpy(&bits, &shifted, sizeof(bits));
    return {uint16_t(sign | (bits - 0x3f000000u))};
  }
  const uint32_t odd = (magnitude >> 13) & 1u;
  return {uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + odd) >> 13))};
}

inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline float2 __half22float2(__half2 h) { return {__half2float(h.x), __half2float(h.y)}; }

template <>
inline float emulator::widen<__half>(uint16_t bits) {
  return __half2float({bits});
}
