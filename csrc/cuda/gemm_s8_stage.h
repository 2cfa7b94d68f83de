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

// What a thread copies of each step of an operand: 16 bytes of every kTiledThreads / kChunks-th
// row. Rows beyond the matrix are copies of its last one, whose products nobody stores.
template <Codes Form, int Rows>
struct RowCopies {
  static constexpr int kChunks = kRowBytes<Form> / kChunkBytes;
  static constexpr int kRowStep = kTiledThreads / kChunks;
  static constexpr int kCount = Rows / kRowStep;

  const unsigned char* source;  // of row 0 and this thread's chunk
  int rows[kCount];             // bytes from there to its rows
  int target;                   // of its first row in a stage
  int inputs_left;              // from its chunk's first input on

  SMOOTHROT_DEVICE RowCopies(const void* matrix, int64_t first, int64_t end, int inputs) {
    const int row = thread_index() / kChunks, chunk = thread_index() % kChunks;
    const int row_bytes = inputs / kStepInputs * kRowBytes<Form> +
                          inputs % kStepInputs * kRowBytes<Form> / kStepInputs;
    const int last = int(end - first < Rows ? end - first : Rows) - 1;
    source = static_cast<const unsigned char*>(matrix) + first * row_bytes + chunk * kChunkBytes;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int wanted = row + i * kRowStep;
      rows[i] = (wanted < last ? wanted : last) * row_bytes;
    }
    target = swizzled<kRowBytes<Form>>(row, chunk);
    inputs_left = inputs - chunk * (kStepInputs / kChunks);
  }

  // Zeros beyond the inputs. The rows of a thread are swizzled alike.
  SMOOTHROT_DEVICE void copy(unsigned char* stage, int step) const {
    const bool inside = step * kStepInputs < inputs_left;
    const unsigned char* from = inside ? source + int64_t{step} * kRowBytes<Form> : source;
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      copy_async16(stage + target + i * kRowStep * kRowBytes<Form>, from + rows[i], inside);
  }
};

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

// All that a thread copies for the steps of a tile.
template <Codes Form, Codes Weight, int Group, int Columns>
struct TileCopies {
  RowCopies<Form, kTiledTokens> tokens;
  RowCopies<Weight, Columns> columns;

  SMOOTHROT_DEVICE TileCopies(const GemmArgs& g, int64_t first_token, int64_t first_column)
      : tokens(g.codes, first_token, g.tokens, int(g.inputs)),
        columns(g.weight, first_column, g.outputs, int(g.inputs)) {}

  SMOOTHROT_DEVICE void copy(unsigned char* shared, const GemmArgs& g, int step,
                             int64_t first_column) const {
    if (step * kStepInputs < int(g.inputs)) {
      unsigned char* stage = shared + step % kStages * kStageBytes<Form, Weight, Group, Columns>;
      tokens.copy(stage, step);
      columns.copy(stage + kColumnsAt<Form>, step);
      if constexpr (Group > 0) {
        copy_scales<Group, Columns>(stage + kScalesAt<Form, Weight, Columns>, g, step,
                                    first_column);
      }
    }
    commit_copies();
  }
};

// A column's scales of this step's groups, the first in the lowest nibble.
template <int Group>
SMOOTHROT_DEVICE uint32_t step_scales(uint32_t word, int step) {
  return word >> 4 * (step * kStepGroups<Group> % kWordGroups);
}

// Four matrices of eight rows by one chunk: lanes 8 m to 8 m + 7 name the rows of matrix m and
// their chunk, and each lane receives four bytes of row lane / 4 of each.
template <Codes Form>
SMOOTHROT_DEVICE void load_chunks(const unsigned char* rows, int row, int chunk,
                                  uint32_t (&words)[4]) {
  load_matrices(words, rows + swizzled<kRowBytes<Form>>(row, chunk));
}

// 32 rows of one chunk, eight a register.
template <Codes Form>
SMOOTHROT_DEVICE void load_column_of_chunks(const unsigned char* rows, int first_row, int chunk,
                                            uint32_t (&words)[4]) {
  load_chunks<Form>(rows, first_row + thread_index() % 32, chunk, words);
}

// 32 rows of two chunks, which is the depth of an MMA, in the order of its registers: of operand A
// those of 16 rows, of operand B those of two times eight.
template <Codes Form>
SMOOTHROT_DEVICE void load_deep_a(const unsigned char* rows, int first_row, int chunk,
                                  uint32_t (&words)[2][4]) {
  const int lane = thread_index() % 32;
#pragma unroll
  for (int h = 0; h < 2; ++h)
    load_chunks<Form>(rows, first_row + h * 16 + lane % 16, chunk + lane / 16, words[h]);
}

template <Codes Form>
SMOOTHROT_DEVICE void load_deep_b(const unsigned char* rows, int first_row, int chunk,
                                  uint32_t (&words)[2][4]) {
  const int lane = thread_index() % 32;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = first_row + h * 16 + lane / 16 * 8 + lane % 8;
    load_chunks<Form>(rows, row, chunk + lane / 8 % 2, words[h]);
  }
}

// A warp's part of the output: row and column of entry r of tile (i, j), within 32 tokens by 8 *
// Tiles columns.
SMOOTHROT_DEVICE int token_of(int i, int r) { return i * 16 + r / 2 * 8 + thread_index() % 32 / 4; }
SMOOTHROT_DEVICE int column_of(int j) { return j * 8 + thread_index() % 4 * 2; }

}  // namespace smoothrot::cuda
