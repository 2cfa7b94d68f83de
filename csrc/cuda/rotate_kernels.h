// SPDX-License-Identifier: Apache-2.0
// The block Hadamard transform of a row in shared memory, then its quantisation: one read and one write of the row.
//
// The order of additions is reference.hadamard_transform's. The last stage leaves its results in registers: for base 1
// three butterfly strides, eight values a unit; else the base step, up to eight outputs a unit.
#pragma once

#include "butterflies.h"
#include "quant_row.h"

namespace smoothrot::cuda {

// Floats of padding after every 32: keeps strided butterflies off each other's banks, and vectors aligned.
constexpr int kPadding = 4;

SMOOTHROT_DEVICE int padded(int i) { return i + i / 32 * kPadding; }

// Values `stride` apart, 2^log2_stride of them between neighbours of one butterfly.
SMOOTHROT_DEVICE int first_of_butterfly(int i, int log2_stride, int log2_radix) {
  const int within = i & ((1 << log2_stride) - 1);
  return ((i >> log2_stride) << (log2_stride + log2_radix)) | within;
}

template <int Log2Radix>
SMOOTHROT_DEVICE void butterfly_pass(float* values, int inputs, int log2_stride) {
  constexpr int kRadix = 1 << Log2Radix;
  for (int i = thread_index_anew(); i < inputs / kRadix; i += block_threads()) {
    const int first = first_of_butterfly(i, log2_stride, Log2Radix);
    float v[kRadix];
#pragma unroll
    for (int r = 0; r < kRadix; ++r) v[r] = values[padded(first + (r << log2_stride))];
    butterflies(v);
#pragma unroll
    for (int r = 0; r < kRadix; ++r) values[padded(first + (r << log2_stride))] = v[r];
  }
  block_barrier();
}

SMOOTHROT_DEVICE void middle_passes(float* values, int inputs, int log2_stride, int stages) {
  if (stages % 3 == 1) butterfly_pass<1>(values, inputs, log2_stride);
  if (stages % 3 == 2) butterfly_pass<2>(values, inputs, log2_stride);
  log2_stride += stages % 3;
  for (int left = stages / 3; left > 0; --left, log2_stride += 3) butterfly_pass<3>(values, inputs, log2_stride);
}

SMOOTHROT_DEVICE float flip(float value, uint32_t sign_at_top) {
  return bits_float(float_bits(value) ^ (sign_at_top & 0x80000000u));
}

// Eight outputs at one position of the base matrix's runs; `signs` is the column of words of those outputs.
SMOOTHROT_DEVICE void base_step(const float* values, int first, int log2_run, int base, const uint32_t* signs,
                                int sign_pitch, float (&sums)[kVector]) {
#pragma unroll
  for (float& sum : sums) sum = 0.0f;
#pragma unroll 1
  for (int g = 0; g < base / 4; ++g) {
    float r[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) r[i] = values[padded(first + ((4 * g + i) << log2_run))];
    const float sum01 = add(r[0], r[1]), difference01 = subtract(r[0], r[1]);
    const float sum23 = add(r[2], r[3]), difference23 = subtract(r[2], r[3]);
    const uint32_t minus = signs[g * sign_pitch], differ = minus ^ minus >> 1;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float u = flip(differ >> (4 * i) & 1 ? difference01 : sum01, minus << (31 - 4 * i));
      const float v = flip(differ >> (4 * i + 2) & 1 ? difference23 : sum23, minus << (29 - 4 * i));
      sums[i] = add(sums[i], add(u, v));
    }
  }
}

// Where the eight results of a unit lie in the row.
struct Unit {
  int first;
  int log2_stride;
  int count;        // 0: no such unit
  int block_start;  // with a base: where the position of these results is in the block's first run
  int octet;        // and which of the base matrix's columns they are, in eights
};

template <bool Base>
SMOOTHROT_DEVICE Unit unit_at(const RowArgs& a, int index) {
  if constexpr (Base) {
    const int base = int(a.q.rotation.base), within = index & ((1 << a.power_log2) - 1), rest = index >> a.power_log2;
    const int block = int(uint64_t{uint32_t(rest)} * a.sign_pitch_inverse >> 32), octet = rest - block * a.sign_pitch;
    const int block_start = (block * base << a.power_log2) + within, left = base - octet * kVector;
    const int count = block_start >= a.q.inputs ? 0 : left < kVector ? left : kVector;
    return {block_start + (octet * kVector << a.power_log2), a.power_log2, count, block_start, octet};
  } else {
    const int log2_stride = a.power_log2 - 3;
    const int count = index * kVector < a.q.inputs ? kVector : 0;
    return {first_of_butterfly(index, log2_stride, 3), log2_stride, count, 0, 0};
  }
}

template <bool Base>
struct PutUnit {
  const RowArgs& a;
  unsigned char* staging;

  SMOOTHROT_DEVICE void operator()(int k, const uint32_t (&codes)[kVector]) const {
    const Unit unit = unit_at<Base>(a, thread_index_anew() + k * block_threads());
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (i < unit.count) staging[unit.first + (i << unit.log2_stride)] = static_cast<unsigned char>(codes[i]);
    }
  }
};

template <Source S, int Units, bool Base>
SMOOTHROT_KERNEL(kMostThreads)
rotate_rows(const RowArgs a) {
  auto* scratch = reinterpret_cast<uint32_t*>(shared_memory());
  auto* values = reinterpret_cast<float*>(shared_memory() + kReductionBytes);
  auto* staging = reinterpret_cast<unsigned char*>(values);
  const int inputs = int(a.q.inputs), base = int(a.q.rotation.base);
  auto* signs = reinterpret_cast<uint32_t*>(values + padded(inputs));
  if constexpr (Base) {
    for (int i = thread_index(); i < base / 4 * a.sign_pitch; i += block_threads()) {
      signs[i] = load_global(a.q.rotation.signs + i);
    }
  }
  [[maybe_unused]] constexpr int kLoadsAhead = S == Source::plain ? 2 : 1;
  for (int row = block_index_x(); row < int(a.q.tokens); row += block_count_x()) {
    if (row != block_index_x()) block_barrier();  // the last row's codes have been read
#pragma unroll kLoadsAhead
    for (int first = thread_index_anew() * kVector; first < inputs; first += block_threads() * kVector) {
      float v[kVector];
      load_values<S>(a.q, row, first, v);
      butterflies(v, a.first_stages);
      auto* target = reinterpret_cast<Words4*>(values + padded(first));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float* w = v + 4 * half;
        target[half] = {{float_bits(w[0]), float_bits(w[1]), float_bits(w[2]), float_bits(w[3])}};
      }
    }
    block_barrier();
    middle_passes(values, inputs, a.first_stages, a.middle_stages);
    float results[Units][kVector];
#pragma unroll
    for (int k = 0; k < Units; ++k) {
      const Unit unit = unit_at<Base>(a, thread_index_anew() + k * block_threads());
      if constexpr (Base) {
        const int start = unit.count ? unit.block_start : 0;
        base_step(values, start, a.power_log2, base, signs + unit.octet, a.sign_pitch, results[k]);
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          if (i >= unit.count) results[k][i] = 0.0f;
        }
      } else {
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          results[k][i] = unit.count ? values[padded(unit.first + (i << unit.log2_stride))] : 0.0f;
        }
        butterflies(results[k]);
      }
    }
    quantise_row(a, row, results, scratch, staging, PutUnit<Base>{a, staging});
  }
}

}  // namespace smoothrot::cuda
