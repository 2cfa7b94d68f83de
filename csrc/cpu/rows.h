// SPDX-License-Identifier: Apache-2.0
// Rows of any of the three float types as float32, and back.
#pragma once

#include <cstdint>
#include <cstring>

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

// Values [first, first + count) of x, rounded to its dtype; `y` has room for whole vectors.
template <class S>
inline void store_row(void* x, Float dtype, int64_t first, int64_t count, const float* y) {
  if (dtype == Float::f32) {
    std::memcpy(static_cast<float*>(x) + first, y, size_t(count) * sizeof(float));
    return;
  }
  auto* halves = static_cast<uint16_t*>(x) + first;
  for (int64_t i = 0; i < count; i += S::kLanes) {
    uint16_t rounded[S::kLanes];
    dtype == Float::bf16 ? S::store_bf16(rounded, S::load(y + i)) : S::store_f16(rounded, S::load(y + i));
    const int64_t left = count - i < S::kLanes ? count - i : S::kLanes;
    std::memcpy(halves + i, rounded, size_t(left) * sizeof(uint16_t));
  }
}

}  // namespace
}  // namespace smoothrot
