// SPDX-License-Identifier: Apache-2.0
#include "cuda_ops.h"

#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <map>
#include <mutex>
#include <vector>

#include "cuda_checks.h"

namespace smoothrot::cuda::ops {
namespace {

constexpr int64_t kMostDims = 8;

class Rotations {
 public:
  void add(int device, int64_t base, int64_t power, const int8_t* matrix) {
    std::lock_guard<std::mutex> lock(mutex_);
    Rotation& rotation = known_[{device, base * power}];
    if (rotation.power) return;
    std::vector<uint32_t> words(size_t(sign_words(base)));
    const void* signs = nullptr;
    if (!words.empty()) {
      pack_signs(matrix, base, words.data());
      signs = upload(device, words.data(), words.size() * sizeof(uint32_t));
    }
    rotation.base = base;
    rotation.signs = static_cast<const uint32_t*>(signs);
    rotation.power = power;
  }

  Rotation find(const char* op, int device, int64_t block) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = known_.find({device, block});
    if (found == known_.end() || !found->second.power) {
      refuse(op, "block", "expected a prepared block, got ", block,
             ". Call smoothrot_vllm.ops.prepare_rotation(", block, ", device) first.");
    }
    return found->second;
  }

 private:
  std::mutex mutex_;
  std::map<std::pair<int, int64_t>, Rotation> known_;
};

Rotations& rotations() {
  static Rotations known;
  return known;
}

// Checks the argument x, (..., factor * K), and fills in all but the results.
QuantArgs quant_args(const char* op, const Device& device, const char* argument, const Tensor& x,
                     int64_t most_dims, int64_t factor, int64_t block, double clip, int64_t bits) {
  QuantArgs q{};
  q.dtype = check_activations(op, argument, x, most_dims == 2 ? 2 : 1, most_dims, device.place);
  check_aligned(op, argument, x);
  check_bits(op, "bits", bits);
  check_clip(op, clip);
  const int64_t width = x.size(x.dim() - 1);
  if (width % factor)
    refuse(op, argument, "expected gate and up side by side, got ", width, " inputs.");
  q.inputs = width / factor;
  check_inputs(op, argument, q.inputs, kMostInputs);
  q.x = x.const_data_ptr();
  q.tokens = x.numel() / width;
  q.factor = scale_factor(clip, bits);
  q.norm = 1.0f;
  q.bits = int(bits);
  if (block) {
    check_block(op, block, q.inputs);
    q.rotation = rotations().find(op, device.place.index, block);
    q.norm = float(1.0 / std::sqrt(double(block)));
  }
  const int64_t shared = quant_shared_bytes(q);
  if (shared > device.shared_bytes) {
    refuse(op, argument, "expected rows that fit into the ", device.shared_bytes,
           " bytes of shared memory of ", device.place.name(), ", got ", q.inputs,
           " inputs, which take ", shared, ".");
  }
  return q;
}

using QuantLauncher = cudaError_t (*)(const QuantArgs&, cudaStream_t);

Quantized quantize(const char* op, QuantArgs& q, Codes form, const Tensor& like,
                   const Device& device, QuantLauncher launch) {
  q.form = form;
  const int64_t stored_bits = form == Codes::packed_int4 ? 4 : 8;
  Tensor codes = torch::stable::new_empty(like, {q.tokens, stored_width(q.inputs, stored_bits)},
                                          stored_dtype(stored_bits));
  Tensor scale = torch::stable::new_empty(like, {q.tokens}, ScalarType::Float);
  q.codes = codes.mutable_data_ptr();
  q.scale = static_cast<float*>(scale.mutable_data_ptr());
  if (q.tokens) check_launched(op, launch(q, device.stream));
  return {codes, scale};
}

// How the weights of a linear are stored and scaled.
struct Scheme {
  int64_t act_bits, weight_bits, group_size;
};

// What the ops that multiply share: the weight's side of the arguments.
GemmArgs gemm_args(const char* op, const Device& device, int64_t inputs, const Tensor& packed,
                   const Tensor& weight_scale, const std::optional<Tensor>& bias,
                   const Scheme& scheme) {
  check_bits(op, "act_bits", scheme.act_bits);
  check_bits(op, "weight_bits", scheme.weight_bits);
  check_inputs(op, "packed", inputs, kMostGemmInputs);
  GemmArgs g{};
  g.inputs = inputs;
  g.outputs = check_weight_scale(op, weight_scale, device.place);
  g.group_size = scheme.group_size;
  if (check_groups(op, g.group_size, inputs, scheme.weight_bits, scheme.act_bits)) {
    check_tensor(op, "packed", packed, ScalarType::Byte,
                 {grouped_bytes(g.outputs, inputs, g.group_size)}, device.place);
    const auto* bytes = static_cast<const unsigned char*>(packed.const_data_ptr());
    g.group_scale = reinterpret_cast<const uint32_t*>(bytes + code_bytes(g.outputs, inputs));
  } else {
    check_tensor(op, "packed", packed, stored_dtype(scheme.weight_bits),
                 {g.outputs, stored_width(inputs, scheme.weight_bits)}, device.place);
  }
  check_aligned(op, "packed", packed);
  check_aligned(op, "weight_scale", weight_scale);
  g.weight = packed.const_data_ptr();
  g.weight_form = stored_form(scheme.weight_bits);
  g.weight_scale = static_cast<const float*>(weight_scale.const_data_ptr());
  if (bias) {
    g.bias_dtype = float_type(op, "bias", bias->scalar_type());
    check_tensor(op, "bias", *bias, bias->scalar_type(), {g.outputs}, device.place);
    check_aligned(op, "bias", *bias);
    g.bias = bias->const_data_ptr();
  }
  return g;
}

// The tokens' side, and the result.
void set_tokens(GemmArgs& g, const Tensor& codes, Codes form, const Tensor& scale, Tensor& out,
                Float out_dtype) {
  g.codes = codes.const_data_ptr();
  g.form = form;
  g.scale = static_cast<const float*>(scale.const_data_ptr());
  g.tokens = codes.size(0);
  g.out = out.mutable_data_ptr();
  g.out_dtype = out_dtype;
}

void multiply(const char* op, GemmArgs& g, const Tensor& codes, Codes form, const Tensor& scale,
              Tensor& out, Float out_dtype, const Device& device) {
  set_tokens(g, codes, form, scale, out, out_dtype);
  if (!g.tokens) return;
  const GemmKernel& kernel = choose_gemm(device.gpu, g);
  const std::string needed = kernel.obstacle(device.gpu, g);
  if (!needed.empty()) refuse(op, kernel.name, "this kernel was forced; it needs ", needed, ".");
  std::optional<Tensor> workspace;
  if (const int64_t bytes = kernel.workspace_bytes(g))
    workspace = torch::stable::new_empty(codes, {bytes}, ScalarType::Byte);
  void* memory = workspace ? workspace->mutable_data_ptr() : nullptr;
  check_launched(op, kernel.run(device.gpu, g, memory, device.stream));
}

// Codes that were quantized before; returns how many inputs they have.
int64_t check_codes(const char* op, const Device& device, const Tensor& codes, const Tensor& scale,
                    int64_t act_bits) {
  check_bits(op, "act_bits", act_bits);
  check_tensor(op, "codes", codes, stored_dtype(act_bits), {kAnySize, kAnySize}, device.place);
  check_aligned(op, "codes", codes);
  check_tensor(op, "scale", scale, ScalarType::Float, {codes.size(0)}, device.place);
  check_aligned(op, "scale", scale);
  return codes.size(1) * (act_bits == 4 ? 2 : 1);
}

}  // namespace

Quantized quant(const Tensor& x, double clip, int64_t bits) {
  const Device device("quant", "x", x);
  QuantArgs q = quant_args("quant", device, "x", x, 2, 1, 0, clip, bits);
  return quantize("quant", q, stored_form(bits), x, device, &cuda::quant);
}

Quantized hadamard_quant(const Tensor& x, int64_t block, double clip, int64_t bits) {
  constexpr const char* op = "hadamard_quant";
  if (block < 1) refuse(op, "block", "expected a positive block size, got ", block, ".");
  const Device device(op, "x", x);
  QuantArgs q = quant_args(op, device, "x", x, 2, 1, block, clip, bits);
  return quantize(op, q, stored_form(bits), x, device, &cuda::quant);
}

Quantized silu_mul_hadamard_quant(const Tensor& gate_up, int64_t block, double clip, int64_t bits) {
  constexpr const char* op = "silu_mul_hadamard_quant";
  const Device device(op, "gate_up", gate_up);
  QuantArgs q = quant_args(op, device, "gate_up", gate_up, 2, 2, block, clip, bits);
  return quantize(op, q, stored_form(bits), gate_up, device, &silu_mul_quant);
}

Quantized rms_norm_quant(const Tensor& x, std::optional<Tensor> weight, double epsilon, double clip,
                         int64_t bits, std::optional<Tensor> residual) {
  constexpr const char* op = "rms_norm_quant";
  const Device device(op, "x", x);
  QuantArgs q = quant_args(op, device, "x", x, 2, 1, 0, clip, bits);
  if (!(epsilon >= 0.0))
    refuse(op, "epsilon", "expected a number of at least 0, got ", epsilon, ".");
  q.epsilon = float(epsilon);
  if (weight) {
    check_tensor(op, "weight", *weight, x.scalar_type(), {q.inputs}, device.place);
    check_aligned(op, "weight", *weight);
    q.norm_weight = weight->const_data_ptr();
  }
  if (residual) {
    check_tensor(op, "residual", *residual, x.scalar_type(), {q.tokens, q.inputs}, device.place);
    check_aligned(op, "residual", *residual);
    q.residual = residual->mutable_data_ptr();
  }
  return quantize(op, q, stored_form(bits), x, device, &cuda::rms_norm_quant);
}

Tensor gemm(const Tensor& codes, const Tensor& scale, const Tensor& packed,
            const Tensor& weight_scale, std::optional<Tensor> bias, ScalarType out_dtype,
            int64_t act_bits, int64_t weight_bits, int64_t group_size) {
  constexpr const char* op = "gemm";
  const Device device(op, "codes", codes);
  const int64_t inputs = check_codes(op, device, codes, scale, act_bits);
  const Float dtype = float_type(op, "out_dtype", out_dtype);
  GemmArgs g = gemm_args(op, device, inputs, packed, weight_scale, bias,
                         {act_bits, weight_bits, group_size});
  Tensor out = torch::stable::new_empty(codes, {codes.size(0), g.outputs}, out_dtype);
  multiply(op, g, codes, stored_form(act_bits), scale, out, dtype, device);
  return out;
}

namespace {

Tensor linear_impl(const char* op, const char* argument, bool gated, const Tensor& x,
                   const Tensor& packed, const Tensor& weight_scale,
                   const std::optional<Tensor>& bias, int64_t block, double clip,
                   const Scheme& scheme) {
  const Device device(op, argument, x);
  QuantArgs q =
      quant_args(op, device, argument, x, kMostDims, gated ? 2 : 1, block, clip, scheme.act_bits);
  GemmArgs g = gemm_args(op, device, q.inputs, packed, weight_scale, bias, scheme);
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) sizes.push_back(x.size(i));
  sizes.push_back(g.outputs);
  Tensor out = torch::stable::new_empty(x, sizes, x.scalar_type());
  const Codes form = activation_form(device.gpu, int(scheme.act_bits), q.tokens);
  const auto [codes, scale] =
      quantize(op, q, form, x, device, gated ? &silu_mul_quant : &cuda::quant);
  multiply(op, g, codes, form, scale, out, q.dtype, device);
  return out;
}

}  // namespace

Tensor linear(const Tensor& x, const Tensor& packed, const Tensor& weight_scale,
              std::optional<Tensor> bias, int64_t block, double clip, int64_t act_bits,
              int64_t weight_bits, int64_t group_size) {
  return linear_impl("linear", "x", false, x, packed, weight_scale, bias, block, clip,
                     {act_bits, weight_bits, group_size});
}

Tensor silu_mul_linear(const Tensor& gate_up, const Tensor& packed, const Tensor& weight_scale,
                       std::optional<Tensor> bias, int64_t block, double clip, int64_t act_bits,
                       int64_t weight_bits, int64_t group_size) {
  return linear_impl("silu_mul_linear", "gate_up", true, gate_up, packed, weight_scale, bias, block,
                     clip, {act_bits, weight_bits, group_size});
}

Tensor gemm_experts(const Tensor& codes, const Tensor& scale, const Tensor& packed,
                    const Tensor& weight_scale, std::optional<Tensor> bias, const Tensor& tiles,
                    ScalarType out_dtype, int64_t act_bits, int64_t weight_bits,
                    int64_t group_size) {
  constexpr const char* op = "gemm_experts";
  if (bias) refuse(op, "bias", "expected none, as no kernel for GPUs adds one.");
  const Device device(op, "codes", codes);
  const int64_t inputs = check_codes(op, device, codes, scale, act_bits);
  const Float dtype = float_type(op, "out_dtype", out_dtype);
  check_bits(op, "weight_bits", weight_bits);
  const int64_t experts = packed.dim() ? packed.size(0) : 0;
  if (experts < 1)
    refuse(op, "packed", "expected (experts, ...), got ", describe(packed, device.place), ".");
  if (group_size == kPerChannel) {
    check_tensor(op, "packed", packed, stored_dtype(weight_bits), {experts, kAnySize, kAnySize},
                 device.place);
  } else {
    check_tensor(op, "packed", packed, ScalarType::Byte, {experts, kAnySize}, device.place);
  }
  check_tensor(op, "weight_scale", weight_scale, ScalarType::Float, {experts, kAnySize, 1},
               device.place);
  check_tensor(op, "tiles", tiles, ScalarType::Int, {3, kAnySize}, device.place);
  // All experts have the shapes of the first.
  const Tensor own = torch::stable::select(packed, 0, 0);
  ExpertsArgs e{};
  e.gemm = gemm_args(op, device, inputs, own, torch::stable::select(weight_scale, 0, 0),
                     std::nullopt, {act_bits, weight_bits, group_size});
  e.expert_bytes = own.numel();
  e.tiles = static_cast<const int32_t*>(tiles.const_data_ptr());
  e.tile_count = tiles.size(1);
  e.experts = experts;
  Tensor out = torch::stable::new_empty(codes, {codes.size(0), e.gemm.outputs}, out_dtype);
  set_tokens(e.gemm, codes, stored_form(act_bits), scale, out, dtype);
  check_launched(op, cuda::gemm_experts(e, device.stream, experts_width()));
  return out;
}

Tensor combine_experts(const Tensor& rows, const Tensor& sources, const Tensor& weights,
                       ScalarType out_dtype) {
  constexpr const char* op = "combine_experts";
  const Device device(op, "rows", rows);
  check_tensor(op, "rows", rows, ScalarType::Float, {kAnySize, kAnySize}, device.place);
  check_tensor(op, "sources", sources, ScalarType::Int, {kAnySize, kAnySize}, device.place);
  check_tensor(op, "weights", weights, ScalarType::Float, {sources.size(0), sources.size(1)},
               device.place);
  CombineArgs c{};
  c.out_dtype = float_type(op, "out_dtype", out_dtype);
  c.tokens = sources.size(0);
  c.top_k = sources.size(1);
  c.row_count = rows.size(0);
  c.outputs = rows.size(1);
  if (c.top_k < 1)
    refuse(op, "sources", "expected at least one source a token, got ",
           describe(sources, device.place), ".");
  if (c.outputs < 1)
    refuse(op, "rows", "expected at least one output, got ", describe(rows, device.place), ".");
  Tensor out = torch::stable::new_empty(rows, {c.tokens, c.outputs}, out_dtype);
  c.rows = static_cast<const float*>(rows.const_data_ptr());
  c.sources = static_cast<const int32_t*>(sources.const_data_ptr());
  c.weights = static_cast<const float*>(weights.const_data_ptr());
  c.out = out.mutable_data_ptr();
  check_launched(op, cuda::combine_experts(c, device.stream));
  return out;
}

std::string cuda_kernels() { return gemm_names() + " " + quant_kernel_names(); }

void force_cuda_gemm(std::string name) {
  if (!force_gemm(name))
    refuse("force_cuda_gemm", "name", "expected one of ", gemm_names(), ", got ", name, ".");
}

std::string cuda_quant_kernel(std::string producer, int64_t inputs, int64_t block, int64_t device) {
  constexpr const char* op = "cuda_quant_kernel";
  QuantArgs q{};
  q.inputs = inputs;
  q.bits = 8;
  q.form = Codes::int8;
  if (block) q.rotation = rotations().find(op, int(device), block);
  const char* name = quant_kernel_name(producer, q);
  if (!name)
    refuse(op, "producer", "expected plain, silu_mul or rms_norm and a row that it takes, got ",
           producer, " and ", inputs, ".");
  return name;
}

void prepare_cuda_rotation(const Tensor& base_matrix, int64_t power, int64_t device) {
  constexpr const char* op = "prepare_cuda_rotation";
  check_tensor(op, "base_matrix", base_matrix, ScalarType::Char, {kAnySize, kAnySize}, cpu_place());
  const int64_t base = base_matrix.size(0);
  if (base_matrix.size(1) != base || (base != 1 && base % 4) || base > kMostBase) {
    refuse(op, "base_matrix", "expected a square matrix of order 1 or a multiple of 4 up to ",
           kMostBase, ", got ", describe(base_matrix, cpu_place()), ".");
  }
  if (power < 1 || (power & (power - 1)))
    refuse(op, "power", "expected a power of two, got ", power, ".");
  rotations().add(int(device), base, power,
                  static_cast<const int8_t*>(base_matrix.const_data_ptr()));
}

}  // namespace smoothrot::cuda::ops
