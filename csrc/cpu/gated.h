// SPDX-License-Identifier: Apache-2.0
// What is made of gate and up of one row: silu(gate) * up, as reference.silu_mul_hadamard_quant
// defines it, and the activation of reference.swigluoai_hadamard_quant.
#pragma once

#include <cstdint>
#include <limits>

#include "kernels.h"
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

// x / (1 + exp(-scaled)).
template <class S>
inline typename S::F32 gate_of(typename S::F32 x, typename S::F32 scaled) {
  const typename S::F32 one = S::set1(1.0f), sign = S::set1(-0.0f);
  return S::div(x, S::add(one, exponential<S>(S::sub(sign, scaled))));
}

// silu(g) * u, both steps rounded.
template <class S, typename Round>
inline typename S::F32 silu_mul(typename S::F32 g, typename S::F32 u, const Round& round) {
  return round(S::mul(round(gate_of<S>(g, g)), u));
}

// (u + 1) * g / (1 + exp(-1.702 g)) of clamped values, rounded once.
template <class S, typename Round>
inline typename S::F32 swigluoai(typename S::F32 g, typename S::F32 u, const Round& round) {
  constexpr float kAlpha = 1.702f, kLimit = 7.0f;  // reference.SWIGLU_ALPHA, SWIGLU_LIMIT
  g = S::clamp(g, -std::numeric_limits<float>::infinity(), kLimit);
  u = S::add(S::clamp(u, -kLimit, kLimit), S::set1(1.0f));
  return round(S::mul(u, gate_of<S>(g, S::mul(g, S::set1(kAlpha)))));
}

// The activation of whole vectors of `count` values, rounded to `dtype`; the result takes the
// gates' place.
template <class S>
inline void activate(Source source, Float dtype, int64_t count, float* gate, const float* up) {
  using F32 = typename S::F32;
  const auto of_all = [&](auto activation) SMOOTHROT_INLINE_LAMBDA {
    for (int64_t i = 0; i < count; i += S::kLanes)
      S::store(gate + i, activation(S::load(gate + i), S::load(up + i)));
  };
  const auto each = [&](auto round) SMOOTHROT_INLINE_LAMBDA {
    if (source == Source::swigluoai) {
      of_all([&](F32 g, F32 u) SMOOTHROT_INLINE_LAMBDA { return swigluoai<S>(g, u, round); });
    } else {
      of_all([&](F32 g, F32 u) SMOOTHROT_INLINE_LAMBDA { return silu_mul<S>(g, u, round); });
    }
  };
  switch (dtype) {
    case Float::f32:
      return each([](F32 v) SMOOTHROT_INLINE_LAMBDA { return v; });
    case Float::bf16:
      return each([](F32 v) SMOOTHROT_INLINE_LAMBDA { return S::round_bf16(v); });
    default:
      return each([](F32 v) SMOOTHROT_INLINE_LAMBDA { return S::round_f16(v); });
  }
}

// The activation of `count` values of q.x, whose gates begin at `gate` and whose ups at `up`; `y`
// has room for whole vectors.
template <class S>
inline void load_gated(const QuantArgs& q, int64_t gate, int64_t up, int64_t count, float* y) {
  constexpr int64_t kChunk = 256;
  float ups[kChunk] = {};
  for (int64_t i = 0; i < count; i += kChunk) {
    const int64_t size = count - i < kChunk ? count - i : kChunk;
    load_row<S>(q.x, q.dtype, gate + i, size, y + i);
    load_row<S>(q.x, q.dtype, up + i, size, ups);
    activate<S>(q.source, q.dtype, size, y + i, ups);
  }
}

}  // namespace
}  // namespace smoothrot
