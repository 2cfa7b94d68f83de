// SPDX-License-Identifier: Apache-2.0
// The hand-written CUDA kernels as the torch binding sees them: plain structs and launchers, no
// torch.
//
// Pointers are device pointers, arrays are contiguous and start at 16-byte boundaries, `inputs` is
// a multiple of kInputMultiple. Launchers only enqueue work on the stream. They return
// cudaErrorInvalidValue for arguments outside these bounds: naming the argument to the user is the
// binding's duty.
#pragma once

#ifdef SMOOTHROT_EMULATED
  #include "../emulator/runtime.h"
#else
  #include <cuda_runtime_api.h>
#endif

#include <cstdint>
#include <string>

#include "../common/types.h"

namespace smoothrot::cuda {

// How codes lie in memory. int8 with 4-bit activations holds values in [-8, 7], one a byte, for
// architectures whose tensor cores have no int4.
enum class Codes : int { packed_int4, int8 };

constexpr int64_t kInputMultiple = 32;
constexpr int64_t kMostInputs = 32768;
constexpr int64_t kMostBase = 252;
// |product| <= 2^14, the scaling of packed operands and group scales included, keeps int32 sums
// exact below this.
constexpr int64_t kMostGemmInputs = 131072 - kInputMultiple;
constexpr int64_t kSmallGemmTokens = 16;

// Group scales take a nibble each, and a row of them whole 32-bit words: group 8 w + i is in bits
// 4 i .. 4 i + 3 of word w; smoothrot_vllm.fake_ops.GROUPS_OF_A_WORD.
constexpr int64_t kGroupsOfAWord = 8;
constexpr int64_t group_words(int64_t inputs, int64_t group_size) {
  return (inputs / group_size + kGroupsOfAWord - 1) / kGroupsOfAWord;
}
constexpr bool is_group_size(int64_t size) { return size == 32 || size == 64 || size == 128; }

// A packed weight with group scales: the codes as in the checkpoint, behind them the words of the
// group scales, and zeros up to the next 16 bytes, so that the next expert is aligned.
constexpr int64_t code_bytes(int64_t outputs, int64_t inputs) { return outputs * (inputs / 2); }
constexpr int64_t grouped_bytes(int64_t outputs, int64_t inputs, int64_t group_size) {
  return code_bytes(outputs, inputs) + (outputs * group_words(inputs, group_size) + 3) / 4 * 16;
}

// x (I (x) H_base (x) H_power) on each run of base * power values; power 0: no rotation.
struct Rotation {
  int64_t base = 1;
  int64_t power = 0;
  const uint32_t* signs = nullptr;  // what pack_signs wrote, on the device; null for base 1
};

// Words that the signs of a base matrix take: [base / 4][ceil(base / 8)].
constexpr int64_t sign_words(int64_t base) { return base > 1 ? base / 4 * ((base + 7) / 8) : 0; }

// Bit 4 * (j % 8) + i of word (g, j / 8) is set where matrix[4 g + i][j] is -1; `matrix` is
// [base][base], host.
inline void pack_signs(const int8_t* matrix, int64_t base, uint32_t* words) {
  const int64_t pitch = (base + 7) / 8;
  for (int64_t w = 0; w < sign_words(base); ++w) words[w] = 0;
  if (base == 1) return;
  for (int64_t b = 0; b < base; ++b) {
    for (int64_t j = 0; j < base; ++j) {
      words[b / 4 * pitch + j / 8] |= uint32_t(matrix[b * base + j] < 0) << (4 * (j % 8) + b % 4);
    }
  }
}

// Inputs of a row that a rotation with this base may have: its outputs are made in eights, which a
// block has kMostInputs of. 24576 for base 12, and for base 28 the 28672 of the largest Llamas.
constexpr int64_t most_rotated_inputs(int64_t base) {
  return base > 1 ? kMostInputs / ((base + 7) / 8 * 8) * base : kMostInputs;
}

struct QuantArgs {
  const void* x;  // [tokens][inputs]; [tokens][2 * inputs], gate before up, for silu_mul_quant
  Float dtype;    // of x, residual and norm_weight
  int64_t tokens;
  int64_t inputs;  // values of a row that is quantized, at most most_rotated_inputs(rotation.base)
  Rotation rotation;
  float factor;  // float(clip / quant_max)
  float norm;    // float(1 / sqrt(base * power)), 1 without rotation
  int bits;      // 4 or 8
  Codes form;    // packed_int4 only with bits 4
  void* codes;   // [tokens][inputs / 2] or [tokens][inputs]
  float* scale;  // [tokens]
  // rms_norm_quant only
  const void* norm_weight;  // [inputs] or null for ones
  void* residual;  // [tokens][inputs] or null: x is added to it first, rounded to dtype and written
                   // back
  float epsilon;
};

// reference.quant and reference.hadamard_quant.
cudaError_t quant(const QuantArgs& args, cudaStream_t stream);
// reference.silu_mul_hadamard_quant: silu(gate) * up in place of x.
cudaError_t silu_mul_quant(const QuantArgs& args, cudaStream_t stream);
// reference.rms_norm_quant.
cudaError_t rms_norm_quant(const QuantArgs& args, cudaStream_t stream);

// The kernel that these arguments need, for producer "plain", "silu_mul" or "rms_norm"; null where
// there is none.
const char* quant_kernel_name(const std::string& producer, const QuantArgs& args);
// Every kernel that quantizes, with spaces between them.
std::string quant_kernel_names();

// Shared memory that a row takes. Above cudaDevAttrMaxSharedMemoryPerBlockOptin of the device the
// launchers refuse; below 99 KiB (about 22000 inputs with a rotation) every architecture runs it.
int64_t quant_shared_bytes(const QuantArgs& args);

struct PrepackArgs {
  const void* weight;          // [experts][outputs][inputs / 2] packed
  const uint8_t* group_scale;  // [experts][outputs][inputs / group_size], each below 16
  int64_t group_size;          // 32, 64 or 128 dividing inputs
  void* packed;                // [experts][grouped_bytes]
  int64_t experts, outputs, inputs;
};

// What the GEMMs read of a weight with group scales.
cudaError_t prepack_groups(const PrepackArgs& args, cudaStream_t stream);

constexpr int64_t kPerChannel = -1;

struct GemmArgs {
  const void* codes;  // [tokens][inputs / 2] packed or [tokens][inputs] int8
  Codes form;
  const float* scale;  // [tokens]
  const void*
      weight;  // [outputs][inputs / 2] packed or [outputs][inputs] int8, as in the checkpoint
  Codes weight_form;
  const float* weight_scale;    // [outputs]
  const uint32_t* group_scale;  // [outputs][group_words] of a packed weight, or null
  int64_t group_size;           // 32, 64 or 128 dividing inputs; kPerChannel without group_scale
  const void* bias;             // [outputs] or null
  Float bias_dtype;
  void* out;  // [tokens][outputs]
  Float out_dtype;
  int64_t tokens;
  int64_t outputs;
  int64_t inputs;  // at most kMostGemmInputs
};

// All are reference.gemm: exact int32 sums over all inputs, group scales multiplied in as integers,
// then (sum * weight_scale) * scale + bias in float32.

// Outputs of a block of a hand-written GEMM. Wide blocks read the activations less often, narrow
// ones keep more multiprocessors busy: `automatic` weighs these, the others are for tests.
enum class Width { automatic, narrow, medium, wide };

// At most kSmallGemmTokens tokens: reads each weight once. Every architecture from sm_80; packed
// codes and weights without groups use the native int4 MMA on sm_80 to sm_89, all else is expanded
// to int8 in registers.
cudaError_t gemm_small(const GemmArgs& args, cudaStream_t stream, Width width = Width::automatic);

// Any number of tokens, every architecture from sm_80. Packed codes and weights use the native int4
// MMA on sm_80 to sm_89, all else is expanded to int8 in registers. No medium width.
cudaError_t gemm_s8(const GemmArgs& args, cudaStream_t stream, Width width = Width::automatic);

// int8 [outputs][inputs], code * group scale, of the packed weight of `args` and its outputs
// [first, first + count): reads nothing else of `args`.
cudaError_t expand_weight(const GemmArgs& args, int64_t first, int64_t count, void* expanded,
                          cudaStream_t stream);

// Not part of GemmArgs: more parameters cost the kernels that do not read them registers (nvcc
// 13.0).
struct ExpertsArgs {
  GemmArgs gemm;         // of the first expert; no bias
  int64_t expert_bytes;  // from one expert's weight to the next, and from its group scales
  const int32_t* tiles;  // [3][tile_count]: of each tile its expert, its first token and the end of
                         // its expert's tokens
  int64_t tile_count;
  int64_t experts;
};

// gemm_s8 where each token has one of several weights: the tokens of an expert are neighbors, and
// a tile computes up to kExpertTileTokens of them. Tiles without tokens, of an unknown expert or
// past the last token compute nothing. weight_scale is [experts][outputs].
cudaError_t gemm_experts(const ExpertsArgs& args, cudaStream_t stream,
                         Width width = Width::automatic);

struct CombineArgs {
  const float* rows;       // [row_count][outputs]
  const int32_t* sources;  // [tokens][top_k]: rows of a token, in the order in which they are added
  const float* weights;    // [tokens][top_k]: what each is multiplied by
  void* out;               // [tokens][outputs]
  Float out_dtype;
  int64_t tokens;
  int64_t top_k;
  int64_t outputs;
  int64_t row_count;
};

// The end of reference.experts: the sum over top_k of rows[source] * weight in float32, one after
// the other from zero, rounded once. A source that is no row gives NaN.
cudaError_t combine_experts(const CombineArgs& args, cudaStream_t stream);

}  // namespace smoothrot::cuda
