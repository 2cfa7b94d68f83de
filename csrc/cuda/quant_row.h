// SPDX-License-Identifier: Apache-2.0
// From a row's values, spread over the registers of a block, to its codes and scale:
// reference._quant_float32.
#pragma once

#include "device.h"
#include "launch.h"
#include "quant_source.h"

namespace smoothrot::cuda {

constexpr int kMostThreads = 512;
constexpr int kWarp = 32;
constexpr uint32_t kInfinityBits = 0x7F800000;
constexpr uint32_t kNotANumber = 0x7FC00000;
constexpr float kMinScale = 0x1p-100f;  // reference.QUANT_MIN_SCALE

struct RowArgs {
  QuantArgs q;
  float zero_scale;  // 1 / norm: what a zero row gets before norm is multiplied in
  int power_log2;
  int first_stages;   // butterfly strides done on values as they are loaded
  int middle_stages;  // in shared memory; for base 1 another three follow in registers
  int padding;        // floats after every 32 of the row
  int sign_pitch;
  uint32_t sign_pitch_inverse;  // 2^32 / sign_pitch, rounded up: divides what is below 2^16 exactly
  float mean_factor;            // 1 / inputs
};

// Shared memory: one word a warp, then the row, as floats padded against bank conflicts and later
// as codes, a byte each.
constexpr int kReductionBytes = kMostThreads / kWarp * int(sizeof(uint32_t));

SMOOTHROT_DEVICE uint32_t block_max(uint32_t value, uint32_t* scratch) {
  value = warp_max(value);
  if (thread_index() % kWarp == 0) scratch[thread_index() / kWarp] = value;
  block_barrier();
  const int warps = block_threads() / kWarp;
  for (int i = 0; i < warps; ++i) value = scratch[i] > value ? scratch[i] : value;
  return value;
}

// The low nibbles of eight bytes.
SMOOTHROT_DEVICE uint32_t join_nibbles(uint32_t low, uint32_t high) {
  const auto join = [](uint32_t w) {
    return (w & 0xF) | (w >> 4 & 0xF0) | (w >> 8 & 0xF00) | (w >> 12 & 0xF000);
  };
  return join(low) | join(high) << 16;
}

SMOOTHROT_DEVICE void write_codes(const QuantArgs& q, int64_t row, const unsigned char* staging) {
  const auto* words = reinterpret_cast<const Words4*>(staging);
  auto* out = static_cast<unsigned char*>(q.codes);
  const int inputs = int(q.inputs);
  if (q.form == Codes::int8) {
    for (int i = thread_index(); i < inputs / 16; i += block_threads()) {
      store_global(reinterpret_cast<Words4*>(out + row * inputs) + i, words[i]);
    }
    return;
  }
  for (int i = thread_index(); i < inputs / 32; i += block_threads()) {
    const Words4 a = words[2 * i], b = words[2 * i + 1];
    const Words4 packed{{join_nibbles(a.word[0], a.word[1]), join_nibbles(a.word[2], a.word[3]),
                         join_nibbles(b.word[0], b.word[1]), join_nibbles(b.word[2], b.word[3])}};
    store_global(reinterpret_cast<Words4*>(out + row * (inputs / 2)) + i, packed);
  }
}

// Unused entries of `values` are zero. `put(k, codes)` writes the codes of values[k], a byte in
// each word, to staging.
template <int Units, class Put>
SMOOTHROT_DEVICE void quantize_row(const RowArgs& a, int64_t row,
                                   const float (&values)[Units][kVector], uint32_t* scratch,
                                   const unsigned char* staging, const Put& put) {
  uint32_t top_bits = 0;
#pragma unroll
  for (int k = 0; k < Units; ++k) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const uint32_t bits = float_bits(values[k][i]) & 0x7FFFFFFF;
      top_bits = bits > top_bits ? bits : top_bits;
    }
  }
  top_bits = block_max(top_bits, scratch);  // past its barrier nobody reads the floats any more
  const bool finite = top_bits < kInfinityBits;
  float scale = multiply(bits_float(top_bits), a.q.factor);
  if (scale < kMinScale) scale = a.zero_scale;
  const float inverse = divide(1.0f, scale), high = a.q.bits == 4 ? 7.0f : 127.0f;
#pragma unroll
  for (int k = 0; k < Units; ++k) {
    uint32_t codes[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float rounded =
          add(clamp(multiply(values[k][i], inverse), -high - 1.0f, high), 12582912.0f);
      codes[i] =
          finite ? float_bits(rounded) & 0xFF : 0;  // 1.5 * 2^23 puts the integer in the low bits
    }
    put(k, codes);
  }
  block_barrier();
  write_codes(a.q, row, staging);
  if (thread_index() == 0) {
    store_global(a.q.scale + row, finite ? multiply(scale, a.q.norm) : bits_float(kNotANumber));
  }
}

SMOOTHROT_DEVICE Words2 join_bytes(const uint32_t (&codes)[kVector]) {
  Words2 out;
#pragma unroll
  for (int w = 0; w < 2; ++w) {
    const uint32_t* c = codes + 4 * w;
    out.word[w] = c[0] | c[1] << 8 | c[2] << 16 | c[3] << 24;
  }
  return out;
}

}  // namespace smoothrot::cuda
