// SPDX-License-Identifier: Apache-2.0
// Steps of the tiled GEMM in shared memory: how they are copied there, and how warps read them.
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

// A stage: rows of tokens, rows of columns and, with groups (`Group` inputs each, else 0), for each
// column the word that holds the scales of the step.
template <Codes Form>
constexpr int kColumnsAt = kTiledTokens * kRowBytes<Form>;
template <Codes Form, Codes Weight, int Columns>
constexpr int kScalesAt = kColumnsAt<Form> + Columns * kRowBytes<Weight>;
template <Codes Form, Codes Weight, int Group, int Columns>
constexpr int kStageBytes = kScalesAt<Form, Weight, Columns> + (Group ? Columns * 4 : 0);

template <int Group>
constexpr int kStepGroups = kStepInputs / Group;

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

// The words of group scales that the columns need at this step. All steps of a word copy it again,
// from the cache.
template <int Group, int Columns>
SMOOTHROT_DEVICE void copy_scales(unsigned char* target, const GemmArgs& g, int step,
                                  int64_t first_column) {
  const int pitch = (int(g.inputs) / Group + kWordGroups - 1) / kWordGroups;
  const int column = thread_index();
  if (column >= Columns) return;
  const bool inside = first_column + column < g.outputs;
  const int64_t row = inside ? first_column + column : 0;
  copy_async4(target + column * 4,
              g.group_scale + row * pitch + step * kStepGroups<Group> / kWordGroups, inside);
}

template <Codes Form, Codes Weight, int Group, int Columns>
SMOOTHROT_DEVICE void copy_step(unsigned char* shared, const GemmArgs& g, int step,
                                int64_t first_token, int64_t first_column) {
  const int64_t input = int64_t{step} * kStepInputs;
  if (input < g.inputs) {
    unsigned char* stage = shared + step % kStages * kStageBytes<Form, Weight, Group, Columns>;
    copy_rows<Form, kTiledTokens>(stage, g.codes, first_token, g.tokens, g.inputs, input);
    copy_rows<Weight, Columns>(stage + kColumnsAt<Form>, g.weight, first_column, g.outputs,
                               g.inputs, input);
    if constexpr (Group > 0) {
      copy_scales<Group, Columns>(stage + kScalesAt<Form, Weight, Columns>, g, step, first_column);
    }
  }
  commit_copies();
}

// A column's scales of this step's groups, the first in the lowest nibble.
template <int Group>
SMOOTHROT_DEVICE uint32_t step_scales(uint32_t word, int step) {
  return word >> 4 * (step * kStepGroups<Group> % kWordGroups);
}

// A granule of 32 packed rows, eight a register.
SMOOTHROT_DEVICE void load_packed(const unsigned char* rows, int first_row, int granule,
                                  uint32_t (&words)[4]) {
  const int row = first_row + thread_index() % 32;
  load_matrices(words, rows + swizzled<kRowBytes<Codes::packed_int4>>(row, granule));
}

// The same as int8 lanes, of codes without groups in either form.
template <Codes Form, Codes Other>
SMOOTHROT_DEVICE void load_rows(const unsigned char* rows, int first_row, int granule,
                                uint32_t (&first)[4], uint32_t (&second)[4]) {
  if constexpr (Form == Codes::packed_int4) {
    uint32_t words[4];
    load_packed(rows, first_row, granule, words);
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

// And of packed codes times the scales of their groups, one for each register.
SMOOTHROT_DEVICE void load_scaled(const unsigned char* rows, int first_row, int granule,
                                  const GroupFactor* factors, uint32_t (&first)[4],
                                  uint32_t (&second)[4]) {
  uint32_t words[4];
  load_packed(rows, first_row, granule, words);
#pragma unroll
  for (int i = 0; i < 4; ++i) scaled_inputs(words[i], factors[i], first[i], second[i]);
}

// A warp's part of the output: row and column of entry r of tile (i, j), within 32 tokens by 8 *
// Tiles columns.
SMOOTHROT_DEVICE int token_of(int i, int r) { return i * 16 + r / 2 * 8 + thread_index() % 32 / 4; }
SMOOTHROT_DEVICE int column_of(int j) { return j * 8 + thread_index() % 4 * 2; }

}  // namespace smoothrot::cuda
