// SPDX-License-Identifier: Apache-2.0
// Shapes of the kernel-side layouts: prepacked weights and packed activations.
//
// Everything here has internal linkage, because translation units built for different instruction
// sets include it and must not share one out-of-line copy.
#pragma once

#include <cstdint>

namespace smoothrot {

// A panel is 32 output columns, their scales before their codes; a step is 4 consecutive inputs,
// and a group of inputs is padded to whole steps:
//
//   | scales, float [groups][32] | codes of group 0                   | group 1 | ... | group G-1 |
//                                | step 0 | step 1 | ... | last step  |
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
// 8 or 128; the kernels take offset * sum(activation codes) back. In the padding of a group the
// activation side is zero; columns are padded to whole panels.
static constexpr int kPanelColumns = 32;
static constexpr int kHalfColumns = kPanelColumns / 2;
static constexpr int kStepInputs = 4;

struct WeightLayout {
  int64_t columns;      // N
  int64_t inputs;       // K
  int64_t groups;       // G
  int64_t group_size;   // K / G
  int64_t group_steps;  // steps of one group, padded
  int64_t panels;
  int64_t step_bytes;
  int64_t panel_bytes;
  int32_t offset;  // stored code = code + offset
};

static inline WeightLayout weight_layout(int64_t columns, int64_t inputs, int64_t groups,
                                         int64_t bits) {
  WeightLayout w{};
  w.columns = columns;
  w.inputs = inputs;
  w.groups = groups;
  w.group_size = inputs / groups;
  w.group_steps = (w.group_size + kStepInputs - 1) / kStepInputs;
  w.panels = (columns + kPanelColumns - 1) / kPanelColumns;
  w.step_bytes = kPanelColumns * kStepInputs * bits / 8;
  w.panel_bytes = groups * (kPanelColumns * int64_t{sizeof(float)} + w.group_steps * w.step_bytes);
  w.offset = bits == 4 ? 8 : 128;
  return w;
}

// Tokens are cut into tiles of nearly equal height, at most max_rows. Tile t holds int32 words
// [groups][steps][rows], each word the four signed codes of one step of one token.
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
