// SPDX-License-Identifier: Apache-2.0
// y = x W^T for at most 16 tokens: every weight is read once, straight into the registers of the
// warp that multiplies it.
//
// A block holds 16 * Tiles outputs. Its warps take turns over the inputs and add their int32 sums
// in shared memory, so the result does not depend on the order. Weights are operand A (16 outputs a
// tile), tokens operand B (eight a tile): any order of inputs serves as long as both sides share
// it, so each lane takes 32 neighboring inputs of a row, which have one group scale.
//
// With groups the int4 MMA is not used even where it exists: it adds up the inputs of four lanes,
// which for groups of 32 and 64 are of several groups. The int8 MMA takes weights that each lane
// has multiplied by its own scale. For 8 KiB of weights a warp then issues 16 x (4 x 7 + 3)
// instructions to unpack them, 350 of them to the ALU, which takes two cycles each, and 32 or 64
// MMAs of eight cycles: about 700 cycles, in which DRAM brings less than half of that (by data
// sheets, 3200 cycles on an A100 and 1800 on an H200; not measured).
#pragma once

#include "gemm_common.h"

namespace smoothrot::cuda {

constexpr int kSmallWarps = 8;
constexpr int kSmallThreads = kSmallWarps * 32;
constexpr int kLaneInputs = 32;
constexpr int kChunkInputs = 4 * kLaneInputs;
constexpr int kTileOutputs = 16;
constexpr int kOctet = 8;

// 16-byte words that a lane's inputs of a row take.
template <Codes Form>
constexpr int kLaneWords = Form == Codes::packed_int4 ? 1 : 2;

// One lane's share of a chunk of inputs; with groups the scale of each row's.
template <Codes Form, Codes Weight, bool Grouped, int Tiles, int Octets>
struct SmallChunk {
  Words4 weight[Tiles][2][kLaneWords<Weight>];
  uint32_t group_scale[Tiles][2];
  Words4 codes[Octets][kLaneWords<Form>];
};

// log2 of the group size: a division would be a call.
SMOOTHROT_DEVICE int group_shift(const GemmArgs& g) {
  return g.group_size == 32 ? 5 : g.group_size == 64 ? 6 : 7;
}

template <Codes Form, Codes Weight, bool Grouped, int Tiles, int Octets>
SMOOTHROT_DEVICE void load_chunk(const GemmArgs& g, int first_output, int first_input,
                                 SmallChunk<Form, Weight, Grouped, Tiles, Octets>& chunk) {
  constexpr int kWeightWords = kLaneWords<Weight>, kCodeWords = kLaneWords<Form>;
  const int lane = thread_index() % 32, inputs = int(g.inputs),
            input = first_input + lane % 4 * kLaneInputs;
  const bool inside = input < inputs;
  // Within a block's rows offsets fit 32 bits.
  const auto* weight = static_cast<const unsigned char*>(g.weight) +
                       int64_t{first_output} * (inputs / 2) * kWeightWords;
#pragma unroll
  for (int i = 0; i < 2 * Tiles; ++i) {
    const int row = i * kOctet + lane / 4;
    const auto* words =
        reinterpret_cast<const Words4*>(weight + (row * inputs + input) / 2 * kWeightWords);
    const bool wanted = inside && first_output + row < g.outputs;
#pragma unroll
    for (int w = 0; w < kWeightWords; ++w)
      chunk.weight[i / 2][i % 2][w] = load_once(words + w, wanted);
    if constexpr (Grouped) {  // of rows and inputs beyond the weight any: their codes are zeros
      const int shift = group_shift(g), pitch = ((inputs >> shift) + kWordGroups - 1) / kWordGroups;
      const uint32_t* scales = g.group_scale + int64_t{first_output} * pitch;
      const int place = row * pitch + (input >> shift) / kWordGroups;
      chunk.group_scale[i / 2][i % 2] = load_global(scales + (wanted ? place : 0));
    }
  }
  const auto* codes = static_cast<const unsigned char*>(g.codes);
#pragma unroll
  for (int o = 0; o < Octets; ++o) {
    const int token = o * kOctet + lane / 4;
#pragma unroll
    for (int w = 0; w < kCodeWords; ++w) {
      chunk.codes[o][w] = {};
      if (inside && token < g.tokens) {
        const unsigned char* row = codes + (token * inputs + input) / 2 * kCodeWords;
        chunk.codes[o][w] = load_global(reinterpret_cast<const Words4*>(row) + w);
      }
    }
  }
}

template <Codes Form, Codes Weight, bool Grouped>
constexpr bool kSmallInt4 = kUsesInt4<Form, Weight> && !Grouped;

// Eight inputs, the w-th of four, of what a lane holds of a row.
template <Codes Form, Codes Other, int Words>
SMOOTHROT_DEVICE void lane_inputs(const Words4 (&row)[Words], int w, uint32_t& first,
                                  uint32_t& second) {
  eight_inputs<Form, Other>(row[w * Words / 4].word + w * Words % 4, first, second);
}

template <Codes Form, Codes Weight, int Tiles, int Octets>
SMOOTHROT_DEVICE void multiply_chunk_int4(
    const SmallChunk<Form, Weight, false, Tiles, Octets>& chunk,
    int32_t (&sums)[Tiles][Octets][4]) {
#pragma unroll
  for (int w = 0; w < 4; w += 2) {
#pragma unroll
    for (int i = 0; i < Tiles; ++i) {
      const uint32_t *low = chunk.weight[i][0][0].word + w, *high = chunk.weight[i][1][0].word + w;
      const uint32_t a[4] = {low[0], high[0], low[1], high[1]};
#pragma unroll
      for (int o = 0; o < Octets; ++o) {
        const uint32_t b[2] = {chunk.codes[o][0].word[w], chunk.codes[o][0].word[w + 1]};
        mma_s4(sums[i][o], a, b);
      }
    }
  }
}

template <Codes Form, Codes Weight, bool Grouped, int Tiles, int Octets>
SMOOTHROT_DEVICE void multiply_chunk_int8(
    [[maybe_unused]] int nibble, const SmallChunk<Form, Weight, Grouped, Tiles, Octets>& chunk,
    int32_t (&sums)[Tiles][Octets][4]) {
  uint32_t b[4][Octets][2];
#pragma unroll
  for (int w = 0; w < 4; ++w) {
#pragma unroll
    for (int o = 0; o < Octets; ++o)
      lane_inputs<Form, Weight>(chunk.codes[o], w, b[w][o][0], b[w][o][1]);
  }
#pragma unroll
  for (int i = 0; i < Tiles; ++i) {
    [[maybe_unused]] GroupFactor factors[2];
    if constexpr (Grouped) {
#pragma unroll
      for (int h = 0; h < 2; ++h) factors[h] = group_factor(chunk.group_scale[i][h], nibble);
    }
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      uint32_t a[4];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if constexpr (Grouped) {
          scaled_inputs(chunk.weight[i][h][0].word[w], factors[h], a[h], a[h + 2]);
        } else {
          lane_inputs<Weight, Form>(chunk.weight[i][h], w, a[h], a[h + 2]);
        }
      }
#pragma unroll
      for (int o = 0; o < Octets; ++o) mma_s8(sums[i][o], a, b[w][o]);
    }
  }
}

template <Codes Form, Codes Weight, bool Grouped>
constexpr int kSmallShift =
    kSmallInt4<Form, Weight, Grouped> ? 0 : kByteShift<Form, Weight, Grouped>;

// What the block needs at its end: int32 [warp][token][output] beside the scales and biases, each
// loaded once.
template <int Tiles, int Octets>
struct SmallShared {
  static constexpr int kOutputs = Tiles * kTileOutputs;
  static constexpr int kTokens = Octets * kOctet;
  int32_t sums[kSmallWarps][kTokens][kOutputs];
  float scale[kTokens];
  float weight_scale[kOutputs];
  float bias[kOutputs];
};

template <int Tiles, int Octets>
SMOOTHROT_DEVICE void load_scales(const GemmArgs& g, int first_output,
                                  SmallShared<Tiles, Octets>& shared) {
  const int i = thread_index();
  if (i < shared.kTokens && i < g.tokens) shared.scale[i] = load_global(g.scale + i);
  const int output = first_output + i;
  if (i < shared.kOutputs && output < g.outputs) {
    shared.weight_scale[i] = load_global(g.weight_scale + output);
    if (g.bias) shared.bias[i] = load_float(g.bias, g.bias_dtype, output);
  }
}

template <Codes Form, Codes Weight, bool Grouped, int Tiles, int Octets>
SMOOTHROT_KERNEL(kSmallThreads, 1)
gemm_small_kernel(const GemmArgs g) {
  using Shared = SmallShared<Tiles, Octets>;
  auto& shared = *reinterpret_cast<Shared*>(shared_memory());
  const int warp = thread_index() / 32, lane = thread_index() % 32,
            first_output = block_index_x() * Shared::kOutputs;
  load_scales(g, first_output, shared);
  int32_t sums[Tiles][Octets][4] = {};
  SmallChunk<Form, Weight, Grouped, Tiles, Octets> chunk;
  constexpr int kStep = kSmallWarps * kChunkInputs;
  int input = warp * kChunkInputs;
  // What registers allow to be in flight.
  [[maybe_unused]] constexpr int kChunksAhead = Tiles * kLaneWords<Weight> == 8 ? 1 : 2;
#pragma unroll kChunksAhead
  for (; input < g.inputs; input += kStep) {
    load_chunk(g, first_output, input, chunk);
    if constexpr (kSmallInt4<Form, Weight, Grouped>) {
      multiply_chunk_int4(chunk, sums);
    } else {
      const int group = (input + lane % 4 * kLaneInputs) >> group_shift(g);
      multiply_chunk_int8(group % kWordGroups, chunk, sums);
    }
  }
#pragma unroll
  for (int i = 0; i < Tiles; ++i) {
#pragma unroll
    for (int o = 0; o < Octets; ++o) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int output = i * kTileOutputs + lane / 4 + r / 2 * kOctet,
                  token = o * kOctet + lane % 4 * 2 + r % 2;
        shared.sums[warp][token][output] = sums[i][o][r];
      }
    }
  }
  block_barrier();
  for (int i = thread_index(); i < Shared::kTokens * Shared::kOutputs; i += kSmallThreads) {
    const int token = i / Shared::kOutputs, within = i % Shared::kOutputs,
              output = first_output + within;
    if (token >= g.tokens || output >= g.outputs) continue;
    int32_t sum = 0;
    for (int w = 0; w < kSmallWarps; ++w) sum += shared.sums[w][token][within];
    float y =
        multiply(float(sum >> kSmallShift<Form, Weight, Grouped>), shared.weight_scale[within]);
    y = multiply(y, shared.scale[token]);
    if (g.bias) y = add(y, shared.bias[within]);
    store_float(g.out, g.out_dtype, int64_t{token} * g.outputs + output, y);
  }
}

}  // namespace smoothrot::cuda
