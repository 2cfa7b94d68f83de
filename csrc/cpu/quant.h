// SPDX-License-Identifier: Apache-2.0
// Per-token quantization, with or without the rotation before it, into stored codes or into the
// gemm's tiles.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "../common/float16.h"
#include "gated.h"
#include "hadamard.h"
#include "kernels.h"
#include "rms_norm.h"
#include "rows.h"
#include "unroll.h"

namespace smoothrot {
namespace {

constexpr int32_t kInfinityBits = 0x7F800000;
// reference.QUANT_MIN_SCALE, 2^-100.
constexpr uint32_t kMinScaleBits = 0x0D800000;

// The scratch of one thread.
struct Scratch {
  float* values;   // one row, padded with zeros to whole vectors
  float* rotated;  // the same, where the rotation has a base part
  int8_t* codes;   // max_rows rows of code_pitch bytes
  void* rotation;  // see rotation_scratch
};

inline int64_t padded(int64_t inputs) { return round_up(inputs, 64); }

inline bool has_base(const QuantArgs& q) { return q.rotation && q.rotation->base > 1; }

inline Scratch divide(void* scratch, const QuantArgs& q, int64_t max_rows) {
  const int64_t pitch = padded(q.inputs);
  Scratch s{};
  s.values = static_cast<float*>(scratch);
  s.rotated = s.values + (has_base(q) ? pitch : 0);
  s.codes = reinterpret_cast<int8_t*>(s.rotated + pitch);
  s.rotation = s.codes + max_rows * pitch;
  return s;
}

template <class S>
int64_t scratch_bytes(const QuantArgs& q, int64_t max_rows) {
  const int64_t floats = has_base(q) ? 2 : 1;
  const int64_t rotation = q.rotation ? rotation_scratch<S>(*q.rotation) : 0;
  return padded(padded(q.inputs) * (floats * int64_t{sizeof(float)} + max_rows) + rotation);
}

// Codes of a row whose largest value is `top`, see S::max_abs_bits, one signed code a byte and
// zeros up to a multiple of 64; values(i, left) is the vector at i, of which `left` exist. Returns
// the scale.
template <class S, typename Values>
SMOOTHROT_INLINE float encode_row(const QuantArgs& q, typename S::I32 top, int8_t* codes,
                                  const Values& values) {
  const int64_t width = padded(q.inputs);
  const int32_t top_bits = S::reduce_max(top);
  if (top_bits >= kInfinityBits) {
    std::memset(codes, 0, size_t(width));
    return std::numeric_limits<float>::quiet_NaN();
  }
  float scale = f32_from_bits(uint32_t(top_bits)) * q.factor;
  if (scale < f32_from_bits(kMinScaleBits)) scale = float(1.0 / double(q.norm));
  const float high = q.bits == 4 ? 7.0f : 127.0f;
  const typename S::F32 inverse = S::set1(1.0f / scale);
  for_vectors<S>(q.inputs, [&](int64_t i, int64_t left) SMOOTHROT_INLINE_LAMBDA {
    S::store_codes(codes + i, S::mul(values(i, left), inverse), -high - 1, high);
  });
  const int64_t written = round_up(q.inputs, S::kLanes);
  std::memset(codes + written, 0, size_t(width - written));
  return scale * q.norm;
}

// A row as it is: read twice, which is less than to write it as float in between.
template <class S, Float D>
float quant_plain_row(const QuantArgs& q, int64_t row, int8_t* codes) {
  const auto load =
      [x = q.x, first = row * q.inputs](int64_t i, int64_t left)
          SMOOTHROT_INLINE_LAMBDA { return Elements<S, D>::load(x, first + i, left); };
  typename S::I32 top = S::zero();
  for_vectors<S>(q.inputs, [&](int64_t i, int64_t left) SMOOTHROT_INLINE_LAMBDA {
    top = S::max_abs_bits(top, load(i, left));
  });
  return encode_row<S>(q, top, codes, load);
}

// A row that is normed, gated or rotated before.
template <class S>
float quant_made_row(const QuantArgs& q, int64_t row, const Scratch& scratch, int8_t* codes) {
  if (q.source == Source::rms_norm) load_normed_row<S>(q, row, scratch.values);
  const auto load = [&](int64_t i, int64_t count) {
    if (is_gated(q.source)) {
      const int64_t gate = row * 2 * q.inputs + i;
      load_gated<S>(q, gate, gate + q.inputs, count, scratch.values + i);
    } else if (q.source == Source::plain) {
      load_row<S>(q.x, q.dtype, row * q.inputs + i, count, scratch.values + i);
    }
  };
  typename S::I32 top = S::zero();
  const int64_t block = q.rotation ? q.rotation->base * q.rotation->power : kChunkValues;
  for (int64_t b = 0; b < q.inputs; b += block) {
    if (q.rotation) {
      top = rotate_block<S>(scratch.values + b, scratch.rotated + b, *q.rotation, scratch.rotation,
                            top, [&](int64_t i, int64_t count) { load(b + i, count); });
    } else {
      const int64_t count = q.inputs - b < block ? q.inputs - b : block;
      load(b, count);
      top = max_abs_bits_of<S>(top, scratch.values + b, count);
    }
  }
  float* y = scratch.rotated;
  for (int64_t i = q.inputs; i < round_up(q.inputs, S::kLanes); ++i) y[i] = 0.0f;
  return encode_row<S>(q, top, codes,
                       [y](int64_t i, int64_t) SMOOTHROT_INLINE_LAMBDA { return S::load(y + i); });
}

// Row `row` to one signed code a byte; returns its scale.
template <class S>
float quant_row(const QuantArgs& q, int64_t row, const Scratch& scratch, int8_t* codes) {
  if (q.source != Source::plain || q.rotation) return quant_made_row<S>(q, row, scratch, codes);
  switch (q.dtype) {
    case Float::f32:
      return quant_plain_row<S, Float::f32>(q, row, codes);
    case Float::bf16:
      return quant_plain_row<S, Float::bf16>(q, row, codes);
    default:
      return quant_plain_row<S, Float::f16>(q, row, codes);
  }
}

inline void join_nibbles(const int8_t* codes, uint8_t* out, int64_t inputs) {
  for (int64_t i = 0; i < inputs / 2; ++i) {
    out[i] = uint8_t((uint8_t(codes[2 * i]) & 0xF) | uint8_t(codes[2 * i + 1]) << 4);
  }
}

inline void split_nibbles(const uint8_t* in, int8_t* codes, int64_t inputs) {
  for (int64_t i = 0; i < inputs / 2; ++i) {
    codes[2 * i] = int8_t(int8_t(in[i] << 4) >> 4);
    codes[2 * i + 1] = int8_t(int8_t(in[i]) >> 4);
  }
}

template <class S>
void quant_rows(const QuantArgs& q, void* codes, float* scale, int64_t begin, int64_t end,
                void* scratch) {
  const Scratch s = divide(scratch, q, 1);
  auto* out = static_cast<uint8_t*>(codes);
  for (int64_t row = begin; row < end; ++row) {
    scale[row] = quant_row<S>(q, row, s, s.codes);
    if (q.bits == 4) {
      join_nibbles(s.codes, out + row * q.inputs / 2, q.inputs);
    } else {
      std::memcpy(out + row * q.inputs, s.codes, size_t(q.inputs));
    }
  }
}

template <class S>
int32_t sum_of(const int8_t* codes, int64_t count) {
  constexpr int64_t kWidth = S::kLanes * int64_t{sizeof(int32_t)};
  const typename S::I32 ones = S::set1(0x01010101);
  typename S::I32 sums = S::zero();
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth)
    sums = S::template dot4<4>(sums, ones, S::load_bytes(codes + i));
  int32_t sum = S::reduce_add(sums);
  for (; i < count; ++i) sum += codes[i];
  return sum;
}

// `steps` words of each of `rows` rows, one step of all rows after the other.
template <class S>
void interleave(const int8_t* codes, int64_t pitch, int64_t rows, int64_t steps, int32_t* words) {
  if (rows == 1) {
    std::memcpy(words, codes, size_t(steps * kStepInputs));
    return;
  }
  int64_t s = 0;
  if constexpr (S::kInterleavedSteps > 0) {
    // Its last vectors reach up to 16 - rows words beyond, over steps that are written after them.
    constexpr int64_t kBeyond = 4;
    for (; rows * kBeyond >= S::kLanes && s + S::kInterleavedSteps + kBeyond <= steps;
         s += S::kInterleavedSteps) {
      S::interleave(codes + s * kStepInputs, pitch, rows, words + s * rows);
    }
  }
  for (; s < steps; ++s) {
    for (int64_t r = 0; r < rows; ++r) {
      std::memcpy(words + s * rows + r, codes + r * pitch + s * kStepInputs, kStepInputs);
    }
  }
}

// Where the sums of a row begin, each `rows` after the other.
template <class S>
void start_row(const TileArgs& t, const int8_t* codes, int64_t rows, int32_t* start) {
  const int64_t inputs = t.weight.inputs;
  if (t.sums == Sums::whole) {
    *start = -t.offset * sum_of<S>(codes, inputs);
    return;
  }
  if constexpr (!S::kSumsSpans) {
    const int64_t size = t.weight.group_steps * kStepInputs;
    for (int64_t k = 0; k < inputs; k += size, start += rows)
      *start = -t.offset * sum_of<S>(codes + k, size);
  } else {
    int64_t k = 0;
    for (; k + kSpanInputs <= inputs; k += kSpanInputs, start += rows)
      *start = S::start_pairs(codes + k, t.offset);
    if (k < inputs) {
      int8_t tail[kSpanInputs] = {};
      std::memcpy(tail, codes + k, size_t(inputs - k));
      *start = S::start_pairs(tail, t.offset);
    }
  }
}

// Rows of codes into tile `tile`: words interleaved by row, and where each sum starts.
template <class S>
void pack_tile(const TileArgs& t, int64_t tile, const int8_t* codes, int64_t pitch) {
  const WeightLayout& w = t.weight;
  const int64_t first = tile_begin(t.tiles, tile), rows = tile_begin(t.tiles, tile + 1) - first;
  int32_t* words = t.words + first * w.steps;
  int32_t* start = t.start + first * t.starts();
  for (int64_t r = 0; r < rows; ++r) start_row<S>(t, codes + r * pitch, rows, start + r);
  const int64_t whole = w.inputs / kStepInputs;
  interleave<S>(codes, pitch, rows, whole, words);
  for (int64_t r = 0; whole < w.steps && r < rows; ++r) {
    int32_t word = 0;
    std::memcpy(&word, codes + r * pitch + whole * kStepInputs,
                size_t(w.inputs - whole * kStepInputs));
    words[whole * rows + r] = word;
  }
}

template <class S>
void quant_tiles(const QuantArgs& q, const TileArgs& t, int64_t begin, int64_t end, void* scratch) {
  const Scratch s = divide(scratch, q, t.tiles.rows + 1);
  const int64_t pitch = padded(q.inputs);
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t first = tile_begin(t.tiles, tile), rows = tile_begin(t.tiles, tile + 1) - first;
    for (int64_t r = 0; r < rows; ++r)
      t.scale[first + r] = quant_row<S>(q, first + r, s, s.codes + r * pitch);
    pack_tile<S>(t, tile, s.codes, pitch);
  }
}

template <class S>
void decode_tiles(const void* codes, int bits, const TileArgs& t, int64_t begin, int64_t end,
                  void* scratch) {
  const int64_t inputs = t.weight.inputs, pitch = padded(inputs);
  auto* rows_of_codes = static_cast<int8_t*>(scratch);
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t first = tile_begin(t.tiles, tile), rows = tile_begin(t.tiles, tile + 1) - first;
    if (bits == 8) {
      pack_tile<S>(t, tile, static_cast<const int8_t*>(codes) + first * inputs, inputs);
      continue;
    }
    for (int64_t r = 0; r < rows; ++r) {
      split_nibbles(static_cast<const uint8_t*>(codes) + (first + r) * inputs / 2,
                    rows_of_codes + r * pitch, inputs);
    }
    pack_tile<S>(t, tile, rows_of_codes, pitch);
  }
}

}  // namespace
}  // namespace smoothrot
