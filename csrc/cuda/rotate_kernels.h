// SPDX-License-Identifier: Apache-2.0
// The block Hadamard transform of a row in shared memory, then its quantization: one read and one
// write of the row.
//
// The order of additions is reference.hadamard_transform's. The last stage leaves its results in
// registers: for base 1 three butterfly strides, eight values a unit; else the base step, up to
// eight outputs a unit.
#pragma once

#include <type_traits>

#include "butterflies.h"
#include "quant_row.h"

namespace smoothrot::cuda {

// Floats of padding after every 32: keeps strided butterflies off each other's banks, and vectors
// aligned.
constexpr int kPadding = 4;

SMOOTHROT_DEVICE int padded(int i, int padding) { return i + i / 32 * padding; }

// Values `stride` apart, 2^log2_stride of them between neighbors of one butterfly.
SMOOTHROT_DEVICE int first_of_butterfly(int i, int log2_stride, int log2_radix) {
  const int within = i & ((1 << log2_stride) - 1);
  return ((i >> log2_stride) << (log2_stride + log2_radix)) | within;
}

template <int Log2Radix>
SMOOTHROT_DEVICE void butterfly_pass(float* values, int inputs, int log2_stride, int padding) {
  constexpr int kRadix = 1 << Log2Radix;
  for (int i = thread_index_anew(); i < inputs / kRadix; i += block_threads()) {
    const int first = first_of_butterfly(i, log2_stride, Log2Radix);
    float v[kRadix];
#pragma unroll
    for (int r = 0; r < kRadix; ++r) v[r] = values[padded(first + (r << log2_stride), padding)];
    butterflies(v);
#pragma unroll
    for (int r = 0; r < kRadix; ++r) values[padded(first + (r << log2_stride), padding)] = v[r];
  }
  block_barrier();
}

SMOOTHROT_DEVICE void middle_passes(float* values, int inputs, int log2_stride, int stages,
                                    int padding) {
  if (stages % 3 == 1) butterfly_pass<1>(values, inputs, log2_stride, padding);
  if (stages % 3 == 2) butterfly_pass<2>(values, inputs, log2_stride, padding);
  log2_stride += stages % 3;
  for (int left = stages / 3; left > 0; --left, log2_stride += 3)
    butterfly_pass<3>(values, inputs, log2_stride, padding);
}

// How the signs of the base matrix are kept in shared memory: four floats +-1 for each output of a
// group of four runs, or, where that would take too much, the words of pack_signs.
enum class Base { none, floats, words };

constexpr int64_t kMostBaseOfFloats = 60;

constexpr Base signs_kept(int64_t base) {
  return base == 1 ? Base::none : base <= kMostBaseOfFloats ? Base::floats : Base::words;
}

template <Base B>
using Signs = std::conditional_t<B == Base::floats, Words4, uint32_t>;

template <Base B>
SMOOTHROT_DEVICE void load_signs(const RowArgs& a, Signs<B>* signs) {
  for (int i = thread_index(); i < int(a.q.rotation.base) / 4 * a.sign_pitch;
       i += block_threads()) {
    const uint32_t minus = load_global(a.q.rotation.signs + i);
    if constexpr (B == Base::words) {
      signs[i] = minus;
    } else {
      for (int bit = 0; bit < 32; ++bit) {
        signs[i * kVector + bit / 4].word[bit % 4] = float_bits(1.0f) | (minus >> bit & 1) << 31;
      }
    }
  }
}

// (+-r0 +- r1) + (+-r2 +- r3): a product with +-1 is exact, so each multiply_add rounds once, as an
// addition does.
SMOOTHROT_DEVICE float signed_sum(const float (&r)[4], const Words4& sign) {
  const float u =
      multiply_add(r[1], bits_float(sign.word[1]), multiply(r[0], bits_float(sign.word[0])));
  const float v =
      multiply_add(r[3], bits_float(sign.word[3]), multiply(r[2], bits_float(sign.word[2])));
  return add(u, v);
}

SMOOTHROT_DEVICE void add_signed_sums(const float (&r)[4], const Words4* signs,
                                      float (&sums)[kVector]) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) sums[i] = add(sums[i], signed_sum(r, signs[i]));
}

SMOOTHROT_DEVICE float flip(float value, uint32_t sign_at_top) {
  return bits_float(float_bits(value) ^ (sign_at_top & 0x80000000u));
}

SMOOTHROT_DEVICE void add_signed_sums(const float (&r)[4], const uint32_t* signs,
                                      float (&sums)[kVector]) {
  const float sum01 = add(r[0], r[1]), difference01 = subtract(r[0], r[1]);
  const float sum23 = add(r[2], r[3]), difference23 = subtract(r[2], r[3]);
  const uint32_t minus = *signs, differ = minus ^ minus >> 1;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const float u = flip(differ >> (4 * i) & 1 ? difference01 : sum01, minus << (31 - 4 * i));
    const float v = flip(differ >> (4 * i + 2) & 1 ? difference23 : sum23, minus << (29 - 4 * i));
    sums[i] = add(sums[i], add(u, v));
  }
}

// Eight outputs at one position of the base matrix's runs, which are `pitch` floats apart; `x` is
// that position in the first run and `signs` are those of the first four runs.
template <class Sign>
SMOOTHROT_DEVICE void base_step(const float* x, int pitch, int groups, const Sign* signs,
                                int signs_per_group, float (&sums)[kVector]) {
#pragma unroll
  for (float& sum : sums) sum = 0.0f;
#pragma unroll 1
  for (int g = 0; g < groups; ++g) {
    const float r[4] = {x[0], x[pitch], x[2 * pitch], x[3 * pitch]};
    add_signed_sums(r, signs, sums);
    x += 4 * pitch;
    signs += signs_per_group;
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

template <Base B>
SMOOTHROT_DEVICE Unit unit_at(const RowArgs& a, int index) {
  if constexpr (B != Base::none) {
    const int base = int(a.q.rotation.base), within = index & ((1 << a.power_log2) - 1),
              rest = index >> a.power_log2;
    const int block = int(uint64_t{uint32_t(rest)} * a.sign_pitch_inverse >> 32),
              octet = rest - block * a.sign_pitch;
    const int block_start = (block * base << a.power_log2) + within, left = base - octet * kVector;
    const int count = block_start >= a.q.inputs ? 0 : left < kVector ? left : kVector;
    return {block_start + (octet * kVector << a.power_log2), a.power_log2, count, block_start,
            octet};
  } else {
    const int log2_stride = a.power_log2 - 3;
    const int count = index * kVector < a.q.inputs ? kVector : 0;
    return {first_of_butterfly(index, log2_stride, 3), log2_stride, count, 0, 0};
  }
}

template <Base B>
struct PutUnit {
  const RowArgs& a;
  unsigned char* staging;

  SMOOTHROT_DEVICE void operator()(int k, const uint32_t (&codes)[kVector]) const {
    const Unit unit = unit_at<B>(a, thread_index_anew() + k * block_threads());
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (i < unit.count)
        staging[unit.first + (i << unit.log2_stride)] = static_cast<unsigned char>(codes[i]);
    }
  }
};

template <Source S, int Units, Base B>
SMOOTHROT_KERNEL(kMostThreads)
rotate_rows(const RowArgs a) {
  auto* scratch = reinterpret_cast<uint32_t*>(shared_memory());
  auto* values = reinterpret_cast<float*>(shared_memory() + kReductionBytes);
  auto* staging = reinterpret_cast<unsigned char*>(values);
  const int inputs = int(a.q.inputs), padding = B == Base::none ? kPadding : a.padding;
  auto* signs = reinterpret_cast<Signs<B>*>(values + padded(inputs, kPadding));
  if constexpr (B != Base::none) load_signs<B>(a, signs);
  [[maybe_unused]] constexpr int kLoadsAhead = S == Source::plain ? 2 : 1;
  for (int row = block_index_x(); row < int(a.q.tokens); row += block_count_x()) {
    if (row != block_index_x()) block_barrier();  // the last row's codes have been read
#pragma unroll kLoadsAhead
    for (int first = thread_index_anew() * kVector; first < inputs;
         first += block_threads() * kVector) {
      float v[kVector];
      load_values<S>(a.q, row, first, v);
      butterflies(v, a.first_stages);
      auto* target = reinterpret_cast<Words4*>(values + padded(first, padding));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float* w = v + 4 * half;
        target[half] = {{float_bits(w[0]), float_bits(w[1]), float_bits(w[2]), float_bits(w[3])}};
      }
    }
    block_barrier();
    middle_passes(values, inputs, a.first_stages, a.middle_stages, padding);
    float results[Units][kVector];
#pragma unroll
    for (int k = 0; k < Units; ++k) {
      const Unit unit = unit_at<B>(a, thread_index_anew() + k * block_threads());
      if constexpr (B != Base::none) {
        constexpr int kSignsPerOctet = B == Base::floats ? kVector : 1;
        // Runs start at equal distances: they are whole multiples of 32, or nothing is padded.
        base_step(values + padded(unit.count ? unit.block_start : 0, padding),
                  padded(1 << a.power_log2, padding), int(a.q.rotation.base) / 4,
                  signs + unit.octet * kSignsPerOctet, a.sign_pitch * kSignsPerOctet, results[k]);
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          if (i >= unit.count) results[k][i] = 0.0f;
        }
      } else {
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          results[k][i] =
              unit.count ? values[padded(unit.first + (i << unit.log2_stride), padding)] : 0.0f;
        }
        butterflies(results[k]);
      }
    }
    quantize_row(a, row, results, scratch, staging, PutUnit<B>{a, staging});
  }
}

}  // namespace smoothrot::cuda
