// SPDX-License-Identifier: Apache-2.0
// The CPU ops of a mixture's experts: one call multiplies the tokens of all of them, so that
// threads share all the work.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "../common/float16.h"
#include "multiplication.h"

namespace smoothrot {
namespace {

// The gemm of one expert's tile, and where its tiles and tasks begin among those of all.
struct Part {
  GemmArgs gemm;
  int64_t row;
  int64_t first_tile;
  int64_t first_task;
};

// Calls work(part, begin, end) for what [begin, end) means to each part; `first` is
// Part::first_tile or first_task.
template <typename Work>
void for_parts(const std::vector<Part>& parts, int64_t Part::* first, int64_t begin, int64_t end,
               const Work& work) {
  auto part = std::upper_bound(parts.begin(), parts.end(), begin,
                               [&](int64_t index, const Part& p) { return index < p.*first; }) -
              1;
  for (; begin < end; ++part) {
    const int64_t stop = part + 1 == parts.end() ? end : std::min(end, part[1].*first);
    work(*part, begin - (*part).*first, stop - (*part).*first);
    begin = stop;
  }
}

int64_t bytes_of(Float dtype) { return dtype == Float::f32 ? 4 : 2; }

void store_row(const float* values, int64_t count, Float dtype, void* out, int64_t at) {
  for (int64_t i = 0; i < count; ++i) {
    switch (dtype) {
      case Float::f32:
        static_cast<float*>(out)[at + i] = values[i];
        break;
      case Float::bf16:
        static_cast<uint16_t*>(out)[at + i] = f32_to_bf16(values[i]);
        break;
      default:
        static_cast<uint16_t*>(out)[at + i] = f32_to_f16(values[i]);
    }
  }
}

Tensor gemm_experts(const Tensor& codes, const Tensor& scale, const Tensor& packed,
                    const Tensor& weight_scale, std::optional<Tensor> bias, const Tensor& tiles,
                    ScalarType out_dtype, int64_t act_bits, int64_t weight_bits,
                    int64_t group_size) {
  constexpr const char* op = "gemm_experts";
  check_bits(op, "act_bits", act_bits);
  check_bits(op, "weight_bits", weight_bits);
  const auto [rows, inputs] = check_codes(op, codes, scale, act_bits);
  const Float dtype = float_type(op, "out_dtype", out_dtype);
  const int64_t experts = packed.dim() ? packed.size(0) : 0;
  if (experts < 1)
    refuse(op, "packed", "expected (experts, panels, bytes), got ", describe(packed), ".");
  check_tensor(op, "packed", packed, ScalarType::Byte, {experts, kAnySize, kAnySize});
  check_tensor(op, "weight_scale", weight_scale, ScalarType::Float, {experts, kAnySize, kAnySize});
  check_tensor(op, "tiles", tiles, ScalarType::Int, {3, kAnySize});
  // All experts have the shapes of the first.
  const WeightLayout w = check_weight(op, torch::stable::select(weight_scale, 0, 0), inputs,
                                      group_size, weight_bits, act_bits);
  check_packed(op, torch::stable::select(packed, 0, 0), w);
  const uint8_t* biases = nullptr;
  Float bias_dtype = Float::f32;
  if (bias) {
    bias_dtype = float_type(op, "bias", bias->scalar_type());
    check_tensor(op, "bias", *bias, bias->scalar_type(), {experts, w.columns});
    biases = static_cast<const uint8_t*>(bias->const_data_ptr());
  }
  Tensor out = empty({rows, w.columns}, out_dtype);

  const Kernels& k = kernels();
  QuantArgs sizes{};
  sizes.inputs = inputs;
  int64_t scratch_bytes = k.scratch_bytes(sizes, k.max_rows + 1), most_starts = 1;

  const auto* table = static_cast<const int32_t*>(tiles.const_data_ptr());
  const int64_t count = tiles.size(1);
  std::vector<Part> parts;
  int64_t tile_count = 0, task_count = 0, covered = 0;
  for (int64_t t = 0; t < count; ++t) {
    const int64_t expert = table[t], first = table[count + t], last = table[2 * count + t];
    if (expert < 0 || expert >= experts || first < 0 || last > rows || first >= last) continue;
    const int64_t tokens = std::min(last - first, kExpertTileTokens);
    Part part{gemm_of(k, tokens, w, dtype), first, tile_count, task_count};
    part.gemm.packed =
        static_cast<const uint8_t*>(packed.const_data_ptr()) + expert * w.panels * w.panel_bytes;
    part.gemm.bias_dtype = bias_dtype;
    if (biases) part.gemm.bias = biases + expert * w.columns * bytes_of(bias_dtype);
    part.gemm.out =
        static_cast<uint8_t*>(out.mutable_data_ptr()) + first * w.columns * bytes_of(dtype);
    part.gemm.act.scale =
        const_cast<float*>(static_cast<const float*>(scale.const_data_ptr())) + first;
    scratch_bytes = std::max(scratch_bytes, gemm_scratch_bytes(part.gemm));
    most_starts = std::max(most_starts, part.gemm.act.starts());
    tile_count += part.gemm.act.tiles.tiles;
    task_count += gemm_tasks(part.gemm);
    covered += tokens;
    parts.push_back(part);
  }
  if (covered < rows) {
    // Rows of no tile: NaN rather than what the memory held.
    std::fill_n(static_cast<uint8_t*>(out.mutable_data_ptr()), rows * w.columns * bytes_of(dtype),
                uint8_t{0xFF});
  }
  if (parts.empty()) return out;

  Arena arena;
  const size_t words = arena.reserve<int32_t>(rows * w.steps);
  const size_t start = arena.reserve<int32_t>(rows * most_starts);
  const ThreadScratch scratch(arena, scratch_bytes, true);
  arena.allocate();
  for (Part& part : parts) {
    part.gemm.act.words = arena.at<int32_t>(words) + part.row * w.steps;
    part.gemm.act.start = arena.at<int32_t>(start) + part.row * most_starts;
  }
  const int64_t row_bytes = inputs * act_bits / 8;
  share(tile_count, fill_grain(parts[0].gemm), [&](int64_t begin, int64_t end) {
    void* own = scratch.of_this_thread(arena);
    for_parts(parts, &Part::first_tile, begin, end, [&](const Part& p, int64_t b, int64_t e) {
      const auto* stored = static_cast<const uint8_t*>(codes.const_data_ptr()) + p.row * row_bytes;
      k.decode_tiles(stored, int(act_bits), p.gemm.act, b, e, own);
    });
  });
  share(task_count, gemm_grain(parts[0].gemm), [&](int64_t begin, int64_t end) {
    void* own = scratch.of_this_thread(arena);
    for_parts(parts, &Part::first_task, begin, end,
              [&](const Part& p, int64_t b, int64_t e) { k.gemm(p.gemm, b, e, own); });
  });
  return out;
}

Tensor combine_experts(const Tensor& rows, const Tensor& sources, const Tensor& weights,
                       ScalarType out_dtype) {
  constexpr const char* op = "combine_experts";
  check_tensor(op, "rows", rows, ScalarType::Float, {kAnySize, kAnySize});
  check_tensor(op, "sources", sources, ScalarType::Int, {kAnySize, kAnySize});
  check_tensor(op, "weights", weights, ScalarType::Float, {sources.size(0), sources.size(1)});
  const Float dtype = float_type(op, "out_dtype", out_dtype);
  const int64_t tokens = sources.size(0), top_k = sources.size(1), row_count = rows.size(0),
                outputs = rows.size(1);
  if (top_k < 1)
    refuse(op, "sources", "expected at least one source a token, got ", describe(sources), ".");
  if (outputs < 1) refuse(op, "rows", "expected at least one output, got ", describe(rows), ".");
  Tensor out = empty({tokens, outputs}, out_dtype);
  const auto* values = static_cast<const float*>(rows.const_data_ptr());
  const auto* source = static_cast<const int32_t*>(sources.const_data_ptr());
  const auto* weight = static_cast<const float*>(weights.const_data_ptr());
  void* result = out.mutable_data_ptr();
  share(tokens, ceil_div(kGrainValues, top_k * outputs), [&](int64_t begin, int64_t end) {
    constexpr int64_t kChunk = 256;
    for (int64_t token = begin; token < end; ++token) {
      for (int64_t first = 0; first < outputs; first += kChunk) {
        const int64_t count = std::min(kChunk, outputs - first);
        float sums[kChunk] = {};
        for (int64_t k = token * top_k; k < (token + 1) * top_k; ++k) {
          if (source[k] < 0 || source[k] >= row_count) {
            std::fill_n(sums, count, std::numeric_limits<float>::quiet_NaN());
            break;
          }
          const float* row = values + source[k] * outputs + first;
          for (int64_t i = 0; i < count; ++i) sums[i] += row[i] * weight[k];
        }
        store_row(sums, count, dtype, result, token * outputs + first);
      }
    }
  });
  return out;
}

}  // namespace
}  // namespace smoothrot

STABLE_TORCH_LIBRARY_IMPL(smoothrot, CPU, m) {
  m.impl("gemm_experts", TORCH_BOX(&smoothrot::gemm_experts));
  m.impl("combine_experts", TORCH_BOX(&smoothrot::combine_experts));
}
