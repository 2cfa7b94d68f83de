// SPDX-License-Identifier: Apache-2.0
// Where the values of a row come from: eight at a time, as float32.
#pragma once

#include "device.h"
#include "launch.h"

namespace smoothrot::cuda {

constexpr int kVector = 8;

enum class Source { plain, silu_mul };

// `first` is a multiple of kVector.
SMOOTHROT_DEVICE void split_vector(const Words4& words, Float dtype, float (&y)[kVector]) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const auto half = uint16_t(words.word[i / 2] >> (16 * (i % 2)));
    y[i] = dtype == Float::bf16 ? bf16_float(half) : f16_float(half);
  }
}

SMOOTHROT_DEVICE void load_vector(const void* x, Float dtype, int64_t first, float (&y)[kVector]) {
  if (dtype != Float::f32) {
    split_vector(
        load_global(reinterpret_cast<const Words4*>(static_cast<const uint16_t*>(x) + first)),
        dtype, y);
    return;
  }
  const auto* words = reinterpret_cast<const Words4*>(static_cast<const float*>(x) + first);
  const Words4 half[2] = {load_global(words), load_global(words + 1)};
#pragma unroll
  for (int i = 0; i < kVector; ++i) y[i] = bits_float(half[i / 4].word[i % 4]);
}

// reference._exp: |error| below two units in the last place, the same bits everywhere.
SMOOTHROT_DEVICE float exponential(float x) {
  constexpr float kCoefficients[] = {1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 1.0 / 2, 1.0, 1.0};
  x = clamp(x, -87.0f, 88.0f);
  const float n = round_to_even(multiply(x, 1.4426950408889634f));
  const float r = subtract(subtract(x, multiply(n, 0.693359375f)), multiply(n, -2.12194440e-4f));
  float y = float(1.0 / 5040);
#pragma unroll
  for (const float coefficient : kCoefficients) y = add(multiply(y, r), coefficient);
  return multiply(y, bits_float(uint32_t(int32_t(n) + 127) << 23));
}

SMOOTHROT_DEVICE float round_to(Float dtype, float value) {
  if (dtype == Float::bf16) return bf16_float(float_bf16(value));
  return dtype == Float::f16 ? f16_float(float_f16(value)) : value;
}

template <Source S>
SMOOTHROT_DEVICE void load_values(const QuantArgs& q, int64_t row, int first, float (&y)[kVector]) {
  if constexpr (S == Source::plain) {
    load_vector(q.x, q.dtype, row * q.inputs + first, y);
  } else {
    float up[kVector];
    load_vector(q.x, q.dtype, row * 2 * q.inputs + first, y);
    load_vector(q.x, q.dtype, (row * 2 + 1) * q.inputs + first, up);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float silu = round_to(q.dtype, divide(y[i], add(1.0f, exponential(-y[i]))));
      y[i] = round_to(q.dtype, multiply(silu, up[i]));
    }
  }
}

}  // namespace smoothrot::cuda
