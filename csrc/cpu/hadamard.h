// SPDX-License-Identifier: Apache-2.0
// The block Hadamard transform of one row, in the order of additions that
// reference.hadamard_transform defines.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "unroll.h"

namespace smoothrot {
namespace {

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// ---- Sylvester part: butterflies at strides 1, 2, 4 ... within runs of `power` values ----

// Radix `Regs` butterflies over vectors `stride` floats apart.
template <class S, int Regs>
inline void butterflies(typename S::F32* v) {
  for (int distance = 1; distance < Regs; distance *= 2) {
    for (int i = 0; i < Regs; ++i) {
      if (i & distance) continue;
      const typename S::F32 a = v[i], b = v[i + distance];
      v[i] = S::add(a, b);
      v[i + distance] = S::sub(a, b);
    }
  }
}

template <class S>
inline typename S::F32 butterflies_in_lanes(typename S::F32 v) {
  v = S::template butterfly<1>(v);
  v = S::template butterfly<2>(v);
  if constexpr (S::kLanes > 4) v = S::template butterfly<4>(v);
  if constexpr (S::kLanes > 8) v = S::template butterfly<8>(v);
  return v;
}

// Strides 1 .. Regs * kLanes / 2 of `count` consecutive values.
template <class S, int Regs>
inline void first_pass(float* y, int64_t count) {
  for (int64_t i = 0; i < count; i += Regs * S::kLanes) {
    typename S::F32 v[Regs];
    for (int r = 0; r < Regs; ++r) v[r] = butterflies_in_lanes<S>(S::load(y + i + r * S::kLanes));
    butterflies<S, Regs>(v);
    for (int r = 0; r < Regs; ++r) S::store(y + i + r * S::kLanes, v[r]);
  }
}

// Strides `stride` .. stride * Regs / 2 of `count` consecutive values; calls done(v) with each
// vector of the results.
template <class S, int Regs, typename F>
inline void next_pass(float* y, int64_t count, int64_t stride, const F& done) {
  for (int64_t block = 0; block < count; block += stride * Regs) {
    for (int64_t i = block; i < block + stride; i += S::kLanes) {
      typename S::F32 v[Regs];
      for (int r = 0; r < Regs; ++r) v[r] = S::load(y + i + r * stride);
      butterflies<S, Regs>(v);
      for (int r = 0; r < Regs; ++r) {
        S::store(y + i + r * stride, v[r]);
        done(v[r]);
      }
    }
  }
}

// Strides `stride` .. power / 2 of `count` consecutive values, at most eight vectors at once. The
// last pass calls `done`.
template <class S, typename F>
inline void next_passes(float* y, int64_t count, int64_t stride, int64_t power, const F& done) {
  const auto nothing = [](typename S::F32) SMOOTHROT_INLINE_LAMBDA {};
  for (; power > stride * 8; stride *= 8) next_pass<S, 8>(y, count, stride, nothing);
  if (power == stride * 8) next_pass<S, 8>(y, count, stride, done);
  if (power == stride * 4) next_pass<S, 4>(y, count, stride, done);
  if (power == stride * 2) next_pass<S, 2>(y, count, stride, done);
}

// Every run of `power` values among `count`.
template <class S>
inline void sylvester(float* y, int64_t count, int64_t power) {
  const auto nothing = [](typename S::F32) SMOOTHROT_INLINE_LAMBDA {};
  if (power >= 8 * S::kLanes) {
    first_pass<S, 8>(y, count);
    return next_passes<S>(y, count, 8 * S::kLanes, power, nothing);
  }
  if (power >= S::kLanes) {
    first_pass<S, 1>(y, count);
    return next_passes<S>(y, count, S::kLanes, power, nothing);
  }
  for (int64_t stride = 1; stride < power; stride *= 2) {  // runs shorter than a vector
    for (int64_t i = 0; i < count; ++i) {
      if (i & stride) continue;
      const float a = y[i], b = y[i + stride];
      y[i] = a + b;
      y[i + stride] = a - b;
    }
  }
}

// Largest |y| among `count` values and those before, see S::max_abs_bits.
template <class S>
inline typename S::I32 max_abs_bits_of(typename S::I32 top, const float* y, int64_t count) {
  int64_t i = 0;
  for (; i + S::kLanes <= count; i += S::kLanes) top = S::max_abs_bits(top, S::load(y + i));
  if (i == count) return top;
  float tail[S::kLanes] = {};
  for (int64_t t = i; t < count; ++t) tail[t - i] = y[t];
  return S::max_abs_bits(top, S::load(tail));
}

// ---- Base part: y_j = sum over groups of four runs of ((+-x_0 +- x_1) + (+-x_2 +- x_3)) ----
//
// The sixteen signed sums of a group are formed once and looked up by each output: base^2 / 4
// additions in place of base^2 (the method of four Russians).

constexpr int kGroupRuns = 4;
constexpr int kCombinations = 16;
constexpr int64_t kTableBytes = 32 * 1024;

template <class S, int Vecs>
constexpr int64_t groups_per_table() {
  return kTableBytes / (kCombinations * Vecs * S::kLanes * int64_t{sizeof(float)});
}

// All signed sums of four runs at x, x + pitch ...: bit i of the index negates run i.
template <class S, int Vecs>
inline void tabulate(const float* x, int64_t pitch, float* table) {
  using F32 = typename S::F32;
  constexpr int kWidth = Vecs * S::kLanes;
  const F32 zero = S::set1(-0.0f);
  for (int v = 0; v < Vecs; ++v) {
    const F32 x0 = S::load(x + v * S::kLanes), x1 = S::load(x + pitch + v * S::kLanes);
    const F32 x2 = S::load(x + 2 * pitch + v * S::kLanes),
              x3 = S::load(x + 3 * pitch + v * S::kLanes);
    const F32 p[4] = {S::add(x0, x1), S::sub(x1, x0), S::sub(x0, x1), S::sub(zero, S::add(x0, x1))};
    const F32 q[4] = {S::add(x2, x3), S::sub(x3, x2), S::sub(x2, x3), S::sub(zero, S::add(x2, x3))};
    for (int i = 0; i < kCombinations; ++i) {
      S::store(table + i * kWidth + v * S::kLanes, S::add(p[i % 4], q[i / 4]));
    }
  }
}

// Rows outputs at once: enough independent chains of additions to hide their latency. Returns `top`
// with them.
template <class S, int Vecs, int Rows>
inline typename S::I32 look_up(const float* table, const uint8_t* signs, int64_t sign_pitch,
                               int64_t groups, bool first, float* y, int64_t pitch,
                               typename S::I32 top) {
  constexpr int kWidth = Vecs * S::kLanes;
  typename S::F32 sum[Rows][Vecs];
  const auto each = [](const auto& f) SMOOTHROT_INLINE_LAMBDA {
    unroll<Rows>([&](auto r) SMOOTHROT_INLINE_LAMBDA {
      unroll<Vecs>([&](auto v) SMOOTHROT_INLINE_LAMBDA { f(r, v); });
    });
  };
  each([&](auto r, auto v) SMOOTHROT_INLINE_LAMBDA {
    sum[r][v] = first ? S::set1(-0.0f) : S::load(y + r * pitch + v * S::kLanes);
  });
  for (int64_t g = 0; g < groups; ++g, table += kCombinations * kWidth) {
    each([&](auto r, auto v) SMOOTHROT_INLINE_LAMBDA {
      const float* row = table + int64_t{signs[r * sign_pitch + g]} * kWidth;
      sum[r][v] = S::add(sum[r][v], S::load(row + v * S::kLanes));
    });
  }
  each([&](auto r, auto v) SMOOTHROT_INLINE_LAMBDA {
    S::store(y + r * pitch + v * S::kLanes, sum[r][v]);
    top = S::max_abs_bits(top, sum[r][v]);
  });
  return top;
}

// One slab of Vecs vectors out of runs `pitch` floats apart. Returns `top` with its results.
template <class S, int Vecs>
inline typename S::I32 base_slab(const float* x, float* y, int64_t pitch, const Rotation& h,
                                 float* table, typename S::I32 top) {
  const int64_t groups = h.base / kGroupRuns;
  for (int64_t first = 0; first < groups; first += groups_per_table<S, Vecs>()) {
    const int64_t left = groups - first;
    const int64_t count = left < groups_per_table<S, Vecs>() ? left : groups_per_table<S, Vecs>();
    for (int64_t g = 0; g < count; ++g) {
      tabulate<S, Vecs>(x + (first + g) * kGroupRuns * pitch, pitch,
                        table + g * kCombinations * Vecs * S::kLanes);
    }
    typename S::I32 found = top;
    for (int64_t j = 0; j < h.base; j += 4) {
      found = look_up<S, Vecs, 4>(table, h.signs + j * groups + first, groups, count, first == 0,
                                  y + j * pitch, pitch, found);
    }
    if (count == left) top = found;  // sums of some groups alone do not count
  }
  return top;
}

// Runs shorter than a vector are spread to whole vectors for the base part.
template <class S>
inline bool runs_are_short(const Rotation& h) {
  return h.base > 1 && h.power < S::kLanes;
}

// Bytes that rotate_block wants beside its values.
template <class S>
inline int64_t rotation_scratch(const Rotation& h) {
  if (h.base == 1) return 0;
  return kTableBytes + (runs_are_short<S>(h) ? 2 * h.base * S::kLanes * int64_t{sizeof(float)} : 0);
}

// Values that are read, and rotated as far as they go alone, while they are in the first-level
// cache.
constexpr int64_t kChunkValues = 1024;

// One block of base * power values, which load(i, count) writes to y + i: it is called for all of
// them, in order. `y` is used up; the result is in `out`, or in `y` for base 1. Returns `top` with
// the results.
template <class S, typename Load>
inline typename S::I32 rotate_block(float* y, float* out, const Rotation& h, void* scratch,
                                    typename S::I32 top, const Load& load) {
  const int64_t block = h.base * h.power;
  const int64_t power = h.power < kChunkValues ? h.power : kChunkValues;
  const int64_t chunk = kChunkValues / power * power;
  const bool ends_there = h.base == 1 && h.power == power;
  for (int64_t i = 0; i < block; i += chunk) {
    const int64_t count = block - i < chunk ? block - i : chunk;
    load(i, count);
    sylvester<S>(y + i, count, power);
    if (ends_there) top = max_abs_bits_of<S>(top, y + i, count);
  }
  if (h.base == 1) {
    next_passes<S>(y, block, power, h.power, [&](typename S::F32 v) SMOOTHROT_INLINE_LAMBDA {
      top = S::max_abs_bits(top, v);
    });
    return top;
  }
  next_passes<S>(y, block, power, h.power, [](typename S::F32) SMOOTHROT_INLINE_LAMBDA {});
  float* table = static_cast<float*>(scratch);
  if (runs_are_short<S>(h)) {
    float* spread = table + kTableBytes / sizeof(float);
    float* result = spread + h.base * S::kLanes;
    for (int64_t b = 0; b < h.base; ++b) {
      for (int64_t i = 0; i < S::kLanes; ++i)
        spread[b * S::kLanes + i] = i < h.power ? y[b * h.power + i] : 0.0f;
    }
    top = base_slab<S, 1>(spread, result, S::kLanes, h, table, top);
    for (int64_t b = 0; b < h.base; ++b) {
      for (int64_t i = 0; i < h.power; ++i) out[b * h.power + i] = result[b * S::kLanes + i];
    }
    return top;
  }
  int64_t i = 0;
  for (; i + 2 * S::kLanes <= h.power; i += 2 * S::kLanes) {
    top = base_slab<S, 2>(y + i, out + i, h.power, h, table, top);
  }
  if (i < h.power) top = base_slab<S, 1>(y + i, out + i, h.power, h, table, top);
  return top;
}

}  // namespace
}  // namespace smoothrot
