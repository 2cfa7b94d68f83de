// SPDX-License-Identifier: Apache-2.0
// A step of the tiled GEMM by the int4 MMA of sm_80 to sm_89, which takes packed operands as they
// are. A group's products are summed apart, then multiplied by its scale on their way to the sums:
// integers throughout.
//
// A warp's 32 tokens by 64 columns take, for each granule of 32 inputs (issue slots; cycles of the
// pipe that is busiest, where MMAs of 64 inputs and a quarter of a multiprocessor take 8 cycles for
// int4 and 16 for int8, IMADs and ALU instructions 2 each, as the CUDA programming guide has them
// for sm_80):
//
//   group   int4 MMA: MMAs, IMADs, scales           int8 MMA: MMAs, unpacking, scales
//    32     16 + 64 + 32 = 112;  128 (IMAD)         16 + 24 + 56 + 24 = 120;  160 (ALU)
//    64      8 + 32 + 16 =  56;   64 (MMA, IMAD)    16 + 24 + 56 + 12 = 108;  144 (ALU)
//   128      8 + 16 +  8 =  32;   64 (MMA)          16 + 24 + 56 +  6 = 102;  136 (ALU)
//
// So it is the better choice for every group, also where int8 MMAs take twice as long (sm_86, 89).
#pragma once

#include "gemm_s8_stage.h"

namespace smoothrot::cuda {

// An MMA of 64 inputs, two granules, where a group has as many, else one of 32. Tokens and columns
// are what one load of 32 rows or two gave.
template <int Granules>
SMOOTHROT_DEVICE void multiply_granules(int32_t (&sums)[4], const uint32_t (&tokens)[Granules][4],
                                        int i, const uint32_t (&columns)[Granules][4], int n) {
  if constexpr (Granules == 1) {
    const uint32_t a[2] = {tokens[0][2 * i], tokens[0][2 * i + 1]}, b[1] = {columns[0][n]};
    mma_s4(sums, a, b);
  } else {
    const uint32_t* pair = columns[n / 2] + n % 2 * 2;
    const uint32_t b[2] = {pair[0], pair[1]};
    mma_s4(sums, tokens[i], b);
  }
}

template <int Group, int Columns, int Tiles>
SMOOTHROT_DEVICE void multiply_step_int4(const unsigned char* stage, [[maybe_unused]] int step,
                                         int warp_token, int warp_column,
                                         int32_t (&sums)[2][Tiles][4]) {
  constexpr Codes kPacked = Codes::packed_int4;
  constexpr int kUnit = Group > 0 ? Group / kGranule : 2;  // granules whose products are summed
  constexpr int kDepth = kUnit == 1 ? 1 : 2;               // and those of an MMA
  [[maybe_unused]] uint32_t scales[Tiles][2];
  if constexpr (Group > 0) {
    const unsigned char* words = stage + kScalesAt<kPacked, kPacked, Columns>;
#pragma unroll
    for (int j = 0; j < Tiles; ++j) {
      const auto pair = *reinterpret_cast<const Words2*>(words + 4 * (warp_column + column_of(j)));
#pragma unroll
      for (int c = 0; c < 2; ++c) scales[j][c] = step_scales<Group>(pair.word[c], step);
    }
  }
#pragma unroll
  for (int k = 0; k < kStepInputs / kGranule; k += kUnit) {
    uint32_t tokens[kUnit / kDepth][kDepth][4];
#pragma unroll
    for (int u = 0; u < kUnit / kDepth; ++u) {
      if constexpr (kDepth == 1) {
        load_column_of_chunks<kPacked>(stage, warp_token, k, tokens[u][0]);
      } else {
        load_deep_a<kPacked>(stage, warp_token, k + u * kDepth, tokens[u]);
      }
    }
#pragma unroll
    for (int j = 0; j < Tiles; j += 4) {
      const unsigned char* rows = stage + kColumnsAt<kPacked>;
      [[maybe_unused]] int32_t products[4][2][4] = {};
#pragma unroll
      for (int u = 0; u < kUnit / kDepth; ++u) {
        uint32_t columns[kDepth][4];
        if constexpr (kDepth == 1) {
          load_column_of_chunks<kPacked>(rows, warp_column + j * 8, k, columns[0]);
        } else {
          load_deep_b<kPacked>(rows, warp_column + j * 8, k + u * kDepth, columns);
        }
#pragma unroll
        for (int n = 0; n < 4; ++n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            multiply_granules<kDepth>(Group > 0 ? products[n][i] : sums[i][j + n], tokens[u], i,
                                      columns, n);
          }
        }
      }
      if constexpr (Group > 0) {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const uint32_t* words = scales[j + n];
          const int32_t scale[2] = {group_scale_of(words[0], k / kUnit),
                                    group_scale_of(words[1], k / kUnit)};
#pragma unroll
          for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int r = 0; r < 4; ++r) sums[i][j + n][r] += products[n][i][r] * scale[r % 2];
          }
        }
      }
    }
  }
}

}  // namespace smoothrot::cuda
