// SPDX-License-Identifier: Apache-2.0
// Rows of any of the three float types as float32, and back.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../common/float16.h"
#include "../common/types.h"
#include "unroll.h"

namespace smoothrot {
namespace {

inline float load_scalar(const void* x, Float dtype, int64_t i) {
  switch (dtype) {
    case Float::f32:
      return static_cast<const float*>(x)[i];
    case Float::bf16:
      return bf16_to_f32(static_cast<const uint16_t*>(x)[i]);
    default:
      return f16_to_f32(static_cast<const uint16_t*>(x)[i]);
  }
}

// Values [first, first + count) as float32.
template <class S>
inline void load_row(const void* x, Float dtype, int64_t first, int64_t count, float* y) {
  const auto convert = [&](auto load) SMOOTHROT_INLINE_LAMBDA {
    int64_t i = 0;
    for (; i + S::kLanes <= count; i += S::kLanes) S::store(y + i, load(first + i));
    for (; i < count; ++i) y[i] = load_scalar(x, dtype, first + i);
  };
  const auto* halves = static_cast<const uint16_t*>(x);
  switch (dtype) {
    case Float::f32:
      return convert([&](int64_t i) { return S::load(static_cast<const float*>(x) + i); });
    case Float::bf16:
      return convert([&](int64_t i) { return S::load_bf16(halves + i); });
    default:
      return convert([&](int64_t i) { return S::load_f16(halves + i); });
  }
}

// Calls work(i, values left) for each vector of a row; for whole ones the second is a constant to
// the compiler.
template <class S, typename F>
SMOOTHROT_INLINE void for_vectors(int64_t count, const F& work) {
  int64_t i = 0;
  for (; i + S::kLanes <= count; i += S::kLanes) work(i, int64_t{S::kLanes});
  if (i < count) work(i, count - i);
}

// A vector of values of type D at index i, of which `left` exist; the others read as zero and are
// not written.
template <class S, Float D>
struct Elements {
  using F32 = typename S::F32;
  using Type = std::conditional_t<D == Float::f32, float, uint16_t>;

  static SMOOTHROT_INLINE F32 load(const void* x, int64_t i, int64_t left) {
    const Type* from = static_cast<const Type*>(x) + i;
    Type tail[S::kLanes] = {};
    if (left < S::kLanes)
      from = static_cast<const Type*>(std::memcpy(tail, from, size_t(left) * sizeof(Type)));
    if constexpr (D == Float::f32) {
      return S::load(from);
    } else if constexpr (D == Float::bf16) {
      return S::load_bf16(from);
    } else {
      return S::load_f16(from);
    }
  }

  // Returns what is stored.
  static SMOOTHROT_INLINE F32 store_rounding(void* x, int64_t i, int64_t left, F32 value) {
    Type* const to = static_cast<Type*>(x) + i;
    Type tail[S::kLanes];
    Type* const at = left < S::kLanes ? tail : to;
    if constexpr (D == Float::f32) {
      S::store(at, value);
    } else if constexpr (D == Float::bf16) {
      value = S::round_bf16(value);
      S::store_rounded_bf16(at, value);
    } else {
      value = S::round_f16(value);
      S::store_f16(at, value);
    }
    if (left < S::kLanes) std::memcpy(to, tail, size_t(left) * sizeof(Type));
    return value;
  }
};

}  // namespace
}  // namespace smoothrot
