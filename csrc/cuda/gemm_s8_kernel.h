// SPDX-License-Identifier: Apache-2.0
// y = x W^T: a block computes 64 tokens by 64 or 128 columns, its four warps 32 tokens by half of
// them each, with copies to shared memory running kStages - 1 steps ahead.
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
// Where neither side is packed, inputs enter in their own order. Where both are, sm_80 to sm_89
// take them as they are into the int4 MMA: gemm_s8_int4.h.
//
// The kernel of experts takes those and their tokens from a table on the device, so that one launch
// serves a layer whoever its tokens were routed to: nothing waits for the device, and a CUDA graph
// may hold it.
#pragma once

#include "gemm_s8_int4.h"
#include "gemm_s8_stage.h"

namespace smoothrot::cuda {

// A granule of 32 rows as int8 lanes, eight rows a register, of codes without groups against others
// of which one side is packed.
template <Codes Form, Codes Other>
SMOOTHROT_DEVICE void load_rows(const unsigned char* rows, int first_row, int granule,
                                uint32_t (&first)[4], uint32_t (&second)[4]) {
  if constexpr (Form == Codes::packed_int4) {
    uint32_t words[4];
    load_column_of_chunks<Form>(rows, first_row, granule, words);
#pragma unroll
    for (int i = 0; i < 4; ++i) eight_inputs<Form, Other>(words + i, first[i], second[i]);
  } else {
    const int lane = thread_index() % 32;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int chunk = granule * 2 + lane % 4 / 2, row = first_row + i * 8 + lane / 4;
      const auto pair = *reinterpret_cast<const Words2*>(
          rows + swizzled<kRowBytes<Form>>(row, chunk) + lane % 2 * 8);
      eight_inputs<Form, Other>(pair.word, first[i], second[i]);
    }
  }
}

// The operands of the MMAs of a granule: A of two times 16 tokens.
template <Codes Form, Codes Weight>
SMOOTHROT_DEVICE void load_tokens(const unsigned char* rows, int first_row, int granule,
                                  uint32_t (&a)[2][4]) {
  if constexpr (Form == Codes::int8 && Weight == Codes::int8) {
    load_deep_a<Form>(rows, first_row, 2 * granule, a);
  } else {
    uint32_t halves[2][4];
    load_rows<Form, Weight>(rows, first_row, granule, halves[0], halves[1]);
#pragma unroll
    for (int r = 0; r < 8; ++r) a[r / 4][r % 4] = halves[r % 4 / 2][r / 4 * 2 + r % 2];
  }
}

// B of four times eight columns, with groups times the scales of theirs.
template <Codes Form, Codes Weight, bool Grouped>
SMOOTHROT_DEVICE void load_columns(const unsigned char* rows, int first_row, int granule,
                                   [[maybe_unused]] const GroupFactor* factors,
                                   uint32_t (&b)[4][2]) {
  if constexpr (Form == Codes::int8 && Weight == Codes::int8) {
    uint32_t words[2][4];
    load_deep_b<Weight>(rows, first_row, 2 * granule, words);
#pragma unroll
    for (int r = 0; r < 8; ++r) b[r / 2][r % 2] = words[r / 4][r % 4];
  } else if constexpr (Grouped) {
    uint32_t words[4];
    load_column_of_chunks<Weight>(rows, first_row, granule, words);
#pragma unroll
    for (int i = 0; i < 4; ++i) scaled_inputs(words[i], factors[i], b[i][0], b[i][1]);
  } else {
    uint32_t halves[2][4];
    load_rows<Weight, Form>(rows, first_row, granule, halves[0], halves[1]);
#pragma unroll
    for (int r = 0; r < 8; ++r) b[r / 2][r % 2] = halves[r % 2][r / 2];
  }
}

// A step by the int8 MMA. A register of columns holds column 8 n + lane / 4.
template <Codes Form, Codes Weight, int Group, int Columns, int Tiles>
SMOOTHROT_DEVICE void multiply_step_int8(const unsigned char* stage, [[maybe_unused]] int step,
                                         int warp_token, int warp_column,
                                         int32_t (&sums)[2][Tiles][4]) {
  constexpr bool kGrouped = Group > 0;
  [[maybe_unused]] uint32_t scales[Tiles];
  GroupFactor factors[kGrouped ? Tiles : 4];
  if constexpr (kGrouped) {
    const auto* words = reinterpret_cast<const uint32_t*>(stage + kScalesAt<Form, Weight, Columns>);
#pragma unroll
    for (int j = 0; j < Tiles; ++j) {
      const uint32_t word = words[warp_column + j * 8 + thread_index() % 32 / 4];
      scales[j] = step_scales<Group>(word, step);
    }
  }
#pragma unroll
  for (int k = 0; k < kStepInputs / kGranule; ++k) {
    uint32_t a[2][4];
    load_tokens<Form, Weight>(stage, warp_token, k, a);
    if constexpr (kGrouped) {
      if (k * kGranule % Group == 0) {
#pragma unroll
        for (int j = 0; j < Tiles; ++j) factors[j] = group_factor(scales[j], k * kGranule / Group);
      }
    }
#pragma unroll
    for (int j = 0; j < Tiles; j += 4) {
      uint32_t b[4][2];
      load_columns<Form, Weight, kGrouped>(stage + kColumnsAt<Form>, warp_column + j * 8, k,
                                           factors + (kGrouped ? j : 0), b);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) mma_s8(sums[i][j + n], a[i], b[n]);
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
  const TileCopies<Form, Weight, Group, Columns> copies(g, first_token, first_column);
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) copies.copy(shared, g, s, first_column);
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<kStages - 2>();
    block_barrier();  // this step has landed for all, and all are done with the stage that is
                      // filled next
    copies.copy(shared, g, step + kStages - 1, first_column);
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
