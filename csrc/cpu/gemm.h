// SPDX-License-Identifier: Apache-2.0
// Integer gemm over prepacked panels: exact int32 accumulators, one float epilogue.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "gemm_tile.h"
#include "kernels.h"
#include "quant.h"

namespace smoothrot {
namespace {

// Where the results of a panel go.
struct Target {
  const float* column_scale;  // [32]
  const float* bias;          // [32] or null
  void* out;
  Float dtype;
  int64_t pitch;
  int64_t columns;  // valid ones of the 32
};

inline void store_scalar(void* out, Float dtype, int64_t i, float v) {
  switch (dtype) {
    case Float::f32:
      static_cast<float*>(out)[i] = v;
      break;
    case Float::bf16:
      static_cast<uint16_t*>(out)[i] = f32_to_bf16(v);
      break;
    default:
      static_cast<uint16_t*>(out)[i] = f32_to_f16(v);
  }
}

template <class S>
inline void store_vector(const Target& t, int64_t row, int64_t column, typename S::F32 v) {
  const int64_t at = row * t.pitch + column;
  if (column + S::kLanes > t.columns) {
    float lanes[S::kLanes];
    S::store(lanes, v);
    for (int64_t i = 0; column + i < t.columns && i < S::kLanes; ++i)
      store_scalar(t.out, t.dtype, at + i, lanes[i]);
    return;
  }
  switch (t.dtype) {
    case Float::f32:
      return S::store(static_cast<float*>(t.out) + at, v);
    case Float::bf16:
      return S::store_bf16(static_cast<uint16_t*>(t.out) + at, v);
    default:
      return S::store_f16(static_cast<uint16_t*>(t.out) + at, v);
  }
}

using Multiply = void (*)(const Task&);

template <class S, Sums How, Codes C, bool Keep, int Bits, std::size_t... Row>
Multiply multiply_of_height(int64_t rows, std::index_sequence<Row...>) {
  static constexpr Multiply kTable[] = {&multiply<S, int(Row) + 1, How, C, Keep, Bits>...};
  return kTable[rows - 1];
}

// Where the weights of a tile come from.
enum class From {
  panel,
  panel_kept,  // the first tile of a block that expands, which leaves bytes to
  bytes,       // the others
};

template <class S, Sums How, Codes C, int Bits>
Multiply choose_from(int64_t rows, From from) {
  constexpr auto kHeights = std::make_index_sequence<S::kMaxRows>{};
  if constexpr (S::kExpandFromTiles > 0) {
    if (from == From::panel_kept) return multiply_of_height<S, How, C, true, Bits>(rows, kHeights);
    // What is left to do with bytes is the same whether or not their groups' scales are in them.
    if (from == From::bytes)
      return multiply_of_height<S, How, Codes::bytes, false, How == Sums::whole ? 8 : Bits>(
          rows, kHeights);
  }
  return multiply_of_height<S, How, C, false, Bits>(rows, kHeights);
}

template <class S>
Multiply choose_multiply(int64_t rows, const GemmArgs& g, From from) {
  if (g.act.weight.bits == 8)
    return choose_from<S, Sums::whole, Codes::bytes, 8>(rows, From::panel);
  if constexpr (S::kSumsSpans) {
    return choose_from<S, Sums::spans, Codes::packed, 4>(rows, from);
  } else {
    if (!g.act.weight.groups) return choose_from<S, Sums::whole, Codes::packed, 4>(rows, from);
    if (g.act.sums == Sums::groups)
      return multiply_of_height<S, Sums::groups, Codes::packed, false, 4>(
          rows, std::make_index_sequence<S::kMostRowsByGroups>{});
    if constexpr (S::kMostRowsByGroups < S::kMaxRows)
      return choose_from<S, Sums::whole, Codes::scaled, 8>(rows, from);
    __builtin_unreachable();
  }
}

template <class S>
void plan(GemmArgs& g) {
  TileArgs& act = g.act;
  const bool packed = act.weight.bits == 4;
  act.sums = Sums::whole;
  act.offset = packed ? 8 : 128;
  g.expand = packed && S::kExpandFromTiles > 0 && act.tiles.tiles >= S::kExpandFromTiles;
  if constexpr (S::kSumsSpans) {
    if (packed) act.sums = Sums::spans;
  } else if (act.weight.groups) {
    if (act.tiles.rows <= S::kMostRowsByGroups && act.weight.steps >= S::kFewestStepsByGroups)
      act.sums = Sums::groups;
    else
      act.offset = 128;
  }
}

// The float epilogue of `rows` rows: reference.gemm.
template <class S>
void finish(const Target& t, const int32_t* sums, const float* row_scale, int64_t rows) {
  for (int column = 0; column < kPanelColumns && column < t.columns; column += S::kLanes) {
    const typename S::F32 scale = S::load(t.column_scale + column);
    for (int64_t r = 0; r < rows; ++r) {
      const auto sum = S::load_bytes(sums + r * kPanelColumns + column);
      typename S::F32 v = S::mul(S::mul(S::to_f32(sum), scale), S::set1(row_scale[r]));
      if (t.bias) v = S::add(v, S::load(t.bias + column));
      store_vector<S>(t, r, column, v);
    }
  }
}

// Tiles [first_tile, last_tile) against one panel.
template <class S>
void multiply_panel(const GemmArgs& g, int64_t panel, int64_t first_tile, int64_t last_tile,
                    void* scratch) {
  const WeightLayout& w = g.act.weight;
  const TileArgs& act = g.act;
  const int64_t first_row = tile_begin(act.tiles, first_tile),
                rows = tile_begin(act.tiles, last_tile) - first_row;
  const uint8_t* data = g.packed + panel * w.panel_bytes;
  auto* bytes = static_cast<uint8_t*>(scratch);
  auto* sums = reinterpret_cast<int32_t*>(bytes + (g.expand ? kChunkInputs * kPanelColumns : 0));
  for (int64_t r = 0; r < rows; ++r) {
    const int32_t begin = act.sums == Sums::whole ? act.start[first_row + r] : 0;
    std::fill_n(sums + r * kPanelColumns, kPanelColumns, begin);
  }
  const int64_t chunk = g.expand ? kChunkInputs / kStepInputs : w.steps;
  for (int64_t s = 0; s < w.steps; s += chunk) {
    Task t{};
    t.steps = std::min(chunk, w.steps - s);
    t.group_steps = w.group_steps;
    t.codes = data + w.codes_at + s * w.step_bytes;
    if (w.groups) t.group_scale = data + kScaleBytes + s / w.group_steps * kGroupScaleBytes;
    t.bytes = bytes;
    From from = g.expand ? From::panel_kept : From::panel;
    for (int64_t tile = first_tile; tile < last_tile; ++tile) {
      const int64_t first = tile_begin(act.tiles, tile),
                    height = tile_begin(act.tiles, tile + 1) - first;
      t.words = act.words + first * w.steps + s * height;
      t.start = act.start + first * act.starts() + s / kSpanSteps * height;
      t.sums = sums + (first - first_row) * kPanelColumns;
      choose_multiply<S>(height, g, from)(t);
      if (g.expand) {
        t.codes = bytes;
        from = From::bytes;
      }
    }
  }
  Target target{};
  const int64_t column = panel * kPanelColumns, out_bytes = g.out_dtype == Float::f32 ? 4 : 2;
  target.column_scale = reinterpret_cast<const float*>(data);
  target.columns = std::min<int64_t>(w.columns - column, kPanelColumns);
  target.out = static_cast<uint8_t*>(g.out) + (first_row * w.columns + column) * out_bytes;
  target.dtype = g.out_dtype;
  target.pitch = w.columns;
  float bias[kPanelColumns] = {};
  if (g.bias) {
    for (int64_t c = 0; c < target.columns; ++c)
      bias[c] = load_scalar(g.bias, g.bias_dtype, column + c);
    target.bias = bias;
  }
  finish<S>(target, sums, act.scale + first_row, rows);
}

template <class S>
void gemm(const GemmArgs& g, int64_t begin, int64_t end, void* scratch) {
  // Tasks number the blocks of one panel after the other, so that ranges share the panels out
  // evenly; within a range one block's tiles meet all of its panels before the next block comes.
  for (int64_t block = 0; block < g.blocks; ++block) {
    const int64_t first_panel = (begin + g.blocks - 1 - block) / g.blocks;
    const int64_t last_panel = (end + g.blocks - 1 - block) / g.blocks;
    for (int64_t panel = first_panel; panel < last_panel; ++panel)
      multiply_panel<S>(g, panel, block_begin(g, block), block_begin(g, block + 1), scratch);
  }
}

}  // namespace

template <class S>
constexpr Kernels make_kernels(const char* name) {
  return {name,           S::kMaxRows,     &plan<S>,         &scratch_bytes<S>,
          &quant_rows<S>, &quant_tiles<S>, &decode_tiles<S>, &gemm<S>};
}

}  // namespace smoothrot
