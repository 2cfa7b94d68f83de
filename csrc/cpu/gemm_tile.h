// SPDX-License-Identifier: Apache-2.0
// Integer products of one tile of tokens and some steps of a panel of weights.
#pragma once

#include <cstdint>

#include "kernels.h"
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
  constexpr int kUnrolled = 8;
  const int32_t *words = t.words, *start = t.start;
  const uint8_t* scales = t.group_scale + first;
  for (int64_t left = t.steps; left > 0; left -= t.group_steps) {
    Accumulators<S, Rows> sums;
    sums.each([&](auto& sum, int r, int) { sum = S::set1(start[r]); });
    for (int64_t s = t.group_steps; s > 0; s -= kUnrolled) {
      unroll<kUnrolled>([&](auto) SMOOTHROT_INLINE_LAMBDA {
        dot_step<S, Rows, Codes::packed, false, 4>(words, codes, {}, nullptr, sums);
        words += Rows;
        codes += kStepBytes<Codes::packed>;
      });
    }
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

}  // namespace
}  // namespace smoothrot
