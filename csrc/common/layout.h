// SPDX-License-Identifier: Apache-2.0
// Shapes of the kernel-side layouts: prepacked weights and packed activations.
//
// Everything here has internal linkage, because translation units built for different instruction
// sets include it and must not share one out-of-line copy.
#pragma once

#include <cstdint>

namespace smoothrot {

// A panel is 32 output columns, their scales before their codes; a step is 4 consecutive inputs,
// the last one padded:
//
//   | scales, float [32] | group scales [groups][16] | codes                           |
//                        | padded to 64 bytes        | step 0 | step 1 | ... | last step |
//
// The group scales of columns c and 16 + c share byte c of a group, as codes do below; there are
// none where each column has one scale alone.
//
// A step of 4-bit codes is 64 bytes, byte 4 * c + j for input j of two columns:
//
//   byte          0         1         2         3         4         ...   63
//   high nibble | col 16  | col 16  | col 16  | col 16  | col 17  |     | col 31  |
//               | input 0 | input 1 | input 2 | input 3 | input 0 | ... | input 3 |
//   low nibble  | col 0   | col 0   | col 0   | col 0   | col 1   |     | col 15  |
//               | input 0 | input 1 | input 2 | input 3 | input 0 | ... | input 3 |
//               |<------------ a 32-bit lane ---------->|
//
// One of 8-bit codes is 128 bytes, byte 4 * c + j for input j of column c:
//
//   byte          0         1         2         3         4         ...   127
//               | col 0   | col 0   | col 0   | col 0   | col 1   |     | col 31  |
//               | input 0 | input 1 | input 2 | input 3 | input 0 | ... | input 3 |
//
// So a 32-bit lane is a column (or, by nibbles, two) and four inputs, which is what vpdpbusd and
// its kin consume without any horizontal sum. Codes are stored unsigned, code + offset, with offset
// 8 or 128; the kernels take offset * sum(activation codes) back. In the padding of the last step
// the activation side is zero; columns are padded to whole panels.
static constexpr int kPanelColumns = 32;
static constexpr int kHalfColumns = kPanelColumns / 2;
static constexpr int kStepInputs = 4;
static constexpr int kGroupScaleBytes = kPanelColumns / 2;  // of all columns' scales of one group
static constexpr int kScaleBytes = kPanelColumns * int(sizeof(float));

struct WeightLayout {
  int64_t columns;      // N
  int64_t inputs;       // K
  int64_t bits;         // 4 or 8
  int64_t groups;       // 0: a scale for each column alone
  int64_t group_steps;  // of one group; all without
  int64_t steps;
  int64_t panels;
  int64_t step_bytes;
  int64_t codes_at;  // byte of a panel where its codes begin
  int64_t panel_bytes;
};

static inline WeightLayout weight_layout(int64_t columns, int64_t inputs, int64_t groups,
                                         int64_t bits) {
  constexpr int64_t kLine = 64;
  WeightLayout w{};
  w.columns = columns;
  w.inputs = inputs;
  w.bits = bits;
  w.groups = groups;
  w.steps = (inputs + kStepInputs - 1) / kStepInputs;
  w.group_steps = groups ? w.steps / groups : w.steps;
  w.panels = (columns + kPanelColumns - 1) / kPanelColumns;
  w.step_bytes = kPanelColumns * kStepInputs * bits / 8;
  w.codes_at = kScaleBytes + (groups * kGroupScaleBytes + kLine - 1) / kLine * kLine;
  w.panel_bytes = w.codes_at + w.steps * w.step_bytes;
  return w;
}

// Tokens are cut into tiles of nearly equal height, at most max_rows. Tile t holds int32 words
// [steps][rows], each word the four signed codes of one step of one token.
struct TileLayout {
  int64_t tokens;
  int64_t tiles;
  int64_t rows;   // height of a tile
  int64_t extra;  // this many leading tiles hold one row more
};

static inline TileLayout tile_layout(int64_t tokens, int64_t max_rows) {
  TileLayout t{};
  t.tokens = tokens;
  t.tiles = (tokens + max_rows - 1) / max_rows;
  t.rows = t.tiles ? tokens / t.tiles : 0;
  t.extra = t.tiles ? tokens % t.tiles : 0;
  return t;
}

static inline int64_t tile_begin(const TileLayout& t, int64_t tile) {
  return tile * t.rows + (tile < t.extra ? tile : t.extra);
}

}  // namespace smoothrot
