// SPDX-License-Identifier: Apache-2.0
// Residual addition and RMS norm of one row, in the order of additions that
// reference.rms_norm_quant defines.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels.h"
#include "rows.h"

namespace smoothrot {
namespace {

constexpr int64_t kNormAccumulators = 2048;  // reference.NORM_ACCUMULATORS

// The vector at accumulator i of `count` values y, followed by zeros up to a whole vector.
template <class S>
SMOOTHROT_INLINE typename S::F32 squares(const float* y, int64_t count, int64_t i) {
  typename S::F32 sum = S::set1(0.0f);
  for (; i < count; i += kNormAccumulators) {
    const typename S::F32 value = S::load(y + i);
    sum = S::add(sum, S::mul(value, value));
  }
  return sum;
}

// 2^Depth vectors of accumulators from i on, neighbors added pairwise Depth times: one vector.
// Stores are what costs here.
template <class S, int Depth>
SMOOTHROT_INLINE typename S::F32 add_pairwise(const float* y, int64_t count, int64_t i) {
  if constexpr (Depth == 0) {
    return squares<S>(y, count, i);
  } else {
    constexpr int64_t half = S::kLanes << (Depth - 1);
    return S::add_neighbors(add_pairwise<S, Depth - 1>(y, count, i),
                            add_pairwise<S, Depth - 1>(y, count, i + half));
  }
}

template <class S>
inline float sum_of_squares(const float* y, int64_t count) {
  constexpr int kDepth = 3;
  alignas(64) float sums[kNormAccumulators >> kDepth];
  // Accumulators that stay zero change no sum: those of a narrow row are left out.
  int64_t width = kNormAccumulators;
  while (width / 2 >= count && width > S::kLanes << kDepth) width /= 2;
  for (int64_t i = 0; i < width; i += S::kLanes << kDepth)
    S::store(sums + (i >> kDepth), add_pairwise<S, kDepth>(y, count, i));
  width >>= kDepth;
  for (; width > S::kLanes; width /= 2) {
    for (int64_t i = 0; i < width; i += 2 * S::kLanes) {
      S::store(sums + i / 2, S::add_neighbors(S::load(sums + i), S::load(sums + i + S::kLanes)));
    }
  }
  for (width /= 2; width >= 1; width /= 2) {
    for (int64_t i = 0; i < width; ++i) sums[i] = sums[2 * i] + sums[2 * i + 1];
  }
  return sums[0];
}

template <class S, Float D>
inline void load_normed_values(const QuantArgs& q, int64_t row, float* y) {
  using Row = Elements<S, D>;
  using F32 = typename S::F32;
  // In variables of its own: the compiler could not know that the stores below leave q alone.
  const void *const x = q.x, *const weight = q.norm_args.weight;
  void* const residual = q.norm_args.residual;
  const int64_t inputs = q.inputs, first = row * inputs;
  if (residual) {
    for_vectors<S>(inputs, [&](int64_t i, int64_t left) SMOOTHROT_INLINE_LAMBDA {
      const F32 sum = S::add(Row::load(x, first + i, left), Row::load(residual, first + i, left));
      S::store(y + i, Row::store_rounding(residual, first + i, left, sum));
    });
  } else {
    for_vectors<S>(inputs, [&](int64_t i, int64_t left) SMOOTHROT_INLINE_LAMBDA {
      S::store(y + i, Row::load(x, first + i, left));
    });
  }
  const float mean = sum_of_squares<S>(y, inputs) * float(1.0 / double(inputs));
  const F32 inverse = S::set1(1.0f / std::sqrt(mean + q.norm_args.epsilon));
  if (weight) {
    for_vectors<S>(inputs, [&](int64_t i, int64_t left) SMOOTHROT_INLINE_LAMBDA {
      S::store(y + i, S::mul(S::mul(S::load(y + i), inverse), Row::load(weight, i, left)));
    });
  } else {
    for_vectors<S>(inputs, [&](int64_t i, int64_t) SMOOTHROT_INLINE_LAMBDA {
      S::store(y + i, S::mul(S::load(y + i), inverse));
    });
  }
}

// Row `row` of x, after the addition to the residual, normed; `y` has room for whole vectors.
template <class S>
inline void load_normed_row(const QuantArgs& q, int64_t row, float* y) {
  switch (q.dtype) {
    case Float::f32:
      return load_normed_values<S, Float::f32>(q, row, y);
    case Float::bf16:
      return load_normed_values<S, Float::bf16>(q, row, y);
    default:
      return load_normed_values<S, Float::f16>(q, row, y);
  }
}

}  // namespace
}  // namespace smoothrot
