// SPDX-License-Identifier: Apache-2.0
// What a CPU instruction-set path offers. The kernels know nothing of torch and start no threads:
// the caller splits the range and gives each thread its scratch.
#pragma once

#include <cstdint>

#include "../common/layout.h"
#include "../common/types.h"

namespace smoothrot {

// y = x (I (x) H_base (x) H_power), unnormalized, on each run of base * power values.
struct Rotation {
  int64_t base;
  int64_t power;
  // uint8 [base][base / 4]: bit i of entry (j, g) is set where H_base[4 g + i][j] is -1. Null for
  // base 1.
  const uint8_t* signs;
};

enum class Source { plain, silu_mul, swigluoai, rms_norm };

// Whether rows are gates before ups, twice as wide as what is quantized.
static inline bool is_gated(Source source) {
  return source == Source::silu_mul || source == Source::swigluoai;
}

// Of an RMS norm before the quantization.
struct NormArgs {
  const void* weight;  // [inputs] or null for ones
  void* residual;      // [rows][inputs] or null: x is added to it first
  float epsilon;
};

struct QuantArgs {
  const void* x;  // [rows][inputs], contiguous; [rows][2 * inputs], gate before up, if is_gated
  Float dtype;
  int64_t inputs;
  const Rotation* rotation;  // null: none
  float factor;              // clip / quant_max
  float norm;                // 1 / sqrt(block), or 1
  int bits;
  Source source;
  NormArgs norm_args;  // for rms_norm; weight and residual have the dtype of x
};

// How a kernel keeps its integer sums, which decides where they start: at minus the offset of the
// stored codes times the sum of the activation codes.
enum class Sums {
  whole,   // int32 over all inputs: one start a row
  groups,  // int32 over a group of 4-bit weights, times its scale: a start a group
  spans,   // int16 over kSpanInputs of 4-bit weights, see S::fold_pairs: a start a span, in which
           // the first two inputs of each step are the low half of the word and the last two the
           // high one
};
static constexpr int kSpanInputs = 32;
static constexpr int kSpanSteps = kSpanInputs / kStepInputs;

// Activations in tiles: the left operand of the gemm.
struct TileArgs {
  TileLayout tiles;
  WeightLayout weight;
  Sums sums;
  int32_t offset;  // of the weights that the kernel multiplies with
  int32_t* words;  // see TileLayout
  int32_t* start;  // per tile [starts][rows]
  float* scale;    // [tokens]

  int64_t starts() const {
    return sums == Sums::whole    ? 1
           : sums == Sums::groups ? weight.groups
                                  : (weight.inputs + kSpanInputs - 1) / kSpanInputs;
  }
};

// Inputs of a panel that are expanded to bytes at a time: what all tiles of a block then read stays
// in the second-level cache. Whole groups.
static constexpr int64_t kChunkInputs = 2048;

struct GemmArgs {
  TileArgs act;
  bool expand;            // 4-bit weights to bytes, once for all tiles of a block
  const uint8_t* packed;  // panels, see WeightLayout
  const void* bias;       // [columns] or null
  Float bias_dtype;
  void* out;  // [tokens][columns]
  Float out_dtype;
  int64_t blocks;  // the tiles in parts of nearly equal size, each of which stays in cache while
                   // panels go by
};

// Tiles [block_begin(g, b), block_begin(g, b + 1)) are block b.
static inline int64_t block_begin(const GemmArgs& g, int64_t block) {
  return g.act.tiles.tiles * block / g.blocks;
}

// Bytes of scratch that the gemm wants, 64-byte aligned, per thread: the sums of a block's tiles,
// and a chunk of expanded weights.
static inline int64_t gemm_scratch_bytes(const GemmArgs& g) {
  const int64_t tiles = (g.act.tiles.tiles + g.blocks - 1) / g.blocks;
  const int64_t sums = tiles * (g.act.tiles.rows + 1) * kPanelColumns * int64_t{sizeof(int32_t)};
  return sums + (g.expand ? kChunkInputs * kPanelColumns : 0);
}

struct Kernels {
  const char* name;
  // Tallest tile the gemm takes.
  int max_rows;
  // How tiles of this weight are best multiplied: act.sums, act.offset and expand of `g`, of which
  // act.tiles and act.weight are set.
  void (*plan)(GemmArgs& g);
  // Bytes of scratch that quant_rows, quant_tiles and decode_tiles want, 64-byte aligned, per
  // thread.
  int64_t (*scratch_bytes)(const QuantArgs&, int64_t max_rows);
  // Rows [begin, end) to stored codes and scales.
  void (*quant_rows)(const QuantArgs&, void* codes, float* scale, int64_t begin, int64_t end,
                     void* scratch);
  // Tiles [begin, end): quantize straight into the gemm's layout.
  void (*quant_tiles)(const QuantArgs&, const TileArgs&, int64_t begin, int64_t end, void* scratch);
  // Tiles [begin, end): stored codes, already quantized, into the gemm's layout.
  void (*decode_tiles)(const void* codes, int bits, const TileArgs&, int64_t begin, int64_t end,
                       void* scratch);
  // Tasks [begin, end) of gemm_tasks(): task = panel * blocks + block.
  void (*gemm)(const GemmArgs&, int64_t begin, int64_t end, void* scratch);
};

static inline int64_t gemm_tasks(const GemmArgs& g) { return g.act.weight.panels * g.blocks; }

extern const Kernels kPortableKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512VnniKernels;
#endif

// The path named, or the best one for an empty name. Throws std::runtime_error for an unknown name
// and for a path that this CPU cannot run.
const Kernels& select_kernels(const char* name);

// Stored codes [columns][inputs / 2] or [columns][inputs], scales [columns] and group scales
// [columns][groups], a byte each, to panels [begin, end).
void prepack(const void* codes, const float* scale, const uint8_t* group_scale,
             const WeightLayout& layout, uint8_t* packed, int64_t begin, int64_t end);

}  // namespace smoothrot
