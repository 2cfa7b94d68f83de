// SPDX-License-Identifier: Apache-2.0
// The vector vocabulary of the kernels, for AVX-512 F/BW/DQ/VL/VNNI.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace smoothrot {
namespace {

struct Avx512 {
  static constexpr int kLanes = 16;
  static constexpr int kMaxRows = 14;  // 28 sums, 2 weights, 1 activation
  static constexpr bool kSumsSpans = false;
  static constexpr int kExpandFromTiles = 3;
  // Where there are more rows or fewer steps, to multiply a weight by its group's scale costs less
  // than to multiply sums.
  static constexpr int kMostRowsByGroups = 2;
  static constexpr int kFewestStepsByGroups = 512;
  using F32 = __m512;
  // Not __m512i, whose lanes are 64-bit to the compiler: it would keep each sum twice, once as
  // either type.
  using I32 = int32_t __attribute__((vector_size(64)));

  static F32 load(const float* p) { return _mm512_loadu_ps(p); }
  static F32 load_bf16(const uint16_t* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  static F32 load_f16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static void store(float* p, F32 v) { _mm512_storeu_ps(p, v); }
  static F32 round_bf16(F32 v) {
    // By integer arithmetic, to nearest even: vcvtneps2bf16 would flush subnormals.
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7FC00000));
    return _mm512_castsi512_ps(_mm512_and_si512(rounded, _mm512_set1_epi32(int32_t(0xFFFF0000))));
  }
  static F32 round_f16(F32 v) {
    return _mm512_cvtph_ps(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  static void store_rounded_bf16(uint16_t* p, F32 v) {
    const __m512i upper = _mm512_srli_epi32(_mm512_castps_si512(v), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(upper));
  }
  static void store_bf16(uint16_t* p, F32 v) { store_rounded_bf16(p, round_bf16(v)); }
  static void store_f16(uint16_t* p, F32 v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  static F32 set1(float v) { return _mm512_set1_ps(v); }
  static F32 add(F32 a, F32 b) { return _mm512_add_ps(a, b); }
  static F32 sub(F32 a, F32 b) { return _mm512_sub_ps(a, b); }
  static F32 mul(F32 a, F32 b) { return _mm512_mul_ps(a, b); }
  static F32 div(F32 a, F32 b) { return _mm512_div_ps(a, b); }
  // a0 + a1, a2 + a3 ... b0 + b1 ...
  static F32 add_neighbors(F32 a, F32 b) {
    const __m512i even =
        _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    return _mm512_add_ps(_mm512_permutex2var_ps(a, even, b), _mm512_permutex2var_ps(a, odd, b));
  }
  // NaN stays NaN.
  static F32 clamp(F32 v, float low, float high) {
    return _mm512_min_ps(_mm512_set1_ps(high), _mm512_max_ps(_mm512_set1_ps(low), v));
  }
  // 2^n, -127 < n < 128, of v = 1.5 * 2^23 + n.
  static F32 power_of_two(F32 v) {
    const __m512i exponents = _mm512_slli_epi32(_mm512_castps_si512(v), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(exponents, _mm512_set1_epi32(0x3F800000)));
  }

  // Lane i becomes v[i] + v[i ^ Stride], or v[i ^ Stride] - v[i] where bit Stride of i is set.
  template <int Stride>
  static F32 butterfly(F32 v) {
    F32 partner;
    if constexpr (Stride == 1) partner = _mm512_permute_ps(v, 0b10110001);
    if constexpr (Stride == 2) partner = _mm512_permute_ps(v, 0b01001110);
    if constexpr (Stride == 4) partner = _mm512_shuffle_f32x4(v, v, 0b10110001);
    if constexpr (Stride == 8) partner = _mm512_shuffle_f32x4(v, v, 0b01001110);
    constexpr int32_t kUpper = Stride == 1   ? 0xAAAA
                               : Stride == 2 ? 0xCCCC
                               : Stride == 4 ? 0xF0F0
                                             : 0xFF00;
    const __m512i signs = _mm512_maskz_set1_epi32(__mmask16(kUpper), INT32_MIN);
    return _mm512_add_ps(partner,
                         _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(v), signs)));
  }

  static I32 zero() { return I32{}; }
  static I32 set1(int32_t v) { return (I32)_mm512_set1_epi32(v); }
  static I32 add(I32 a, I32 b) { return a + b; }
  static F32 to_f32(I32 v) { return _mm512_cvtepi32_ps((__m512i)v); }

  // Largest |v| so far, as float bits: their integer order is that of the values, infinity then NaN
  // on top.
  static I32 max_abs_bits(I32 top, F32 v) {
    const __m512i magnitude =
        _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7FFFFFFF));
    return (I32)_mm512_max_epi32((__m512i)top, magnitude);
  }
  static int32_t reduce_max(I32 v) { return _mm512_reduce_max_epi32((__m512i)v); }
  static int32_t reduce_add(I32 v) { return _mm512_reduce_add_epi32((__m512i)v); }

  // v clamped to [low, high] and rounded to nearest even, one byte per lane.
  static void store_codes(int8_t* p, F32 v, float low, float high) {
    v = _mm512_min_ps(_mm512_max_ps(v, _mm512_set1_ps(low)), _mm512_set1_ps(high));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
  }

  static constexpr int kInterleavedSteps = 16;
  // Word s of each of `rows` <= 16 rows, `pitch` bytes apart, at words[s * rows ...], s = 0 .. 15.
  // Writes up to 16 - rows words beyond.
  static void interleave(const void* first, int64_t pitch, int64_t rows, int32_t* words) {
    const auto row = [&](int64_t r) {
      return static_cast<const char*>(first) + (r < rows ? r : rows - 1) * pitch;
    };
    __m512i columns[4][4];  // [word of a lane][rows 4 * i ... of each lane]
    for (int i = 0; i < 4; ++i) {
      const __m512i a = _mm512_loadu_si512(row(4 * i)), b = _mm512_loadu_si512(row(4 * i + 1));
      const __m512i c = _mm512_loadu_si512(row(4 * i + 2)), d = _mm512_loadu_si512(row(4 * i + 3));
      const __m512i ab = _mm512_unpacklo_epi32(a, b), cd = _mm512_unpacklo_epi32(c, d);
      const __m512i ab_high = _mm512_unpackhi_epi32(a, b), cd_high = _mm512_unpackhi_epi32(c, d);
      columns[0][i] = _mm512_unpacklo_epi64(ab, cd);
      columns[1][i] = _mm512_unpackhi_epi64(ab, cd);
      columns[2][i] = _mm512_unpacklo_epi64(ab_high, cd_high);
      columns[3][i] = _mm512_unpackhi_epi64(ab_high, cd_high);
    }
    __m512i steps[16];
    for (int c = 0; c < 4; ++c) {
      const __m512i* v = columns[c];
      const __m512i even = _mm512_shuffle_i32x4(v[0], v[1], 0x88),
                    even_high = _mm512_shuffle_i32x4(v[2], v[3], 0x88);
      const __m512i odd = _mm512_shuffle_i32x4(v[0], v[1], 0xDD),
                    odd_high = _mm512_shuffle_i32x4(v[2], v[3], 0xDD);
      steps[c] = _mm512_shuffle_i32x4(even, even_high, 0x88);
      steps[4 + c] = _mm512_shuffle_i32x4(odd, odd_high, 0x88);
      steps[8 + c] = _mm512_shuffle_i32x4(even, even_high, 0xDD);
      steps[12 + c] = _mm512_shuffle_i32x4(odd, odd_high, 0xDD);
    }
    for (int s = 0; s < 16; ++s) _mm512_storeu_si512(words + s * rows, steps[s]);
  }

  static I32 load_bytes(const void* p) { return (I32)_mm512_loadu_si512(p); }
  // Two vectors of unsigned bytes out of one of nibbles.
  static void split_nibbles(I32 packed, I32& low, I32& high) {
    const __m512i mask = _mm512_set1_epi8(0x0F);
    low = (I32)_mm512_and_si512((__m512i)packed, mask);
    high = (I32)_mm512_and_si512(_mm512_srli_epi16((__m512i)packed, 4), mask);
  }
  static void store_words(int32_t* p, I32 v) { _mm512_storeu_si512(p, (__m512i)v); }
  static I32 mul(I32 a, I32 b) { return a * b; }
  // Scales of one group, of the columns at p in low nibbles and of those sixteen further in high
  // ones.
  static void split_scales(const uint8_t* p, I32& low, I32& high) {
    const I32 both =
        (I32)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    low = both & 0x0F;
    high = both >> 4;
  }
  // A group's scale in each 16-bit half of a lane, and 128 - 8 * scale in each of its bytes.
  struct ByteFactor {
    I32 scale, rest;
  };
  static ByteFactor byte_factor(I32 scales) {
    const I32 twice = scales | scales << 16, bytes = twice | twice << 8;
    return {twice, (I32)_mm512_sub_epi8(_mm512_set1_epi8(-128), (__m512i)(bytes << 3))};
  }
  // Bytes (code + 8) of each lane to code * scale + 128: in 16-bit lanes neither the product, at
  // most 225, nor what is added to it carries from a byte to the next.
  static I32 scale_bytes(I32 codes, const ByteFactor& by) {
    const __m512i product = _mm512_mullo_epi16((__m512i)codes, (__m512i)by.scale);
    return (I32)_mm512_add_epi8(product, (__m512i)by.rest);
  }
  // sum + four products a lane: unsigned bytes of w (at most 15 for Bits == 4) times signed bytes
  // of a.
  template <int Bits>
  static I32 dot4(I32 sum, I32 w, I32 a) {
    return (I32)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)a);
  }
};

}  // namespace
}  // namespace smoothrot
