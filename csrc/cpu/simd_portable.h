// SPDX-License-Identifier: Apache-2.0
// The vector vocabulary of the kernels in the vector extensions of GCC and Clang: four lanes on
// whatever the target's baseline is. See simd_avx512.h for what each word means.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../common/float16.h"

namespace smoothrot {
namespace {

struct Portable {
  static constexpr int kLanes = 4;
  static constexpr int kMaxRows = 4;
  static constexpr bool kSumsSpans = false;
  static constexpr int kExpandFromTiles = 0;  // never
  static constexpr int kMostRowsByGroups = kMaxRows;
  static constexpr int kFewestStepsByGroups = 0;
  using F32 = float __attribute__((vector_size(16)));
  using I32 = int32_t __attribute__((vector_size(16)));
  using I16 = int16_t __attribute__((vector_size(16)));
  using U16 = uint16_t __attribute__((vector_size(16)));

  static F32 load(const float* p) { return load_as<F32>(p); }
  static F32 load_bf16(const uint16_t* p) {
    return F32{bf16_to_f32(p[0]), bf16_to_f32(p[1]), bf16_to_f32(p[2]), bf16_to_f32(p[3])};
  }
  static F32 load_f16(const uint16_t* p) {
    return F32{f16_to_f32(p[0]), f16_to_f32(p[1]), f16_to_f32(p[2]), f16_to_f32(p[3])};
  }
  static void store(float* p, F32 v) { std::memcpy(p, &v, sizeof(v)); }
  static F32 round_bf16(F32 v) {
    for (int i = 0; i < kLanes; ++i) v[i] = bf16_to_f32(f32_to_bf16(v[i]));
    return v;
  }
  static F32 round_f16(F32 v) {
    for (int i = 0; i < kLanes; ++i) v[i] = f16_to_f32(f32_to_f16(v[i]));
    return v;
  }
  static void store_bf16(uint16_t* p, F32 v) {
    for (int i = 0; i < kLanes; ++i) p[i] = f32_to_bf16(v[i]);
  }
  static void store_rounded_bf16(uint16_t* p, F32 v) { store_bf16(p, v); }
  static void store_f16(uint16_t* p, F32 v) {
    for (int i = 0; i < kLanes; ++i) p[i] = f32_to_f16(v[i]);
  }
  static F32 set1(float v) { return F32{v, v, v, v}; }
  static F32 add(F32 a, F32 b) { return a + b; }
  static F32 sub(F32 a, F32 b) { return a - b; }
  static F32 mul(F32 a, F32 b) { return a * b; }
  static F32 div(F32 a, F32 b) { return a / b; }
  // a0 + a1, a2 + a3, b0 + b1, b2 + b3
  static F32 add_neighbors(F32 a, F32 b) {
    return F32{a[0] + a[1], a[2] + a[3], b[0] + b[1], b[2] + b[3]};
  }
  static F32 clamp(F32 v, float low, float high) {
    v = v < low ? set1(low) : v;
    return v > high ? set1(high) : v;
  }
  static F32 power_of_two(F32 v) {
    return reinterpret_cast<F32>((reinterpret_cast<I32>(v) << 23) + 0x3F800000);
  }

  template <int Stride>
  static F32 butterfly(F32 v) {
    if constexpr (Stride == 1) return F32{v[0] + v[1], v[0] - v[1], v[2] + v[3], v[2] - v[3]};
    if constexpr (Stride == 2) return F32{v[0] + v[2], v[1] + v[3], v[0] - v[2], v[1] - v[3]};
  }

  static I32 zero() { return I32{}; }
  static I32 set1(int32_t v) { return I32{v, v, v, v}; }
  static I32 add(I32 a, I32 b) { return a + b; }
  static F32 to_f32(I32 v) { return __builtin_convertvector(v, F32); }

  static I32 max_abs_bits(I32 top, F32 v) {
    const I32 bits = reinterpret_cast<I32>(v) & 0x7FFFFFFF;
    return bits > top ? bits : top;
  }
  static int32_t reduce_max(I32 v) {
    int32_t top = v[0];
    for (int i = 1; i < kLanes; ++i) top = v[i] > top ? v[i] : top;
    return top;
  }
  static int32_t reduce_add(I32 v) { return v[0] + v[1] + v[2] + v[3]; }

  static void store_codes(int8_t* p, F32 v, float low, float high) {
    v = v < low ? set1(low) : v;
    v = v > high ? set1(high) : v;
    // Adding and taking back 1.5 * 2^23 rounds to nearest even: |v| is far below 2^22.
    const F32 magic = set1(12582912.0f);
    const I32 codes = __builtin_convertvector((v + magic) - magic, I32);
    for (int i = 0; i < kLanes; ++i) p[i] = int8_t(codes[i]);
  }

  static constexpr int kInterleavedSteps = 0;  // tiles are too low to gain by it

  static I32 load_bytes(const void* p) { return load_as<I32>(p); }
  static void split_nibbles(I32 packed, I32& low, I32& high) {
    low = packed & 0x0F0F0F0F;
    high = (packed >> 4) & 0x0F0F0F0F;
  }
  static void store_words(int32_t* p, I32 v) { std::memcpy(p, &v, sizeof(v)); }
  static I32 mul(I32 a, I32 b) { return a * b; }
  static void split_scales(const uint8_t* p, I32& low, I32& high) {
    const I32 both = {p[0], p[1], p[2], p[3]};
    low = both & 0x0F;
    high = both >> 4;
  }
  template <int Bits>
  static I32 dot4(I32 sum, I32 w, I32 a) {
    // Sixteen-bit lanes, even and odd bytes apart; a product of an unsigned and a signed byte fits.
    const I16 even = reinterpret_cast<I16>(w & 0x00FF00FF) * ((reinterpret_cast<I16>(a) << 8) >> 8);
    const I16 odd =
        reinterpret_cast<I16>(reinterpret_cast<U16>(w) >> 8) * (reinterpret_cast<I16>(a) >> 8);
    if constexpr (Bits == 4) return sum + both_halves(even + odd);
    return sum + (both_halves(even) + both_halves(odd));
  }

 private:
  template <typename V>
  static V load_as(const void* p) {
    V v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
  // The sum of the two signed 16-bit halves of each lane.
  static I32 both_halves(I16 v) {
    const I32 words = reinterpret_cast<I32>(v);
    return ((words << 16) >> 16) + (words >> 16);
  }
};

}  // namespace
}  // namespace smoothrot
