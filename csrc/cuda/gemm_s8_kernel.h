// SPDX-License-Identifier: Apache-2.0
// y = x W^T: a block computes 64 tokens by 32 * Warp columns, its four warps 32 tokens each, with
// copies to shared memory running kStages - 1 steps ahead.
//
// 32 inputs at a time (a granule) enter one int8 MMA, whose lanes emulator/mma_layout.h draws. Lane
// t of the four of a row holds inputs 8t .. 8t + 7, even ones in the first half of the MMA's depth
// and odd ones in the second, on both sides, as nibbles come out of packed words:
//
//   depth k    0   1   2   3 | 4   5   6   7 | ... | 12  13  14  15 || 16  17  18  19 | ... | 31
//   input      0   2   4   6 | 8  10  12  14 | ... | 24  26  28  30 ||  1   3   5   7 | ... | 31
//   lane t     0             | 1             | ... |  3             ||  0             | ... |  3
//   register   a0 and a1, b0                                        || a2 and a3, b1
//
// Where neither side is packed, each half has four neighbors of a lane's eight. Where both are,
// sm_80 to sm_89 take them as they are into the int4 MMA: gemm_s8_int4.h.
//
// The kernel of experts takes those and their tokens from a table on the device, so that one launch
// serves a layer whoever its tokens were routed to: nothing waits for the device, and a CUDA graph
// may hold it.
#pragma once

#include "gemm_s8_int4.h"
#include "gemm_s8_stage.h"

namespace smoothrot::cuda {

// A step by the int8 MMA. A warp's registers of columns hold column 8 i + lane / 4 each.
template <Codes Form, Codes Weight, int Group, int Columns, int Tiles>
SMOOTHROT_DEVICE void multiply_step_int8(const unsigned char* stage, [[maybe_unused]] int step,
                                         int warp_token, int warp_column,
                                         int32_t (&sums)[2][Tiles][4]) {
  [[maybe_unused]] uint32_t scales[Tiles];
  [[maybe_unused]] GroupFactor factors[Tiles];
  if constexpr (Group > 0) {
    const auto* words = reinterpret_cast<const uint32_t*>(stage + kScalesAt<Form, Weight, Columns>);
#pragma unroll
    for (int j = 0; j < Tiles; ++j) {
      const uint32_t word = words[warp_column + j * 8 + thread_index() % 32 / 4];
      scales[j] = step_scales<Group>(word, step);
    }
  }
#pragma unroll
  for (int k = 0; k < kStepInputs / kGranule; ++k) {
    uint32_t tokens[2][4];
    load_rows<Form, Weight>(stage, warp_token, k, tokens[0], tokens[1]);
    const uint32_t a[2][4] = {{tokens[0][0], tokens[0][1], tokens[1][0], tokens[1][1]},
                              {tokens[0][2], tokens[0][3], tokens[1][2], tokens[1][3]}};
    if constexpr (Group > 0) {
      if (k * kGranule % Group == 0) {
#pragma unroll
        for (int j = 0; j < Tiles; ++j) factors[j] = group_factor(scales[j], k * kGranule / Group);
      }
    }
#pragma unroll
    for (int j = 0; j < Tiles; j += 4) {
      uint32_t columns[2][4];
      if constexpr (Group > 0) {
        load_scaled(stage + kColumnsAt<Form>, warp_column + j * 8, k, factors + j, columns[0],
                    columns[1]);
      } else {
        load_rows<Weight, Form>(stage + kColumnsAt<Form>, warp_column + j * 8, k, columns[0],
                                columns[1]);
      }
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const uint32_t b[2] = {columns[0][n], columns[1][n]};
#pragma unroll
        for (int i = 0; i < 2; ++i) mma_s8(sums[i][j + n], a[i], b);
      }
    }
  }
}

// Of entries 2 h and 2 h + 1 of tile (i, j): both scales, bias, and the rounding.
template <int Shift, int Tiles>
SMOOTHROT_DEVICE void store_outputs(const GemmArgs& g, int64_t first_token, int64_t first_column,
                                    const int32_t (&sums)[2][Tiles][4]) {
#pragma unroll
  for (int j = 0; j < Tiles; ++j) {
    const int64_t column = first_column + column_of(j);
    if (column >= g.outputs) continue;
    const bool second = column + 1 < g.outputs;
    float weight_scale[2] = {}, bias[2] = {};
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      if (c == 1 && !second) continue;
      weight_scale[c] = load_global(g.weight_scale + column + c);
      if (g.bias) bias[c] = load_float(g.bias, g.bias_dtype, column + c);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t token = first_token + token_of(i, 2 * half);
        if (token >= g.tokens) continue;
        const float scale = load_global(g.scale + token);
        float y[2];
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          y[c] = multiply(float(sums[i][j][2 * half + c] >> Shift), weight_scale[c]);
          y[c] = multiply(y[c], scale);
          if (g.bias) y[c] = add(y[c], bias[c]);
        }
        const int64_t at = token * g.outputs + column;
        if (second && g.outputs % 2 == 0) {
          store_pair(g.out, g.out_dtype, at, y[0], y[1]);
        } else {
          store_float(g.out, g.out_dtype, at, y[0]);
          if (second) store_float(g.out, g.out_dtype, at + 1, y[1]);
        }
      }
    }
  }
}

// Tokens [first_token, first_token + kTiledTokens) by the columns of this block.
template <Codes Form, Codes Weight, int Group, int Columns>
SMOOTHROT_DEVICE void multiply_tile(const GemmArgs& g, int64_t first_token) {
  constexpr bool kInt4 = kUsesInt4<Form, Weight>;
  constexpr int kTiles = Columns / 2 / 8;
  constexpr int kShift = kInt4 ? 0 : kByteShift<Form, Weight, (Group > 0)>;
  const int warp = thread_index() / 32, warp_token = warp % 2 * kWarpTokens,
            warp_column = warp / 2 * (Columns / 2);
  const int64_t first_column = int64_t{block_index_y()} * Columns;
  const int steps = (int(g.inputs) + kStepInputs - 1) / kStepInputs;
  unsigned char* shared = shared_memory();
  int32_t sums[2][kTiles][4] = {};
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s)
    copy_step<Form, Weight, Group, Columns>(shared, g, s, first_token, first_column);
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<kStages - 2>();
    block_barrier();  // this step has landed for all, and all are done with the stage that is
                      // filled next
    copy_step<Form, Weight, Group, Columns>(shared, g, step + kStages - 1, first_token,
                                            first_column);
    const unsigned char* stage =
        shared + step % kStages * kStageBytes<Form, Weight, Group, Columns>;
    if constexpr (kInt4) {
      multiply_step_int4<Group, Columns>(stage, step, warp_token, warp_column, sums);
    } else {
      multiply_step_int8<Form, Weight, Group, Columns>(stage, step, warp_token, warp_column, sums);
    }
  }
  store_outputs<kShift>(g, first_token + warp_token, first_column + warp_column, sums);
}

template <Codes Form, Codes Weight, int Group, int Columns>
SMOOTHROT_KERNEL(kTiledThreads, 2)
gemm_s8_kernel(const GemmArgs g) {
  multiply_tile<Form, Weight, Group, Columns>(g, int64_t{block_index_x()} * kTiledTokens);
}

// The weights and tokens of a tile's expert; false where there is nothing to compute.
template <int Group>
SMOOTHROT_DEVICE bool enter_expert(const ExpertsArgs& e, GemmArgs& g, int64_t& first_token) {
  const int32_t* tile = e.tiles + block_index_x();
  const int32_t expert = load_global(tile), first = load_global(tile + e.tile_count);
  const int32_t end = load_global(tile + 2 * e.tile_count);
  if (expert < 0 || expert >= e.experts || first < 0 || end > g.tokens || first >= end)
    return false;
  const int64_t bytes = expert * e.expert_bytes;
  g.weight = static_cast<const unsigned char*>(g.weight) + bytes;
  if constexpr (Group > 0) g.group_scale += bytes / int64_t{sizeof(uint32_t)};
  g.weight_scale += expert * g.outputs;
  g.tokens = end;
  first_token = first;
  return true;
}

template <Codes Form, Codes Weight, int Group, int Columns>
SMOOTHROT_KERNEL(kTiledThreads, 2)
gemm_experts_kernel(const ExpertsArgs e) {
  GemmArgs g = e.gemm;
  int64_t first_token;
  if (!enter_expert<Group>(e, g, first_token)) return;  // the whole block
  multiply_tile<Form, Weight, Group, Columns>(g, first_token);
}

}  // namespace smoothrot::cuda
