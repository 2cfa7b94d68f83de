// SPDX-License-Identifier: Apache-2.0
// Integer gemm over prepacked panels: exact int32 accumulators, one float epilogue.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "kernels.h"
#include "quant.h"
#include "unroll.h"

namespace smoothrot {
namespace {

// Bytes ahead of the weights in use that are asked for: far enough to hide DRAM latency at full
// bandwidth.
constexpr int64_t kPrefetchBytes = 8192;

// Some steps of a panel, for one tile.
struct Task {
  const int32_t* words;        // [steps][rows]
  const int32_t* start;        // [starts][rows], or null where the sums have begun
  const uint8_t* codes;        // nibbles as packed, or bytes
  const uint8_t* group_scale;  // of the first step on; null: none
  int64_t steps;
  int64_t group_steps;
  int32_t* sums;   // [rows][32]
  uint8_t* bytes;  // where Keep leaves the weights as bytes
};

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

// How a kernel finds its weights.
enum class Codes {
  packed,  // nibbles
  scaled,  // nibbles, multiplied by their groups' scales as they are read
  bytes,
};

template <Codes C>
constexpr int64_t kStepBytes = kPanelColumns * kStepInputs / (C == Codes::bytes ? 1 : 2);

// What Codes::scaled multiplies by, in two vectors of columns.
template <class S, Codes C>
struct Factors {
  SMOOTHROT_INLINE void load(const uint8_t*) {}
  SMOOTHROT_INLINE void apply(typename S::I32&, typename S::I32&) const {}
};
template <class S>
struct Factors<S, Codes::scaled> {
  typename S::ByteFactor low, high;
  SMOOTHROT_INLINE void load(const uint8_t* scales) {
    typename S::I32 scale[2];
    S::split_scales(scales, scale[0], scale[1]);
    low = S::byte_factor(scale[0]);
    high = S::byte_factor(scale[1]);
  }
  SMOOTHROT_INLINE void apply(typename S::I32& a, typename S::I32& b) const {
    a = S::scale_bytes(a, low);
    b = S::scale_bytes(b, high);
  }
};

// Columns of one step, those from `codes` on and those sixteen further, as unsigned bytes.
template <class S, Codes C>
SMOOTHROT_INLINE void load_step(const uint8_t* codes, typename S::I32& low, typename S::I32& high) {
  if constexpr (C != Codes::bytes) {
    __builtin_prefetch(codes + kPrefetchBytes);
    S::split_nibbles(S::load_bytes(codes), low, high);
  } else {
    constexpr int64_t kHalfStepBytes = kHalfColumns * kStepInputs;
    low = S::load_bytes(codes);
    high = S::load_bytes(codes + kHalfStepBytes);
  }
}

// Columns of one step to where Codes::bytes reads them.
template <class S>
SMOOTHROT_INLINE void keep_step(typename S::I32 low, typename S::I32 high, uint8_t* bytes) {
  S::store_words(reinterpret_cast<int32_t*>(bytes), low);
  S::store_words(reinterpret_cast<int32_t*>(bytes) + kHalfColumns, high);
}

// Sums of Rows tokens by two vectors of columns.
template <class S, int Rows>
struct Accumulators {
  typename S::I32 at[Rows][2];

  template <typename F>
  SMOOTHROT_INLINE void each(const F& f) {
    unroll<Rows>([&](auto r) SMOOTHROT_INLINE_LAMBDA {
      unroll<2>([&](auto h) SMOOTHROT_INLINE_LAMBDA { f(at[r][h], int(r), int(h)); });
    });
  }
};

template <class S, int Rows, Codes C, bool Keep, int Bits>
SMOOTHROT_INLINE void dot_step(const int32_t* words, const uint8_t* codes,
                               const Factors<S, C>& factors, uint8_t* bytes,
                               Accumulators<S, Rows>& sums) {
  typename S::I32 low, high;
  load_step<S, C>(codes, low, high);
  factors.apply(low, high);
  if constexpr (Keep) keep_step<S>(low, high, bytes);
  if constexpr (C == Codes::bytes) {
    __builtin_prefetch(codes + kPrefetchBytes);
    __builtin_prefetch(codes + kPrefetchBytes + kStepBytes<C> / 2);
  }
  unroll<Rows>([&](auto r) SMOOTHROT_INLINE_LAMBDA {
    const typename S::I32 a = S::set1(words[r]);
    sums.at[r][0] = S::template dot4<Bits>(sums.at[r][0], low, a);
    sums.at[r][1] = S::template dot4<Bits>(sums.at[r][1], high, a);
  });
}

// Sums::whole.
template <class S, int Rows, Codes C, bool Keep, int Bits>
SMOOTHROT_INLINE void add_whole(const Task& t, const uint8_t* codes, int first,
                                Accumulators<S, Rows>& total) {
  // Few rows give few chains: split the inputs over several sets of sums so that latency stays
  // hidden.
  constexpr int kSets = Rows == 1 ? 4 : Rows <= 3 ? 2 : 1;
  Accumulators<S, Rows> others[kSets > 1 ? kSets - 1 : 1];
  unroll<kSets - 1>([&](auto set) SMOOTHROT_INLINE_LAMBDA {
    others[set].each([](auto& sum, int, int) { sum = S::zero(); });
  });
  const int32_t* words = t.words;
  const uint8_t* scales = t.group_scale + first;
  uint8_t* bytes = Keep ? t.bytes + first * kStepInputs : nullptr;
  Factors<S, C> factors;
  const auto step = [&](Accumulators<S, Rows>& sums) SMOOTHROT_INLINE_LAMBDA {
    dot_step<S, Rows, C, Keep, Bits>(words, codes, factors, bytes, sums);
    words += Rows;
    codes += kStepBytes<C>;
    if constexpr (Keep) bytes += kStepBytes<Codes::bytes>;
  };
  // There is at least one step in a run and one run; loops that test at their end keep the sums in
  // place in registers.
  const int64_t run = C == Codes::scaled ? t.group_steps : t.steps;
  int64_t left = t.steps;
  do {
    factors.load(scales);
    scales += kGroupScaleBytes;
    int64_t steps = run;
    if constexpr (kSets > 1) {
      for (; steps >= kSets; steps -= kSets) {
        step(total);
        unroll<kSets - 1>([&](auto set) SMOOTHROT_INLINE_LAMBDA { step(others[set]); });
      }
      for (; steps > 0; --steps) step(total);
    } else {
      do step(total);
      while (--steps > 0);
    }
    left -= run;
  } while (left > 0);
  unroll<kSets - 1>([&](auto set) SMOOTHROT_INLINE_LAMBDA {
    total.each([&](auto& sum, int r, int h) { sum = S::add(sum, others[set].at[r][h]); });
  });
}

// Sums::groups.
template <class S, int Rows>
SMOOTHROT_INLINE void add_groups(const Task& t, const uint8_t* codes, int first,
                                 Accumulators<S, Rows>& total) {
  const int32_t *words = t.words, *start = t.start;
  const uint8_t* scales = t.group_scale + first;
  for (int64_t left = t.steps; left > 0; left -= t.group_steps) {
    Accumulators<S, Rows> sums;
    sums.each([&](auto& sum, int r, int) { sum = S::set1(start[r]); });
    for (int64_t s = t.group_steps; s > 0; --s, words += Rows, codes += kStepBytes<Codes::packed>)
      dot_step<S, Rows, Codes::packed, false, 4>(words, codes, {}, nullptr, sums);
    typename S::I32 scale[2];
    S::split_scales(scales, scale[0], scale[1]);
    total.each(
        [&](auto& sum, int r, int h) { sum = S::add(sum, S::mul(sums.at[r][h], scale[h])); });
    start += Rows;
    scales += kGroupScaleBytes;
  }
}

// Sums::spans, of whole and of partial ones.
template <class S, int Rows, Codes C, bool Keep>
SMOOTHROT_INLINE void add_spans(const Task& t, const uint8_t* codes, int first,
                                Accumulators<S, Rows>& total) {
  using I32 = typename S::I32;
  const int32_t *words = t.words, *start = t.start;
  uint8_t* bytes = Keep ? t.bytes + first * kStepInputs : nullptr;
  constexpr int32_t kOnes = 0x00010001;
  I32 scale[2] = {S::set1(kOnes), S::set1(kOnes)};
  int64_t group_left = 0;
  const uint8_t* scales = t.group_scale ? t.group_scale + first : nullptr;
  Accumulators<S, Rows> sums;
  const auto step = [&]() SMOOTHROT_INLINE_LAMBDA {
    I32 low, high;
    load_step<S, C>(codes, low, high);
    if constexpr (Keep) {
      keep_step<S>(low, high, bytes);
      bytes += kStepBytes<Codes::bytes>;
    }
    unroll<Rows>([&](auto r) SMOOTHROT_INLINE_LAMBDA {
      const I32 a = S::set1(words[r]);
      sums.at[r][0] = S::dot_pairs(sums.at[r][0], low, a);
      sums.at[r][1] = S::dot_pairs(sums.at[r][1], high, a);
    });
    words += Rows;
    codes += kStepBytes<C>;
  };
  const auto span = [&](const auto& steps) SMOOTHROT_INLINE_LAMBDA {
    sums.each([&](auto& sum, int r, int) { sum = S::set1(start[r]); });
    steps();
    if (scales && group_left == 0) {
      S::split_scales(scales, scale[0], scale[1]);
      scales += kGroupScaleBytes;
      group_left = t.group_steps;
    }
    group_left -= kSpanSteps;
    total.each([&](auto& sum, int r, int h) { sum = S::fold_pairs(sum, sums.at[r][h], scale[h]); });
    start += Rows;
  };
  for (int64_t left = t.steps / kSpanSteps; left > 0; --left) {
    span([&]() SMOOTHROT_INLINE_LAMBDA {
      unroll<kSpanSteps>([&](auto) SMOOTHROT_INLINE_LAMBDA { step(); });
    });
  }
  if (const int64_t left = t.steps % kSpanSteps) {
    span([&]() SMOOTHROT_INLINE_LAMBDA {
      for (int64_t s = 0; s < left; ++s) step();
    });
  }
}

// Adds the products of a task's steps to its sums.
template <class S, int Rows, Sums How, Codes C, bool Keep, int Bits>
void multiply(const Task& t) {
  // A vector of codes narrower than a step's half is a part of its columns: go over the parts one
  // by one.
  for (int first = 0; first < kHalfColumns; first += S::kLanes) {
    int32_t* const sums = t.sums + first;
    const auto at = [&](int r, int h) { return sums + r * kPanelColumns + h * kHalfColumns; };
    const uint8_t* codes = t.codes + first * kStepInputs;
    Accumulators<S, Rows> total;
    total.each([&](auto& sum, int r, int h) { sum = S::load_bytes(at(r, h)); });
    if constexpr (How == Sums::whole) {
      add_whole<S, Rows, C, Keep, Bits>(t, codes, first, total);
    } else if constexpr (How == Sums::groups) {
      add_groups<S, Rows>(t, codes, first, total);
    } else {
      add_spans<S, Rows, C, Keep>(t, codes, first, total);
    }
    total.each([&](auto& sum, int r, int h) { S::store_words(at(r, h), sum); });
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
    if (from == From::panel_kept)
      return multiply_of_height<S, How, C, true, Bits>(rows, kHeights);
    // What is left to do with bytes is the same whether or not their groups' scales are in them.
    if (from == From::bytes)
      return multiply_of_height<S, How, Codes::bytes, false, How == Sums::whole ? 8 : Bits>(
          rows, kHeights);
  }
  return multiply_of_height<S, How, C, false, Bits>(rows, kHeights);
}

template <class S>
Multiply choose_multiply(int64_t rows, const GemmArgs& g, From from) {
  if (g.act.weight.bits == 8) return choose_from<S, Sums::whole, Codes::bytes, 8>(rows, From::panel);
  if constexpr (S::kSumsSpans) {
    return choose_from<S, Sums::spans, Codes::packed, 4>(rows, from);
  } else {
    if (!g.act.weight.groups) return choose_from<S, Sums::whole, Codes::packed, 4>(rows, from);
    if constexpr (S::kScalesBytes)
      return choose_from<S, Sums::whole, Codes::scaled, 8>(rows, from);
    else
      return choose_from<S, Sums::groups, Codes::packed, 4>(rows, from);
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
    if (S::kScalesBytes)
      act.offset = 128;
    else
      act.sums = Sums::groups;
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
