// SPDX-License-Identifier: Apache-2.0
// The vector vocabulary of the kernels, for AVX2 with FMA and F16C. See simd_avx512.h for what each
// word means.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace smoothrot {
namespace {

struct Avx2 {
  static constexpr int kLanes = 8;
  static constexpr int kMaxRows = 6;  // 12 sums, 2 weights, activation, product
  static constexpr bool kSumsSpans = true;
  static constexpr int kExpandFromTiles = 4;
  using F32 = __m256;
  using I32 = __m256i;

  static F32 load(const float* p) { return _mm256_loadu_ps(p); }
  static F32 load_bf16(const uint16_t* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  static F32 load_f16(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static void store(float* p, F32 v) { _mm256_storeu_ps(p, v); }
  static F32 round_bf16(F32 v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    const __m256 nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
    const __m256i upper = _mm256_and_si256(rounded, _mm256_set1_epi32(int32_t(0xFFFF0000)));
    return _mm256_blendv_ps(_mm256_castsi256_ps(upper),
                            _mm256_castsi256_ps(_mm256_set1_epi32(0x7FC00000)), nan);
  }
  static F32 round_f16(F32 v) {
    return _mm256_cvtph_ps(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  static void store_rounded_bf16(uint16_t* p, F32 v) {
    const __m256i out = _mm256_srli_epi32(_mm256_castps_si256(v), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(out, out), 0b1000);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
  static void store_bf16(uint16_t* p, F32 v) { store_rounded_bf16(p, round_bf16(v)); }
  static void store_f16(uint16_t* p, F32 v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  static F32 set1(float v) { return _mm256_set1_ps(v); }
  static F32 add(F32 a, F32 b) { return _mm256_add_ps(a, b); }
  static F32 sub(F32 a, F32 b) { return _mm256_sub_ps(a, b); }
  static F32 mul(F32 a, F32 b) { return _mm256_mul_ps(a, b); }
  static F32 div(F32 a, F32 b) { return _mm256_div_ps(a, b); }
  // a0 + a1, a2 + a3 ... b0 + b1 ...
  static F32 add_neighbors(F32 a, F32 b) {
    const __m256d pairs = _mm256_castps_pd(_mm256_hadd_ps(a, b));
    return _mm256_castpd_ps(_mm256_permute4x64_pd(pairs, 0b11011000));
  }
  static F32 clamp(F32 v, float low, float high) {
    return _mm256_min_ps(_mm256_set1_ps(high), _mm256_max_ps(_mm256_set1_ps(low), v));
  }
  static F32 power_of_two(F32 v) {
    const __m256i exponents = _mm256_slli_epi32(_mm256_castps_si256(v), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(exponents, _mm256_set1_epi32(0x3F800000)));
  }

  template <int Stride>
  static F32 butterfly(F32 v) {
    F32 partner;
    if constexpr (Stride == 1) partner = _mm256_permute_ps(v, 0b10110001);
    if constexpr (Stride == 2) partner = _mm256_permute_ps(v, 0b01001110);
    if constexpr (Stride == 4) partner = _mm256_permute2f128_ps(v, v, 1);
    const auto sign = [](int lane) { return lane & Stride ? INT32_MIN : 0; };
    const __m256 signs = _mm256_castsi256_ps(
        _mm256_setr_epi32(sign(0), sign(1), sign(2), sign(3), sign(4), sign(5), sign(6), sign(7)));
    return _mm256_add_ps(partner, _mm256_xor_ps(v, signs));
  }

  static I32 zero() { return _mm256_setzero_si256(); }
  static I32 set1(int32_t v) { return _mm256_set1_epi32(v); }
  static I32 add(I32 a, I32 b) { return _mm256_add_epi32(a, b); }
  static F32 to_f32(I32 v) { return _mm256_cvtepi32_ps(v); }

  static I32 max_abs_bits(I32 top, F32 v) {
    return _mm256_max_epi32(
        top, _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7FFFFFFF)));
  }
  static int32_t reduce_max(I32 v) {
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0b01001110));
    return _mm_cvtsi128_si32(_mm_max_epi32(m, _mm_shuffle_epi32(m, 0b10110001)));
  }
  static int32_t reduce_add(I32 v) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0b01001110));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0b10110001)));
  }

  static void store_codes(int8_t* p, F32 v, float low, float high) {
    v = _mm256_min_ps(_mm256_max_ps(v, _mm256_set1_ps(low)), _mm256_set1_ps(high));
    const __m256i words = _mm256_cvtps_epi32(v);
    const __m256i pairs = _mm256_packs_epi32(words, words);
    const __m256i bytes = _mm256_packs_epi16(pairs, pairs);
    const __m256i joined =
        _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 0, 4, 0, 4, 0, 4));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(joined));
  }

  static constexpr int kInterleavedSteps = 0;  // tiles are too low to gain by it

  static I32 load_bytes(const void* p) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(p));
  }
  static void split_nibbles(I32 packed, I32& low, I32& high) {
    const __m256i mask = _mm256_set1_epi8(0x0F);
    low = _mm256_and_si256(packed, mask);
    high = _mm256_and_si256(_mm256_srli_epi16(packed, 4), mask);
  }
  static void store_words(int32_t* p, I32 v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v);
  }
  // Of the eight columns at p in low nibbles and of those sixteen further in high ones, in both
  // halves of a lane.
  static void split_scales(const uint8_t* p, I32& low, I32& high) {
    int64_t bytes;
    std::memcpy(&bytes, p, sizeof(bytes));
    const auto lane = [](int c) { return int(0x80008000u | uint32_t(c) << 16 | uint32_t(c)); };
    const I32 both = _mm256_shuffle_epi8(
        _mm256_set1_epi64x(bytes),
        _mm256_setr_epi32(lane(0), lane(1), lane(2), lane(3), lane(4), lane(5), lane(6), lane(7)));
    low = _mm256_and_si256(both, _mm256_set1_epi16(0x0F));
    high = _mm256_srli_epi16(both, 4);
  }

  // Sums over a span in 16-bit lanes, two a column: 8 steps of 2 products of at most 15 * 128 take
  // 15 bits once the start has joined them, however they wrap in between.
  static I32 dot_pairs(I32 sums, I32 w, I32 a) {
    sums = _mm256_add_epi16(sums, _mm256_maddubs_epi16(w, a));
    // Otherwise GCC adds the products of several steps before, and runs out of registers.
    asm("" : "+x"(sums));
    return sums;
  }
  // total + scale * both halves of each lane of sums; scales are in both halves too.
  static I32 fold_pairs(I32 total, I32 sums, I32 scales) {
    return _mm256_add_epi32(total, _mm256_madd_epi16(sums, scales));
  }
  static int32_t start_pairs(const int8_t* codes, int32_t offset) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), load_bytes(codes));
    __m128i sums = _mm_add_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    sums = _mm_add_epi16(sums, _mm_shuffle_epi32(sums, 0b01001110));
    sums = _mm_add_epi16(sums, _mm_shuffle_epi32(sums, 0b10110001));
    return _mm_cvtsi128_si32(_mm_mullo_epi16(sums, _mm_set1_epi16(int16_t(-offset))));
  }

  template <int Bits>
  static I32 dot4(I32 sum, I32 w, I32 a) {
    if constexpr (Bits == 4) {
      // Pairs stay below 2 * 15 * 128, far from vpmaddubsw's saturation.
      return _mm256_add_epi32(sum,
                              _mm256_madd_epi16(_mm256_maddubs_epi16(w, a), _mm256_set1_epi16(1)));
    } else {
      // 255 * 128 * 2 would saturate there: widen both sides to 16 bits, even and odd bytes apart.
      const __m256i even = _mm256_madd_epi16(_mm256_and_si256(w, _mm256_set1_epi16(0xFF)),
                                             _mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8));
      const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(w, 8), _mm256_srai_epi16(a, 8));
      return _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
    }
  }
};

}  // namespace
}  // namespace smoothrot
