// SPDX-License-Identifier: Apache-2.0
// Quantization of rows that stay in registers: unrotated ones, those of a rotation within eight
// values, and RMS norm.
#pragma once

#include "butterflies.h"
#include "quant_row.h"

namespace smoothrot::cuda {

// Vector `unit` of eight values to staging.
struct PutVector {
  unsigned char* staging;
  int inputs;

  SMOOTHROT_DEVICE void operator()(int k, const uint32_t (&codes)[kVector]) const {
    const int first = (thread_index() + k * block_threads()) * kVector;
    if (first < inputs) *reinterpret_cast<Words2*>(staging + first) = join_bytes(codes);
  }
};

template <Source S, int Units>
SMOOTHROT_KERNEL(kMostThreads)
quant_rows(const RowArgs a) {
  auto* scratch = reinterpret_cast<uint32_t*>(shared_memory());
  unsigned char* staging = shared_memory() + kReductionBytes;
  const int64_t row = block_index_x();
  float values[Units][kVector];
#pragma unroll
  for (int k = 0; k < Units; ++k) {
    const int first = (thread_index() + k * block_threads()) * kVector;
    if (first < a.q.inputs) {
      load_values<S>(a.q, row, first, values[k]);
      butterflies(values[k], a.first_stages);
    } else {
#pragma unroll
      for (float& value : values[k]) value = 0.0f;
    }
  }
  quantize_row(a, row, values, scratch, staging, PutVector{staging, int(a.q.inputs)});
}

constexpr int kNormThreads = 256;  // with kVector accumulators each, reference.NORM_ACCUMULATORS

SMOOTHROT_DEVICE float pairwise_sum(const float* s) {
  return add(add(add(s[0], s[1]), add(s[2], s[3])), add(add(s[4], s[5]), add(s[6], s[7])));
}

// Neighboring accumulators are added pairwise, then those of lanes and warps, so every lane ends
// with the same bits.
SMOOTHROT_DEVICE float norm_sum(const float (&s)[kVector], float* scratch) {
  float sum = pairwise_sum(s);
#pragma unroll
  for (int mask = 1; mask < kWarp; mask *= 2)
    sum = add(sum, bits_float(shuffle_xor(float_bits(sum), mask)));
  if (thread_index() % kWarp == 0) scratch[thread_index() / kWarp] = sum;
  block_barrier();
  return pairwise_sum(scratch);
}

// residual += x, rounded to their dtype; y becomes the new residual.
SMOOTHROT_DEVICE void add_residual(const QuantArgs& q, int64_t first, float (&y)[kVector]) {
  Words4* words = reinterpret_cast<Words4*>(static_cast<unsigned char*>(q.residual) +
                                            first * (q.dtype == Float::f32 ? 4 : 2));
  if (q.dtype == Float::f32) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Words4 w = load_mutable(words + half);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& value = y[4 * half + i];
        value = add(value, bits_float(w.word[i]));
        w.word[i] = float_bits(value);
      }
      store_global(words + half, w);
    }
    return;
  }
  Words4 w = load_mutable(words);
  float old[kVector];
  split_vector(w, q.dtype, old);
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    y[i] = round_to(q.dtype, add(y[i], old[i]));
    const uint32_t half = q.dtype == Float::bf16 ? float_bf16(y[i]) : float_f16(y[i]);
    w.word[i / 2] = i % 2 ? w.word[i / 2] | half << 16 : half;
  }
  store_global(words, w);
}

template <int Units>
SMOOTHROT_KERNEL(kNormThreads, 1)
rms_norm_rows(const RowArgs a) {
  auto* scratch = reinterpret_cast<uint32_t*>(shared_memory());
  auto* warp_sums = reinterpret_cast<float*>(shared_memory() + kReductionBytes);
  unsigned char* staging = shared_memory() + 2 * kReductionBytes;
  const QuantArgs& q = a.q;
  const int64_t row = block_index_x();
  float values[Units][kVector];
  float sums[kVector] = {};
#pragma unroll
  for (int k = 0; k < Units; ++k) {
    const int first = (thread_index() + k * kNormThreads) * kVector;
    if (first < q.inputs) {
      load_vector(q.x, q.dtype, row * q.inputs + first, values[k]);
      if (q.residual) add_residual(q, row * q.inputs + first, values[k]);
    } else {
#pragma unroll
      for (float& value : values[k]) value = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) sums[i] = add(sums[i], multiply(values[k][i], values[k][i]));
  }
  const float sum = norm_sum(sums, warp_sums);
  const float inverse = divide(1.0f, square_root(add(multiply(sum, a.mean_factor), q.epsilon)));
#pragma unroll
  for (int k = 0; k < Units; ++k) {
    const int first = (thread_index() + k * kNormThreads) * kVector;
    float weight[kVector];
    const bool weighted = q.norm_weight && first < q.inputs;
    if (weighted) load_vector(q.norm_weight, q.dtype, first, weight);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      values[k][i] = multiply(values[k][i], inverse);
      if (weighted) values[k][i] = multiply(values[k][i], weight[i]);
    }
  }
  quantize_row(a, row, values, scratch, staging, PutVector{staging, int(q.inputs)});
}

}  // namespace smoothrot::cuda
