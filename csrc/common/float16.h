// SPDX-License-Identifier: Apache-2.0
// The two 16-bit floats as integers, for code that has no instruction for them.
#pragma once

#include <cstdint>
#include <cstring>

namespace smoothrot {

static inline float f32_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

static inline uint32_t f32_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

static inline float bf16_to_f32(uint16_t half) { return f32_from_bits(uint32_t{half} << 16); }

static inline uint16_t f32_to_bf16(float value) {
  if (value != value) return 0x7FC0;
  const uint32_t bits = f32_bits(value);
  return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

static inline float f16_to_f32(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16;
  const uint32_t magnitude = half & 0x7FFF;
  if (magnitude >= 0x7C00) return f32_from_bits(sign | 0x7F800000 | (magnitude & 0x3FF) << 13);
  // Placed in float32's exponent field the value is too small by 2^112, subnormals included: scale
  // it back.
  const float value = f32_from_bits(magnitude << 13) * f32_from_bits(0x77800000);
  return f32_from_bits(f32_bits(value) | sign);
}

static inline uint16_t f32_to_f16(float value) {
  const uint16_t sign = uint16_t(f32_bits(value) >> 16 & 0x8000);
  const uint32_t magnitude = f32_bits(value) & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) return uint16_t(sign | 0x7E00);
  if (magnitude >= 0x477FF000) return uint16_t(sign | 0x7C00);  // rounds past 65504
  if (magnitude < 0x38800000) {  // subnormal: adding 0.5 puts its last place at 2^-24
    return uint16_t(sign | (f32_bits(f32_from_bits(magnitude) + 0.5f) - 0x3F000000));
  }
  const uint32_t rounded = magnitude + 0xFFF + (magnitude >> 13 & 1);
  return uint16_t(sign | (rounded - 0x38000000) >> 13);
}

}  // namespace smoothrot
