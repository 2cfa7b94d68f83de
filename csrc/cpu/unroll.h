// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <utility>

#define SMOOTHROT_INLINE __attribute__((always_inline)) inline
#define SMOOTHROT_INLINE_LAMBDA __attribute__((always_inline))

namespace smoothrot {
namespace {

template <typename F, std::size_t... I>
SMOOTHROT_INLINE void unroll_indices(const F& f, std::index_sequence<I...>) {
  (f(std::integral_constant<int, int(I)>{}), ...);
}

// f(0) ... f(Count - 1) with indices known at compile time, so that arrays indexed by them live in
// registers.
template <int Count, typename F>
SMOOTHROT_INLINE void unroll(const F& f) {
  unroll_indices(f, std::make_index_sequence<Count>{});
}

}  // namespace
}  // namespace smoothrot
