// SPDX-License-Identifier: Apache-2.0
// Integer gemm over prepacked panels: exact int32 accumulators, one float epilogue.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "kernels.h"
#include "quant.h"

namespace smoothrot {
namespace {

// Bytes ahead of the weights in use that are asked for: far enough to hide DRAM latency at full bandwidth.
constexpr int64_t kPrefetchBytes = 4096;

// One tile against one panel.
struct Task {
  const int32_t* words;
  const int32_t* start;
  const float* row_scale;
  const float* column_scale;  // [groups][32]
  const uint8_t* codes;
  const float* bias;  // [32] or null
  int64_t groups;
  int64_t steps;
  void* out;
  Float out_dtype;
  int64_t out_pitch;
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
inline void store_vector(const Task& t, int64_t row, int64_t column, typename S::F32 v) {
  const int64_t at = row * t.out_pitch + column;
  if (column + S::kLanes > t.columns) {
    float lanes[S::kLanes];
    S::store(lanes, v);
    for (int64_t i = 0; column + i < t.columns && i < S::kLanes; ++i)
      store_scalar(t.out, t.out_dtype, at + i, lanes[i]);
    return;
  }
  switch (t.out_dtype) {
    case Float::f32:
      return S::store(static_cast<float*>(t.out) + at, v);
    case Float::bf16:
      return S::store_bf16(static_cast<uint16_t*>(t.out) + at, v);
    default:
      return S::store_f16(static_cast<uint16_t*>(t.out) + at, v);
  }
}

// `steps` steps of Rows tokens by two vectors of columns, added to `sum`.
template <class S, int Rows, int Bits>
inline void accumulate(const int32_t* words, const uint8_t* codes, int64_t steps, typename S::I32 (&sum)[Rows][2]) {
  using I32 = typename S::I32;
  constexpr int64_t kStepBytes = kPanelColumns * kStepInputs * Bits / 8;
  // Few rows give few chains: split the inputs over several sets of accumulators so that latency stays hidden.
  constexpr int kSets = Rows == 1 ? 4 : Rows <= 3 ? 2 : 1;
  I32 part[kSets][Rows][2];
  for (int u = 1; u < kSets; ++u) {
    for (int r = 0; r < Rows; ++r) part[u][r][0] = part[u][r][1] = S::zero();
  }
  for (int r = 0; r < Rows; ++r) part[0][r][0] = sum[r][0], part[0][r][1] = sum[r][1];
  const auto step = [&](int64_t s, I32(&into)[Rows][2]) __attribute__((always_inline)) {
    const uint8_t* at = codes + s * kStepBytes;
    __builtin_prefetch(at + kPrefetchBytes);
    I32 low, high;
    if constexpr (Bits == 4) {
      S::split_nibbles(S::load_bytes(at), low, high);
    } else {
      __builtin_prefetch(at + kPrefetchBytes + 64);
      low = S::load_bytes(at);
      high = S::load_bytes(at + kStepBytes / 2);
    }
    for (int r = 0; r < Rows; ++r) {
      const I32 a = S::set1(words[s * Rows + r]);
      into[r][0] = S::template dot4<Bits>(into[r][0], low, a);
      into[r][1] = S::template dot4<Bits>(into[r][1], high, a);
    }
  };
  int64_t s = 0;
  for (; s + kSets <= steps; s += kSets) {
    for (int u = 0; u < kSets; ++u) step(s + u, part[u]);
  }
  for (; s < steps; ++s) step(s, part[0]);
  for (int r = 0; r < Rows; ++r) {
    for (int h = 0; h < 2; ++h) {
      sum[r][h] = part[0][r][h];
      for (int u = 1; u < kSets; ++u) sum[r][h] = S::add(sum[r][h], part[u][r][h]);
    }
  }
}

template <class S, int Rows, int Bits, bool Grouped>
void multiply(const Task& t) {
  using I32 = typename S::I32;
  using F32 = typename S::F32;
  constexpr int64_t kStepBytes = kPanelColumns * kStepInputs * Bits / 8;
  // A vector of codes narrower than a step's half is a part of its columns: go over the parts one by one.
  for (int first = 0; first < kHalfColumns; first += S::kLanes) {
    F32 y[Rows][2];
    for (int64_t g = 0; g < (Grouped ? t.groups : 1); ++g) {
      I32 sum[Rows][2];
      for (int r = 0; r < Rows; ++r) sum[r][0] = sum[r][1] = S::set1(t.start[g * Rows + r]);
      accumulate<S, Rows, Bits>(t.words + g * t.steps * Rows, t.codes + g * t.steps * kStepBytes + first * kStepInputs,
                                t.steps, sum);
      for (int h = 0; h < 2; ++h) {
        const F32 scale = S::load(t.column_scale + g * kPanelColumns + h * kHalfColumns + first);
        for (int r = 0; r < Rows; ++r) {
          const F32 term = S::mul(S::to_f32(sum[r][h]), scale);
          y[r][h] = g == 0 ? term : S::add(y[r][h], term);
        }
      }
    }
    for (int r = 0; r < Rows; ++r) {
      for (int h = 0; h < 2; ++h) {
        const int64_t column = h * kHalfColumns + first;
        if (column >= t.columns) continue;
        F32 v = S::mul(y[r][h], S::set1(t.row_scale[r]));
        if (t.bias) v = S::add(v, S::load(t.bias + column));
        store_vector<S>(t, r, column, v);
      }
    }
  }
}

using Multiply = void (*)(const Task&);

template <class S, int Bits, bool Grouped, std::size_t... Row>
Multiply multiply_of_height(int64_t rows, std::index_sequence<Row...>) {
  static constexpr Multiply kTable[] = {&multiply<S, int(Row) + 1, Bits, Grouped>...};
  return kTable[rows - 1];
}

template <class S>
Multiply choose_multiply(int64_t rows, int bits, bool grouped) {
  using Heights = std::make_index_sequence<S::kMaxRows>;
  using GroupedHeights = std::make_index_sequence<S::kMaxRowsGrouped>;
  if (grouped) {
    return bits == 4 ? multiply_of_height<S, 4, true>(rows, GroupedHeights{})
                     : multiply_of_height<S, 8, true>(rows, GroupedHeights{});
  }
  return bits == 4 ? multiply_of_height<S, 4, false>(rows, Heights{})
                   : multiply_of_height<S, 8, false>(rows, Heights{});
}

template <class S>
void gemm(const GemmArgs& g, int64_t begin, int64_t end) {
  const WeightLayout& w = g.act.weight;
  const TileLayout& tiles = g.act.tiles;
  const bool grouped = w.groups > 1;
  const int64_t out_bytes = g.out_dtype == Float::f32 ? 4 : 2;
  Task t{};
  t.groups = w.groups;
  t.steps = w.group_steps;
  t.out_dtype = g.out_dtype;
  t.out_pitch = w.columns;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t panel = task % w.panels, block = task / w.panels * g.block_tiles;
    const int64_t last = block + g.block_tiles < tiles.tiles ? block + g.block_tiles : tiles.tiles;
    const int64_t column = panel * kPanelColumns;
    const uint8_t* data = g.packed + panel * w.panel_bytes;
    t.column_scale = reinterpret_cast<const float*>(data);
    t.codes = data + w.groups * kPanelColumns * int64_t{sizeof(float)};
    t.columns = w.columns - column < kPanelColumns ? w.columns - column : kPanelColumns;
    float bias[kPanelColumns] = {};
    if (g.bias) {
      for (int64_t c = 0; c < t.columns; ++c) bias[c] = load_scalar(g.bias, g.bias_dtype, column + c);
      t.bias = bias;
    }
    for (int64_t tile = block; tile < last; ++tile) {
      const int64_t first = tile_begin(tiles, tile), rows = tile_begin(tiles, tile + 1) - first;
      t.words = g.act.words + first * w.groups * w.group_steps;
      t.start = g.act.start + first * w.groups;
      t.row_scale = g.act.scale + first;
      t.out = static_cast<uint8_t*>(g.out) + (first * w.columns + column) * out_bytes;
      choose_multiply<S>(rows, g.weight_bits, grouped)(t);
    }
  }
}

}  // namespace

template <class S>
constexpr Kernels make_kernels(const char* name) {
  return {name,           S::kMaxRows,     S::kMaxRowsGrouped, &scratch_bytes<S>,
          &quant_rows<S>, &quant_tiles<S>, &decode_tiles<S>,   &gemm<S>};
}

}  // namespace smoothrot
