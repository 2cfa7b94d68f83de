// SPDX-License-Identifier: Apache-2.0
// The weighted sum of what a token's experts give it. Each value is one thread's, which adds in the
// order it is told: without atomics, so that the same tokens give the same bits every time.
#pragma once

#include "gemm_common.h"

namespace smoothrot::cuda {

constexpr int kCombineThreads = 256;
constexpr int64_t kMostCombineBlocks = 65535;

SMOOTHROT_KERNEL(kCombineThreads)
combine_rows(const CombineArgs c) {
  const int64_t token = block_index_x(),
                column = int64_t{block_index_y()} * kCombineThreads + thread_index();
  if (column >= c.outputs) return;
  float sum = 0.0f;
  for (int64_t k = token * c.top_k; k < (token + 1) * c.top_k; ++k) {
    const int32_t source = load_global(c.sources + k);
    const bool known = source >= 0 && source < c.row_count;
    const float row =
        known ? load_global(c.rows + source * c.outputs + column) : bits_float(0x7FC00000);
    sum = add(sum, multiply(row, load_global(c.weights + k)));
  }
  store_float(c.out, c.out_dtype, token * c.outputs + column, sum);
}

}  // namespace smoothrot::cuda
