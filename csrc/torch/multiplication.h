// SPDX-License-Identifier: Apache-2.0
// A multiplication by one packed weight, for the ops that differ in where its activations come
// from.
#pragma once

#include "cpu_runtime.h"

namespace smoothrot {

// Activation tiles that the panels are multiplied with while they stay in the second-level cache;
// and how many at least share the work of expanding it.
constexpr int64_t kActivationBlockBytes = 512 * 1024;
constexpr int64_t kTilesOfExpanded = 4;

// Activations of `tokens` tokens in tiles, and one weight; pointers and bias are the caller's to
// set.
inline GemmArgs gemm_of(const Kernels& k, int64_t tokens, const WeightLayout& w, Float out_dtype) {
  GemmArgs g{};
  g.act.weight = w;
  g.act.tiles = tile_layout(tokens, k.max_rows);
  g.out_dtype = out_dtype;
  k.plan(g);
  const int64_t tile_bytes = (g.act.tiles.rows + 1) * w.steps * kStepInputs;
  const int64_t tiles_at_once =
      std::max<int64_t>(kActivationBlockBytes / tile_bytes, g.expand ? kTilesOfExpanded : 1);
  g.blocks = ceil_div(g.act.tiles.tiles, tiles_at_once);
  return g;
}

// Least number of tiles to fill, and of gemm_tasks, that are worth a thread.
inline int64_t fill_grain(const GemmArgs& g) {
  return ceil_div(kGrainValues, (g.act.tiles.rows + 1) * g.act.weight.inputs);
}

inline int64_t gemm_grain(const GemmArgs& g) {
  return ceil_div(kGrainProducts,
                  ceil_div(g.act.tiles.tokens, g.blocks) * g.act.weight.inputs * kPanelColumns);
}

// What gemm and linear share: the tiles' memory and the multiplication itself.
class Multiplication {
 public:
  Multiplication(const char* op, const Kernels& k, int64_t tokens, const WeightLayout& w,
                 const Tensor& packed, const std::optional<Tensor>& bias, Float out_dtype)
      : args(gemm_of(k, tokens, w, out_dtype)), kernels_(k) {
    check_packed(op, packed, w);
    args.packed = static_cast<const uint8_t*>(packed.const_data_ptr());
    if (bias) {
      args.bias_dtype = float_type(op, "bias", bias->scalar_type());
      check_tensor(op, "bias", *bias, bias->scalar_type(), {w.columns});
      args.bias = bias->const_data_ptr();
    }
  }

  // Memory for the tiles and for each thread's scratch; `scale` is null where the arena shall hold
  // it.
  void allocate(int64_t scratch_bytes, const float* scale) {
    const WeightLayout& w = args.act.weight;
    const int64_t tokens = args.act.tiles.tokens;
    const size_t words = arena_.reserve<int32_t>(tokens * w.steps);
    const size_t start = arena_.reserve<int32_t>(tokens * args.act.starts());
    const size_t scales = arena_.reserve<float>(scale ? 0 : tokens);
    // The tiles are filled before the panels are multiplied: one scratch serves both.
    scratch_.emplace(arena_, std::max(scratch_bytes, gemm_scratch_bytes(args)), true);
    arena_.allocate();
    args.act.words = arena_.at<int32_t>(words);
    args.act.start = arena_.at<int32_t>(start);
    args.act.scale = scale ? const_cast<float*>(scale) : arena_.at<float>(scales);
  }

  // Multiplies codes that are quantized already.
  void run_stored(void* out, const Tensor& codes, const Tensor& scale, int64_t act_bits) {
    QuantArgs sizes{};
    sizes.inputs = args.act.weight.inputs;
    allocate(kernels_.scratch_bytes(sizes, args.act.tiles.rows + 1),
             static_cast<const float*>(scale.const_data_ptr()));
    const void* stored = codes.const_data_ptr();
    run(out, [&](int64_t begin, int64_t end, void* scratch) {
      kernels_.decode_tiles(stored, int(act_bits), args.act, begin, end, scratch);
    });
  }

  // Runs `fill(begin, end, scratch)` over the tiles, then multiplies into `out`.
  template <typename Fill>
  void run(void* out, const Fill& fill) {
    args.out = out;
    share(args.act.tiles.tiles, fill_grain(args),
          [&](int64_t begin, int64_t end) { fill(begin, end, own_scratch()); });
    share(gemm_tasks(args), gemm_grain(args),
          [&](int64_t begin, int64_t end) { kernels_.gemm(args, begin, end, own_scratch()); });
  }

  GemmArgs args;

 private:
  void* own_scratch() const { return scratch_->of_this_thread(arena_); }

  const Kernels& kernels_;
  Arena arena_;
  std::optional<ThreadScratch> scratch_;
};

}  // namespace smoothrot
