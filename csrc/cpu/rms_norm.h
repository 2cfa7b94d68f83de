// SPDX-License-Identifier: Apache-2.0
// Residual addition and RMS norm of one row, in the order of additions that reference.rms_norm_quant defines.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels.h"
#include "rows.h"

namespace smoothrot {
namespace {

constexpr int64_t kNormLanes = 256;  // reference.NORM_LANES
constexpr int64_t kNormVector = 8;   // reference.NORM_VECTOR

inline float sum_of_squares(const float* y, int64_t count) {
  float sums[kNormLanes] = {};
  for (int64_t first = 0; first < count; first += kNormLanes * kNormVector) {
    const int64_t left = (count - first) / kNormVector;
    const int64_t lanes = left < kNormLanes ? left : kNormLanes;
    for (int64_t t = 0; t < lanes; ++t) {
      const float* vector = y + first + t * kNormVector;
      for (int64_t i = 0; i < kNormVector; ++i) sums[t] += vector[i] * vector[i];
    }
  }
  for (int64_t n = kNormLanes / 2; n >= 1; n /= 2) {
    for (int64_t i = 0; i < n; ++i) sums[i] = sums[2 * i] + sums[2 * i + 1];
  }
  return sums[0];
}

// Row `row` of x, after the addition to the residual, normed; `y` has room for whole vectors.
template <class S>
inline void load_normed_row(const QuantArgs& q, int64_t row, float* y) {
  constexpr int64_t kChunk = 256;
  float other[kChunk] = {};
  const auto in_chunks = [&](const void* from, int64_t first, const auto& combine) SMOOTHROT_INLINE_LAMBDA {
    for (int64_t i = 0; i < q.inputs; i += kChunk) {
      const int64_t size = q.inputs - i < kChunk ? q.inputs - i : kChunk;
      load_row<S>(from, q.dtype, first + i, size, other);
      for (int64_t j = 0; j < size; j += S::kLanes) {
        S::store(y + i + j, combine(S::load(y + i + j), S::load(other + j)));
      }
    }
  };
  const int64_t first = row * q.inputs;
  load_row<S>(q.x, q.dtype, first, q.inputs, y);
  if (q.norm_args.residual) {
    using F32 = typename S::F32;
    in_chunks(q.norm_args.residual, first, [](F32 a, F32 b) SMOOTHROT_INLINE_LAMBDA { return S::add(a, b); });
    store_row<S>(q.norm_args.residual, q.dtype, first, q.inputs, y);
    load_row<S>(q.norm_args.residual, q.dtype, first, q.inputs, y);
  }
  const float mean = sum_of_squares(y, q.inputs) * float(1.0 / double(q.inputs));
  const typename S::F32 inverse = S::set1(1.0f / std::sqrt(mean + q.norm_args.epsilon));
  for (int64_t i = 0; i < q.inputs; i += S::kLanes) S::store(y + i, S::mul(S::load(y + i), inverse));
  if (q.norm_args.weight) {
    using F32 = typename S::F32;
    in_chunks(q.norm_args.weight, 0, [](F32 a, F32 b) SMOOTHROT_INLINE_LAMBDA { return S::mul(a, b); });
  }
}

}  // namespace
}  // namespace smoothrot
