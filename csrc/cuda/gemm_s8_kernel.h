// SPDX-License-Identifier: Apache-2.0
// y = x W^T on the int8 MMA that every architecture has: a block computes 64 tokens by 32 * Warp
// columns, its four warps 32 tokens each, with copies to shared memory running kStages - 1 steps
// ahead.
//
// 32 inputs at a time (a granule) enter one MMA, whose lanes emulator/mma_layout.h draws. Lane t of
// the four of a row holds inputs 8t .. 8t + 7, even ones in the first half of the MMA's depth and
// odd ones in the second, on both sides, as nibbles come out of packed words:
//
//   depth k    0   1   2   3 | 4   5   6   7 | ... | 12  13  14  15 || 16  17  18  19 | ... | 31
//   input      0   2   4   6 | 8  10  12  14 | ... | 24  26  28  30 ||  1   3   5   7 | ... | 31
//   lane t     0             | 1             | ... |  3             ||  0             | ... |  3
//   register   a0 and a1, b0                                        || a2 and a3, b1
//
// Where neither side is packed, each half has four neighbors of a lane's eight. So a group of
// weights may be any multiple of 32 inputs.
//
// The kernel of experts takes those and their tokens from a table on the device, so that one launch
// serves a layer whoever its tokens were routed to: nothing waits for the device, and a CUDA graph
// may hold it.
#pragma once

#include "gemm_common.h"

namespace smoothrot::cuda {

constexpr int kTiledThreads = 128;
constexpr int kTiledTokens = 64;
constexpr int kWarpTokens = 32;
constexpr int kStages = 3;
constexpr int kStepInputs = 128;
constexpr int kGranule = 32;
constexpr int kChunkBytes = 16;

template <Codes Form>
constexpr int kRowBytes = Form == Codes::packed_int4 ? kStepInputs / 2 : kStepInputs;

template <Codes Form, Codes Weight, int Columns>
constexpr int kStageBytes = kTiledTokens * kRowBytes<Form> + Columns * kRowBytes<Weight>;

// Where 16-byte chunk `chunk` of a row lies: eight rows of one chunk fall on different banks.
template <int RowBytes>
SMOOTHROT_DEVICE int swizzled(int row, int chunk) {
  const int turn = RowBytes == 128 ? row & 7 : row >> 1 & 3;
  return row * RowBytes + (chunk ^ turn) * kChunkBytes;
}

// Rows [first, first + Rows) of inputs [input, input + kStepInputs), zeros beyond the matrix.
template <Codes Form, int Rows>
SMOOTHROT_DEVICE void copy_rows(unsigned char* target, const void* matrix, int64_t first,
                                int64_t rows, int64_t inputs, int64_t input) {
  constexpr int kChunks = kRowBytes<Form> / kChunkBytes, kChunkInputs = kStepInputs / kChunks;
#pragma unroll
  for (int i = 0; i < Rows * kChunks / kTiledThreads; ++i) {
    const int id = thread_index() + i * kTiledThreads, row = id / kChunks, chunk = id % kChunks;
    const int64_t from = input + chunk * kChunkInputs;
    const bool inside = first + row < rows && from < inputs;
    const int64_t element = inside ? (first + row) * inputs + from : 0;
    const auto* source =
        static_cast<const unsigned char*>(matrix) + element * kRowBytes<Form> / kStepInputs;
    copy_async16(target + swizzled<kRowBytes<Form>>(row, chunk), source, inside);
  }
}

template <Codes Form, Codes Weight, int Columns>
SMOOTHROT_DEVICE void copy_step(unsigned char* shared, const GemmArgs& g, int step,
                                int64_t first_token, int64_t first_column) {
  const int64_t input = int64_t{step} * kStepInputs;
  if (input < g.inputs) {
    unsigned char* stage = shared + step % kStages * kStageBytes<Form, Weight, Columns>;
    copy_rows<Form, kTiledTokens>(stage, g.codes, first_token, g.tokens, g.inputs, input);
    copy_rows<Weight, Columns>(stage + kTiledTokens * kRowBytes<Form>, g.weight, first_column,
                               g.outputs, g.inputs, input);
  }
  commit_copies();
}

// A granule of 32 rows, eight a register.
template <Codes Form, Codes Other>
SMOOTHROT_DEVICE void load_rows(const unsigned char* rows, int first_row, int granule,
                                uint32_t (&first)[4], uint32_t (&second)[4]) {
  const int lane = thread_index() % 32;
  if constexpr (Form == Codes::packed_int4) {
    uint32_t words[4];
    load_matrices(words, rows + swizzled<kRowBytes<Form>>(first_row + lane, granule));
#pragma unroll
    for (int i = 0; i < 4; ++i) eight_inputs<Form, Other>(words + i, first[i], second[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int chunk = granule * 2 + lane % 4 / 2, row = first_row + i * 8 + lane / 4;
      const auto pair = *reinterpret_cast<const Words2*>(
          rows + swizzled<kRowBytes<Form>>(row, chunk) + lane % 2 * 8);
      eight_inputs<Form, Other>(pair.word, first[i], second[i]);
    }
  }
}

// A warp's part of the output: row and column of entry r of tile (i, j), within 32 tokens by 8 *
// Tiles columns.
SMOOTHROT_DEVICE int token_of(int i, int r) { return i * 16 + r / 2 * 8 + thread_index() % 32 / 4; }
SMOOTHROT_DEVICE int column_of(int j) { return j * 8 + thread_index() % 4 * 2; }

// Ends a group: its sums times its scales join the float sums.
template <int Shift, int Tiles>
SMOOTHROT_DEVICE void fold_group(const GemmArgs& g, int group, int64_t first_column,
                                 int32_t (&sums)[2][Tiles][4], float (&totals)[2][Tiles][4]) {
  const int groups = int(g.inputs) / int(g.group_size);
#pragma unroll
  for (int j = 0; j < Tiles; ++j) {
    float scale[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int64_t column = first_column + column_of(j) + c;
      scale[c] = column < g.outputs ? load_global(g.weight_scale + column * groups + group) : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        totals[i][j][r] =
            multiply_add(float(sums[i][j][r] >> Shift), scale[r % 2], totals[i][j][r]);
        sums[i][j][r] = 0;
      }
    }
  }
}

// `totals` hold sum * weight_scale.
template <int Tiles>
SMOOTHROT_DEVICE void store_outputs(const GemmArgs& g, int64_t first_token, int64_t first_column,
                                    const float (&totals)[2][Tiles][4]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t token = first_token + token_of(i, 2 * half);
      if (token >= g.tokens) continue;
      const float scale = load_global(g.scale + token);
#pragma unroll
      for (int j = 0; j < Tiles; ++j) {
        const int64_t column = first_column + column_of(j);
        const bool second = column + 1 < g.outputs;
        if (column >= g.outputs) continue;
        float y[2];
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          y[c] = multiply(totals[i][j][2 * half + c], scale);
          if (g.bias && (c == 0 || second))
            y[c] = add(y[c], load_float(g.bias, g.bias_dtype, column + c));
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
template <Codes Form, Codes Weight, bool Grouped, int Columns>
SMOOTHROT_DEVICE void multiply_tile(const GemmArgs& g, int64_t first_token) {
  constexpr int kTiles = Columns / 2 / 8, kShift = kOperandShift<Form, Weight>;
  const int warp = thread_index() / 32, warp_token = warp % 2 * kWarpTokens,
            warp_column = warp / 2 * (Columns / 2);
  const int64_t first_column = int64_t{block_index_y()} * Columns;
  const int steps = (int(g.inputs) + kStepInputs - 1) / kStepInputs;
  unsigned char* shared = shared_memory();
  int32_t sums[2][kTiles][4] = {};
  float totals[2][kTiles][4] = {};
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s)
    copy_step<Form, Weight, Columns>(shared, g, s, first_token, first_column);
  int left = int(g.group_size) / kGranule;
  int group = 0;
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<kStages - 2>();
    block_barrier();  // this step has landed for all, and all are done with the stage that is
                      // filled next
    copy_step<Form, Weight, Columns>(shared, g, step + kStages - 1, first_token, first_column);
    const unsigned char* stage = shared + step % kStages * kStageBytes<Form, Weight, Columns>;
#pragma unroll
    for (int k = 0; k < kStepInputs / kGranule; ++k) {
      uint32_t tokens[2][4];
      load_rows<Form, Weight>(stage, warp_token, k, tokens[0], tokens[1]);
      const uint32_t a[2][4] = {{tokens[0][0], tokens[0][1], tokens[1][0], tokens[1][1]},
                                {tokens[0][2], tokens[0][3], tokens[1][2], tokens[1][3]}};
#pragma unroll
      for (int j = 0; j < kTiles; j += 4) {
        uint32_t columns[2][4];
        load_rows<Weight, Form>(stage + kTiledTokens * kRowBytes<Form>, warp_column + j * 8, k,
                                columns[0], columns[1]);
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const uint32_t b[2] = {columns[0][n], columns[1][n]};
#pragma unroll
          for (int i = 0; i < 2; ++i) mma_s8(sums[i][j + n], a[i], b);
        }
      }
      if constexpr (Grouped) {
        if (--left == 0 &&
            group * int(g.group_size) < int(g.inputs)) {  // a last step may reach past the inputs
          fold_group<kShift>(g, group++, first_column + warp_column, sums, totals);
          left = int(g.group_size) / kGranule;
        }
      }
    }
  }
  if constexpr (!Grouped) fold_group<kShift>(g, 0, first_column + warp_column, sums, totals);
  store_outputs(g, first_token + warp_token, first_column + warp_column, totals);
}

template <Codes Form, Codes Weight, bool Grouped, int Columns>
SMOOTHROT_KERNEL(kTiledThreads, 2)
gemm_s8_kernel(const GemmArgs g) {
  multiply_tile<Form, Weight, Grouped, Columns>(g, int64_t{block_index_x()} * kTiledTokens);
}

// The weights and tokens of a tile's expert; false where there is nothing to compute.
template <Codes Weight>
SMOOTHROT_DEVICE bool enter_expert(const ExpertsArgs& e, GemmArgs& g, int64_t& first_token) {
  const int32_t* tile = e.tiles + block_index_x();
  const int32_t expert = load_global(tile), first = load_global(tile + e.tile_count);
  const int32_t end = load_global(tile + 2 * e.tile_count);
  if (expert < 0 || expert >= e.experts || first < 0 || end > g.tokens || first >= end)
    return false;
  const int64_t elements = g.outputs * g.inputs;
  const int64_t bytes = Weight == Codes::packed_int4 ? elements / 2 : elements;
  g.weight = static_cast<const unsigned char*>(g.weight) + expert * bytes;
  g.weight_scale += expert * (g.outputs * (int(g.inputs) / int(g.group_size)));
  g.tokens = end;
  first_token = first;
  return true;
}

template <Codes Form, Codes Weight, bool Grouped, int Columns>
SMOOTHROT_KERNEL(kTiledThreads, 2)
gemm_experts_kernel(const ExpertsArgs e) {
  GemmArgs g = e.gemm;
  int64_t first_token;
  if (!enter_expert<Weight>(e, g, first_token)) return;  // the whole block
  multiply_tile<Form, Weight, Grouped, Columns>(g, first_token);
}

}  // namespace smoothrot::cuda
