// Software conversions of 16-bit floats, for hosts without instructions for them. Round to nearest even; NaN
// stays NaN.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/types.h"

namespace xcos {

XCOS_HD inline float bits_to_float(uint32_t bits) {
  float out;
  memcpy(&out, &bits, sizeof(out));
  return out;
}

XCOS_HD inline uint32_t float_to_bits(float value) {
  uint32_t out;
  memcpy(&out, &value, sizeof(out));
  return out;
}

XCOS_HD inline float bf16_to_float(uint16_t h) { return bits_to_float(static_cast<uint32_t>(h) << 16); }

XCOS_HD inline uint16_t float_to_bf16(float value) {
  const uint32_t bits = float_to_bits(value);
  if (value != value) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

XCOS_HD inline float f16_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t rest = static_cast<uint32_t>(h & 0x7fffu) << 13;
  // Rebias the exponent by a multiplication, which also normalises subnormals; infinity and NaN need it
  // restored.
  float value = bits_to_float(rest) * 0x1p112f;
  if ((h & 0x7c00u) == 0x7c00u) value = bits_to_float(rest | 0x7f800000u);
  return bits_to_float(float_to_bits(value) | sign);
}

XCOS_HD inline uint16_t float_to_f16(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);   // NaN
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to infinity
  if (magnitude < 0x38800000u) {
    // Subnormal: adding 0.5 aligns the mantissa to 2^-24 and the adder rounds to nearest even.
    const float shifted = bits_to_float(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (float_to_bits(shifted) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u;
  return static_cast<uint16_t>(sign | (rounded >> 13));
}

}  // namespace xcos
