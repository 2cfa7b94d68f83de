// SPDX-License-Identifier: Apache-2.0
// silu(gate) * up of one row, as reference.silu_mul_hadamard_quant defines it.
#pragma once

#include <cstdint>

#include "rows.h"
#include "unroll.h"

namespace smoothrot {
namespace {

// reference._exp: plain operations in its order, so that every path rounds alike.
template <class S>
inline typename S::F32 exponential(typename S::F32 x) {
  constexpr float kCoefficients[] = {
      float(1.0 / 720), float(1.0 / 120), float(1.0 / 24), float(1.0 / 6), 0.5f, 1.0f, 1.0f};
  using F32 = typename S::F32;
  const F32 round =
      S::set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
  x = S::clamp(x, -87.0f, 88.0f);
  const F32 shifted = S::add(S::mul(x, S::set1(1.4426950408889634f)), round);
  const F32 n = S::sub(shifted, round);
  const F32 r =
      S::sub(S::sub(x, S::mul(n, S::set1(0.693359375f))), S::mul(n, S::set1(-2.12194440e-4f)));
  F32 y = S::set1(float(1.0 / 5040));
  for (const float c : kCoefficients) y = S::add(S::mul(y, r), S::set1(c));
  return S::mul(y, S::power_of_two(shifted));
}

// silu(gate) * up, both steps rounded to `dtype`, of whole vectors of `count` values; the result
// takes the gates' place.
template <class S>
inline void silu_mul(Float dtype, int64_t count, float* gate, const float* up) {
  const auto each = [&](auto round) SMOOTHROT_INLINE_LAMBDA {
    const typename S::F32 one = S::set1(1.0f), sign = S::set1(-0.0f);
    for (int64_t i = 0; i < count; i += S::kLanes) {
      const typename S::F32 g = S::load(gate + i);
      const typename S::F32 silu = round(S::div(g, S::add(one, exponential<S>(S::sub(sign, g)))));
      S::store(gate + i, round(S::mul(silu, S::load(up + i))));
    }
  };
  using F32 = typename S::F32;
  switch (dtype) {
    case Float::f32:
      return each([](F32 v) SMOOTHROT_INLINE_LAMBDA { return v; });
    case Float::bf16:
      return each([](F32 v) SMOOTHROT_INLINE_LAMBDA { return S::round_bf16(v); });
    default:
      return each([](F32 v) SMOOTHROT_INLINE_LAMBDA { return S::round_f16(v); });
  }
}

// silu(gate) * up of `count` values, whose gates begin at `gate` and whose ups at `up`; `y` has
// room for whole vectors.
template <class S>
inline void load_gated(const void* x, Float dtype, int64_t gate, int64_t up, int64_t count,
                       float* y) {
  constexpr int64_t kChunk = 256;
  float ups[kChunk] = {};
  for (int64_t i = 0; i < count; i += kChunk) {
    const int64_t size = count - i < kChunk ? count - i : kChunk;
    load_row<S>(x, dtype, gate + i, size, y + i);
    load_row<S>(x, dtype, up + i, size, ups);
    silu_mul<S>(dtype, size, y + i, ups);
  }
}

}  // namespace
}  // namespace smoothrot
