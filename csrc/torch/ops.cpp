// SPDX-License-Identifier: Apache-2.0
// The CPU ops as torch sees them, but for those of experts. Bound through torch's stable ABI, so
// that one library serves every torch from TORCH_TARGET_VERSION on.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>

#include "huge_pages.h"
#include "multiplication.h"
#include "rotations.h"
#include "schemas.h"

namespace smoothrot {
namespace {

constexpr int64_t kNormVectorInputs = 8;  // reference.NORM_VECTOR

Rotations& rotations() {
  static Rotations known;
  return known;
}

QuantArgs quant_args(const char* op, const Tensor& x, Float dtype, int64_t block, double clip,
                     int64_t bits, Source source = Source::plain) {
  check_clip(op, clip);
  QuantArgs q{};
  q.x = x.const_data_ptr();
  q.dtype = dtype;
  q.inputs = x.size(x.dim() - 1) / (is_gated(source) ? 2 : 1);
  q.source = source;
  q.factor = scale_factor(clip, bits);
  q.norm = 1.0f;
  q.bits = int(bits);
  if (block) {
    check_block(op, block, q.inputs);
    q.rotation = rotations().find(block);
    if (!q.rotation) {
      refuse(op, "block", "expected a prepared block, got ", block,
             ". Call smoothrot_vllm.ops.prepare_rotation(", block, ") first.");
    }
    q.norm = float(1.0 / std::sqrt(double(block)));
  }
  return q;
}

// Stored codes and scales, the rows shared between the threads.
std::tuple<Tensor, Tensor> quantize(const QuantArgs& q, int64_t tokens) {
  Tensor codes = q.bits == 4 ? empty({tokens, q.inputs / 2}, ScalarType::Byte)
                             : empty({tokens, q.inputs}, ScalarType::Char);
  Tensor scale = empty({tokens}, ScalarType::Float);
  if (!tokens) return {codes, scale};
  const Kernels& k = kernels();
  Arena arena;
  const ThreadScratch scratch(arena, k.scratch_bytes(q, 1), tokens > 1);
  arena.allocate();
  auto* scales = static_cast<float*>(scale.mutable_data_ptr());
  void* out = codes.mutable_data_ptr();
  share(tokens, ceil_div(kGrainValues, q.inputs), [&](int64_t begin, int64_t end) {
    k.quant_rows(q, out, scales, begin, end, scratch.of_this_thread(arena));
  });
  return {codes, scale};
}

std::tuple<Tensor, Tensor> quant_impl(const char* op, const Tensor& x, int64_t block, double clip,
                                      int64_t bits) {
  const Float dtype = check_activations(op, "x", x, 2, 2);
  check_bits(op, "bits", bits);
  return quantize(quant_args(op, x, dtype, block, clip, bits), x.size(0));
}

std::tuple<Tensor, Tensor> quant(const Tensor& x, double clip, int64_t bits) {
  return quant_impl("quant", x, 0, clip, bits);
}

std::tuple<Tensor, Tensor> hadamard_quant(const Tensor& x, int64_t block, double clip,
                                          int64_t bits) {
  if (block < 1)
    refuse("hadamard_quant", "block", "expected a positive block size, got ", block, ".");
  return quant_impl("hadamard_quant", x, block, clip, bits);
}

std::tuple<Tensor, Tensor> gated_quant(const char* op, Source source, const Tensor& gate_up,
                                       int64_t block, double clip, int64_t bits) {
  const Float dtype = check_gate_up(op, gate_up, 2, 2);
  check_bits(op, "bits", bits);
  return quantize(quant_args(op, gate_up, dtype, block, clip, bits, source), gate_up.size(0));
}

std::tuple<Tensor, Tensor> silu_mul_hadamard_quant(const Tensor& gate_up, int64_t block,
                                                   double clip, int64_t bits) {
  return gated_quant("silu_mul_hadamard_quant", Source::silu_mul, gate_up, block, clip, bits);
}

std::tuple<Tensor, Tensor> swigluoai_hadamard_quant(const Tensor& gate_up, int64_t block,
                                                    double clip, int64_t bits) {
  return gated_quant("swigluoai_hadamard_quant", Source::swigluoai, gate_up, block, clip, bits);
}

std::tuple<Tensor, Tensor> rms_norm_quant(const Tensor& x, std::optional<Tensor> weight,
                                          double epsilon, double clip, int64_t bits,
                                          std::optional<Tensor> residual) {
  constexpr const char* op = "rms_norm_quant";
  const Float dtype = check_activations(op, "x", x, 2, 2);
  check_bits(op, "bits", bits);
  const int64_t tokens = x.size(0), inputs = x.size(1);
  if (inputs % kNormVectorInputs) {
    refuse(op, "x", "expected inputs in multiples of ", kNormVectorInputs, ", got ", describe(x),
           ".");
  }
  if (!(epsilon >= 0.0))
    refuse(op, "epsilon", "expected a number of at least 0, got ", epsilon, ".");
  QuantArgs q = quant_args(op, x, dtype, 0, clip, bits, Source::rms_norm);
  q.norm_args.epsilon = float(epsilon);
  if (weight) {
    check_tensor(op, "weight", *weight, x.scalar_type(), {inputs});
    q.norm_args.weight = weight->const_data_ptr();
  }
  if (residual) {
    check_tensor(op, "residual", *residual, x.scalar_type(), {tokens, inputs});
    q.norm_args.residual = residual->mutable_data_ptr();
  }
  return quantize(q, tokens);
}

void prepare_rotation(const Tensor& base_matrix, int64_t power) {
  constexpr const char* op = "prepare_rotation";
  check_tensor(op, "base_matrix", base_matrix, ScalarType::Char, {kAnySize, kAnySize});
  const int64_t base = base_matrix.size(0);
  if (base_matrix.size(1) != base || (base != 1 && base % 4)) {
    refuse(op, "base_matrix", "expected a square matrix of order 1 or a multiple of 4, got ",
           describe(base_matrix), ".");
  }
  if (power < 1 || (power & (power - 1)))
    refuse(op, "power", "expected a power of two, got ", power, ".");
  const auto* signs = static_cast<const int8_t*>(base_matrix.const_data_ptr());
  for (int64_t i = 0; i < base * base; ++i) {
    if (signs[i] != 1 && signs[i] != -1)
      refuse(op, "base_matrix", "expected entries +1 and -1, got ", int(signs[i]), ".");
  }
  rotations().add(base, power, signs);
}

Tensor prepack_weight(const Tensor& weight, const Tensor& weight_scale,
                      std::optional<Tensor> group_scale, int64_t bits) {
  constexpr const char* op = "prepack_weight";
  check_bits(op, "bits", bits);
  const ScalarType dtype = bits == 4 ? ScalarType::Byte : ScalarType::Char;
  const bool stacked = weight.dim() == 3 && weight.size(0) > 0;
  const int64_t experts = stacked ? weight.size(0) : 1;
  // All experts have the shapes of the first.
  const auto own = [&](const char* argument, const Tensor& t, ScalarType type) {
    if (!stacked) return t;
    check_tensor(op, argument, t, type, {experts, kAnySize, kAnySize});
    return torch::stable::select(t, 0, 0);
  };
  const Tensor codes = own("weight", weight, dtype);
  check_tensor(op, "weight", codes, dtype, {kAnySize, kAnySize});
  const int64_t inputs = codes.size(1) * (bits == 4 ? 2 : 1);
  if (inputs < 2 || inputs % 2)
    refuse(op, "weight", "expected an even number of inputs, got ", describe(weight), ".");
  const Tensor scale = own("weight_scale", weight_scale, ScalarType::Float);
  std::optional<Tensor> groups;
  if (group_scale) groups = own("group_scale", *group_scale, ScalarType::Byte);
  const int64_t group_size = group_size_of(op, groups, codes.size(0), inputs, cpu_place());
  const WeightLayout w = check_weight(op, scale, inputs, group_size, bits, 4);
  if (w.columns != codes.size(0)) {
    refuse(op, "weight_scale", "expected a row for each of the ", codes.size(0), " outputs, got ",
           describe(scale), ".");
  }
  Tensor packed = stacked ? empty_in_huge_pages({experts, w.panels, w.panel_bytes})
                          : empty_in_huge_pages({w.panels, w.panel_bytes});
  auto* out = static_cast<uint8_t*>(packed.mutable_data_ptr());
  const auto* all_codes = static_cast<const uint8_t*>(weight.const_data_ptr());
  const auto* all_scales = static_cast<const float*>(weight_scale.const_data_ptr());
  const auto* all_groups =
      groups ? static_cast<const uint8_t*>(group_scale->const_data_ptr()) : nullptr;
  share(experts * w.panels, ceil_div(kGrainValues, w.panel_bytes), [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t expert = begin / w.panels, first = expert * w.panels,
                    stop = std::min(end, first + w.panels);
      prepack(all_codes + expert * w.columns * w.inputs * bits / 8, all_scales + expert * w.columns,
              all_groups ? all_groups + expert * w.columns * w.groups : nullptr, w,
              out + first * w.panel_bytes, begin - first, stop - first);
      begin = stop;
    }
  });
  return packed;
}

Tensor gemm(const Tensor& codes, const Tensor& scale, const Tensor& packed,
            const Tensor& weight_scale, std::optional<Tensor> bias, ScalarType out_dtype,
            int64_t act_bits, int64_t weight_bits, int64_t group_size) {
  constexpr const char* op = "gemm";
  check_bits(op, "act_bits", act_bits);
  check_bits(op, "weight_bits", weight_bits);
  const auto [tokens, inputs] = check_codes(op, codes, scale, act_bits);
  const WeightLayout w = check_weight(op, weight_scale, inputs, group_size, weight_bits, act_bits);
  const Kernels& k = kernels();
  Multiplication m(op, k, tokens, w, packed, bias, float_type(op, "out_dtype", out_dtype));
  Tensor out = empty({tokens, w.columns}, out_dtype);
  if (!tokens) return out;
  m.run_stored(out.mutable_data_ptr(), codes, scale, act_bits);
  return out;
}

Tensor linear_impl(const char* op, Source source, const Tensor& x, const Tensor& packed,
                   const Tensor& weight_scale, const std::optional<Tensor>& bias, int64_t block,
                   double clip, int64_t act_bits, int64_t weight_bits, int64_t group_size) {
  check_bits(op, "act_bits", act_bits);
  check_bits(op, "weight_bits", weight_bits);
  const Float dtype = is_gated(source) ? check_gate_up(op, x, 1, kMostDims)
                                       : check_activations(op, "x", x, 1, kMostDims);
  const QuantArgs q = quant_args(op, x, dtype, block, clip, act_bits, source);
  const WeightLayout w =
      check_weight(op, weight_scale, q.inputs, group_size, weight_bits, act_bits);
  const int64_t tokens = x.numel() / x.size(x.dim() - 1);
  const Kernels& k = kernels();
  Multiplication m(op, k, tokens, w, packed, bias, dtype);
  int64_t sizes[kMostDims];
  for (int64_t i = 0; i + 1 < x.dim(); ++i) sizes[i] = x.size(i);
  sizes[x.dim() - 1] = w.columns;
  Tensor out = empty(sizes, x.dim(), x.scalar_type());
  if (!tokens) return out;
  if (tokens > 1 && m.args.act.tiles.tiles < torch::stable::get_num_threads()) {
    // Fewer tiles than threads: quantize by rows, which are more.
    const auto [codes, scale] = quantize(q, tokens);
    m.run_stored(out.mutable_data_ptr(), codes, scale, act_bits);
    return out;
  }
  m.allocate(k.scratch_bytes(q, m.args.act.tiles.rows + 1), nullptr);
  m.run(out.mutable_data_ptr(), [&](int64_t begin, int64_t end, void* scratch) {
    k.quant_tiles(q, m.args.act, begin, end, scratch);
  });
  return out;
}

Tensor linear(const Tensor& x, const Tensor& packed, const Tensor& weight_scale,
              std::optional<Tensor> bias, int64_t block, double clip, int64_t act_bits,
              int64_t weight_bits, int64_t group_size) {
  return linear_impl("linear", Source::plain, x, packed, weight_scale, bias, block, clip, act_bits,
                     weight_bits, group_size);
}

Tensor silu_mul_linear(const Tensor& gate_up, const Tensor& packed, const Tensor& weight_scale,
                       std::optional<Tensor> bias, int64_t block, double clip, int64_t act_bits,
                       int64_t weight_bits, int64_t group_size) {
  return linear_impl("silu_mul_linear", Source::silu_mul, gate_up, packed, weight_scale, bias,
                     block, clip, act_bits, weight_bits, group_size);
}

std::string kernel_name() { return kernels().name; }

std::string select_kernel(std::string isa) {
  chosen_kernels.store(&select_kernels(isa.c_str()), std::memory_order_release);
  return kernel_name();
}

}  // namespace
}  // namespace smoothrot

STABLE_TORCH_LIBRARY(smoothrot, m) {
  smoothrot::define_ops(m);
  m.def("prepare_rotation(Tensor base_matrix, int power) -> ()");
  m.def(
      "swigluoai_hadamard_quant(Tensor gate_up, int block, float clip, int bits) -> (Tensor, "
      "Tensor)");
  m.def("kernel_name() -> str");
  m.def("select_kernel(str isa) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(smoothrot, CPU, m) {
  m.impl("quant", TORCH_BOX(&smoothrot::quant));
  m.impl("hadamard_quant", TORCH_BOX(&smoothrot::hadamard_quant));
  m.impl("silu_mul_hadamard_quant", TORCH_BOX(&smoothrot::silu_mul_hadamard_quant));
  m.impl("swigluoai_hadamard_quant", TORCH_BOX(&smoothrot::swigluoai_hadamard_quant));
  m.impl("rms_norm_quant", TORCH_BOX(&smoothrot::rms_norm_quant));
  m.impl("prepare_rotation", TORCH_BOX(&smoothrot::prepare_rotation));
  m.impl("prepack_weight", TORCH_BOX(&smoothrot::prepack_weight));
  m.impl("gemm", TORCH_BOX(&smoothrot::gemm));
  m.impl("linear", TORCH_BOX(&smoothrot::linear));
  m.impl("silu_mul_linear", TORCH_BOX(&smoothrot::silu_mul_linear));
}

STABLE_TORCH_LIBRARY_IMPL(smoothrot, CompositeExplicitAutograd, m) {
  m.impl("kernel_name", TORCH_BOX(&smoothrot::kernel_name));
  m.impl("select_kernel", TORCH_BOX(&smoothrot::select_kernel));
}
