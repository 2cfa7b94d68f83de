// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "device.h"

namespace smoothrot::cuda {

template <int Stride, int Count>
SMOOTHROT_DEVICE void butterfly_stage(float (&v)[Count]) {
#pragma unroll
  for (int i = 0; i < Count; ++i) {
    if (i & Stride) continue;
    const float a = v[i], b = v[i + Stride];
    v[i] = add(a, b);
    v[i + Stride] = subtract(a, b);
  }
}

template <int Count>
SMOOTHROT_DEVICE void butterflies(float (&v)[Count]) {
  butterfly_stage<1>(v);
  if constexpr (Count > 2) butterfly_stage<2>(v);
  if constexpr (Count > 4) butterfly_stage<4>(v);
}

// Strides 1 .. 2^(stages - 1) only.
SMOOTHROT_DEVICE void butterflies(float (&v)[8], int stages) {
  if (stages > 0) butterfly_stage<1>(v);
  if (stages > 1) butterfly_stage<2>(v);
  if (stages > 2) butterfly_stage<4>(v);
}

}  // namespace smoothrot::cuda
