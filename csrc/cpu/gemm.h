// SPDX-License-Identifier: Apache-2.0
// Integer gemm over prepacked panels: exact int32 accumulators, one float epilogue.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "kernels.h"
#include "quant.h"
#include "unroll.h"

namespace smoothrot {
namespace {

// Bytes ahead of the weights in use that are asked for: far enough to hide DRAM latency at full
// bandwidth.
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

// Sums of Rows tokens by two vectors of columns.
template <class S, int Rows>
struct Sums {
  typename S::I32 at[Rows][2];
};

// One step added to `sum`.
template <class S, int Rows, int Bits>
SMOOTHROT_INLINE void step(const int32_t* words, const uint8_t* codes, Sums<S, Rows>& sum) {
  using I32 = typename S::I32;
  constexpr int64_t kHalfStepBytes = kHalfColumns * kStepInputs;
  I32 low, high;
  __builtin_prefetch(codes + kPrefetchBytes);
  if constexpr (Bits == 4) {
    S::split_nibbles(S::load_bytes(codes), low, high);
  } else {
    __builtin_prefetch(codes + kPrefetchBytes + kHalfStepBytes);
    low = S::load_bytes(codes);
    high = S::load_bytes(codes + kHalfStepBytes);
  }
  unroll<Rows>([&](auto r) SMOOTHROT_INLINE_LAMBDA {
    const I32 a = S::set1(words[r]);
    sum.at[r][0] = S::template dot4<Bits>(sum.at[r][0], low, a);
    sum.at[r][1] = S::template dot4<Bits>(sum.at[r][1], high, a);
  });
}

// The integer sums of one group of inputs.
template <class S, int Rows, int Bits>
SMOOTHROT_INLINE void accumulate(const int32_t* words, const int32_t* start, const uint8_t* codes,
                                 int64_t steps, Sums<S, Rows>& sum) {
  constexpr int64_t kStepBytes = kPanelColumns * kStepInputs * Bits / 8;
  // Few rows give few chains: split the inputs over several sets of sums so that latency stays
  // hidden.
  constexpr int kSets = Rows == 1 ? 4 : Rows <= 3 ? 2 : 1;
  Sums<S, Rows> sets[kSets];
  unroll<kSets>([&](auto set) SMOOTHROT_INLINE_LAMBDA {
    unroll<Rows>([&](auto r) SMOOTHROT_INLINE_LAMBDA {
      sets[set].at[r][0] = sets[set].at[r][1] = set == 0 ? S::set1(start[r]) : S::zero();
    });
  });
  // A group has at least one step; loops that test at their end keep the sums in place in
  // registers.
  if constexpr (kSets > 1) {
    for (int64_t turns = steps / kSets; turns > 0; --turns) {
      unroll<kSets>([&](auto set) SMOOTHROT_INLINE_LAMBDA {
        step<S, Rows, Bits>(words + set * Rows, codes + set * kStepBytes, sets[set]);
      });
      words += kSets * Rows;
      codes += kSets * kStepBytes;
    }
    steps %= kSets;
    for (; steps > 0; --steps, words += Rows, codes += kStepBytes)
      step<S, Rows, Bits>(words, codes, sets[0]);
  } else {
    do {
      step<S, Rows, Bits>(words, codes, sets[0]);
      words += Rows;
      codes += kStepBytes;
    } while (--steps > 0);
  }
  unroll<Rows>([&](auto r) SMOOTHROT_INLINE_LAMBDA {
    unroll<2>([&](auto h) SMOOTHROT_INLINE_LAMBDA {
      typename S::I32 total = sets[0].at[r][h];
      unroll<kSets - 1>(
          [&](auto set) SMOOTHROT_INLINE_LAMBDA { total = S::add(total, sets[set + 1].at[r][h]); });
      sum.at[r][h] = total;
    });
  });
}

template <class S, int Rows, int Bits, bool Grouped>
void multiply(const Task& t) {
  using F32 = typename S::F32;
  constexpr int64_t kStepBytes = kPanelColumns * kStepInputs * Bits / 8;
  // A vector of codes narrower than a step's half is a part of its columns: go over the parts one
  // by one.
  for (int first = 0; first < kHalfColumns; first += S::kLanes) {
    F32 y[Rows][2];
    const auto add_group = [&](int64_t g, auto is_first) SMOOTHROT_INLINE_LAMBDA {
      Sums<S, Rows> sum;
      accumulate<S, Rows, Bits>(t.words + g * t.steps * Rows, t.start + g * Rows,
                                t.codes + g * t.steps * kStepBytes + first * kStepInputs, t.steps,
                                sum);
      unroll<2>([&](auto h) SMOOTHROT_INLINE_LAMBDA {
        const F32 scale = S::load(t.column_scale + g * kPanelColumns + h * kHalfColumns + first);
        unroll<Rows>([&](auto r) SMOOTHROT_INLINE_LAMBDA {
          const F32 term = S::mul(S::to_f32(sum.at[r][h]), scale);
          y[r][h] = is_first ? term : S::add(y[r][h], term);
        });
      });
    };
    add_group(0, std::true_type{});
    if constexpr (Grouped) {
      for (int64_t g = 1; g < t.groups; ++g) add_group(g, std::false_type{});
    }
    unroll<2>([&](auto h) SMOOTHROT_INLINE_LAMBDA {
      const int64_t column = h * kHalfColumns + first;
      if (column >= t.columns) return;
      unroll<Rows>([&](auto r) SMOOTHROT_INLINE_LAMBDA {
        F32 v = S::mul(y[r][h], S::set1(t.row_scale[r]));
        if (t.bias) v = S::add(v, S::load(t.bias + column));
        store_vector<S>(t, r, column, v);
      });
    });
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

// Tiles [first, last) against one panel; `t` holds what all panels share.
template <class S>
void multiply_panel(const GemmArgs& g, Task t, int64_t panel, int64_t first_tile,
                    int64_t last_tile) {
  const WeightLayout& w = g.act.weight;
  const bool grouped = w.groups > 1;
  const int64_t out_bytes = g.out_dtype == Float::f32 ? 4 : 2;
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
  for (int64_t tile = first_tile; tile < last_tile; ++tile) {
    const int64_t first = tile_begin(g.act.tiles, tile),
                  rows = tile_begin(g.act.tiles, tile + 1) - first;
    t.words = g.act.words + first * w.groups * w.group_steps;
    t.start = g.act.start + first * w.groups;
    t.row_scale = g.act.scale + first;
    t.out = static_cast<uint8_t*>(g.out) + (first * w.columns + column) * out_bytes;
    choose_multiply<S>(rows, g.weight_bits, grouped)(t);
  }
}

template <class S>
void gemm(const GemmArgs& g, int64_t begin, int64_t end) {
  const WeightLayout& w = g.act.weight;
  Task t{};
  t.groups = w.groups;
  t.steps = w.group_steps;
  t.out_dtype = g.out_dtype;
  t.out_pitch = w.columns;
  // Tasks number the blocks of one panel after the other, so that ranges share the panels out
  // evenly; within a range one block's tiles meet all of its panels before the next block comes.
  for (int64_t block = 0; block < g.blocks; ++block) {
    const int64_t first_tile = g.act.tiles.tiles * block / g.blocks;
    const int64_t last_tile = g.act.tiles.tiles * (block + 1) / g.blocks;
    const int64_t first_panel = (begin + g.blocks - 1 - block) / g.blocks;
    const int64_t last_panel = (end + g.blocks - 1 - block) / g.blocks;
    for (int64_t panel = first_panel; panel < last_panel; ++panel)
      multiply_panel<S>(g, t, panel, first_tile, last_tile);
  }
}

}  // namespace

template <class S>
constexpr Kernels make_kernels(const char* name) {
  return {name,           S::kMaxRows,     S::kMaxRowsGrouped, &scratch_bytes<S>,
          &quant_rows<S>, &quant_tiles<S>, &decode_tiles<S>,   &gemm<S>};
}

}  // namespace smoothrot
