// SPDX-License-Identifier: Apache-2.0
// The CUDA ops on a make-believe GPU: tensors are the CPU's, the hand-written kernels are emulated,
// and the CUTLASS kernels are played by one of them. Registers the ops as smoothrot_emulated::*.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <string>
#include <vector>

#include "../../csrc/torch/cuda_device.h"
#include "../../csrc/torch/cuda_ops.h"
#include "../../csrc/torch/schemas.h"

namespace smoothrot::cuda {
namespace {

GpuFacts pretended{80, 108};
int64_t pretended_shared = 99 * 1024;
std::string cutlass_launched;

const char* play_cutlass(const char* name, const CutlassArgs& a, Codes form, Codes weight_form) {
  cutlass_launched = name;
  GemmArgs g{};
  g.codes = a.codes;
  g.form = form;
  g.scale = a.token_scale;
  g.weight = a.weight;
  g.weight_form = weight_form;
  g.weight_scale = a.channel_scale;
  g.group_size = kPerChannel;
  g.inputs = a.inputs;
  g.bias = a.bias;
  g.bias_dtype = g.out_dtype = a.bfloat16 ? Float::bf16 : Float::f16;
  g.tokens = a.tokens;
  g.outputs = a.outputs;
  // The stand-in knows no pitch.
  const size_t row = size_t(a.outputs) * 2, pitch = size_t(a.pitch) * 2;
  std::vector<char> out(size_t(a.tokens) * row);
  g.out = out.data();
  if (gemm_s8(g, nullptr) != cudaSuccess) return "the stand-in failed";
  for (size_t t = 0; t < size_t(a.tokens); ++t)
    std::memcpy(static_cast<char*>(a.out) + t * pitch, out.data() + t * row, row);
  return nullptr;
}

void pretend(int64_t capability, int64_t multiprocessors, int64_t shared_bytes) {
  pretended = {int(capability), int(multiprocessors)};
  pretended_shared = shared_bytes;
  cutlass_launched.clear();
}

// Name of the CUTLASS kernel that the last gemm launched, or "".
std::string launched() { return cutlass_launched; }

std::string choose(int64_t tokens, int64_t outputs, int64_t inputs, int64_t group_size,
                   int64_t act_bits, int64_t weight_bits, ScalarType out_dtype,
                   std::optional<ScalarType> bias_dtype) {
  GemmArgs g{};
  g.tokens = tokens;
  g.outputs = outputs;
  g.inputs = inputs;
  static const uint32_t scales[1] = {};  // never read
  g.group_size = group_size;
  g.group_scale = group_size == kPerChannel ? nullptr : scales;
  g.form = activation_form(pretended, int(act_bits), tokens);
  g.weight_form = weight_bits == 4 ? Codes::packed_int4 : Codes::int8;
  g.out_dtype = float_type("choose", "out_dtype", out_dtype);
  if (bias_dtype) {
    g.bias = &g;
    g.bias_dtype = float_type("choose", "bias_dtype", *bias_dtype);
  }
  return choose_gemm(pretended, g).name;
}

bool runs_on(std::string architectures, int64_t capability) {
  return architecture_runs(architectures, int(capability));
}

}  // namespace

#define PLAYED(name, form, weight_form)                  \
  const char* cutlass_##name(const CutlassArgs& args) {  \
    return play_cutlass(#name, args, form, weight_form); \
  }
PLAYED(sm80_32x64, Codes::packed_int4, Codes::packed_int4)
PLAYED(sm80_64x128, Codes::packed_int4, Codes::packed_int4)
PLAYED(sm80_128x128, Codes::packed_int4, Codes::packed_int4)
PLAYED(sm80_128x256, Codes::packed_int4, Codes::packed_int4)
PLAYED(sm90_128x32, Codes::int8, Codes::packed_int4)
PLAYED(sm90_128x64, Codes::int8, Codes::packed_int4)
PLAYED(sm90_128x128, Codes::int8, Codes::packed_int4)
PLAYED(sm90_s8_128x64, Codes::int8, Codes::int8)
PLAYED(sm90_s8_128x128, Codes::int8, Codes::int8)
PLAYED(sm90_s8_128x256, Codes::int8, Codes::int8)
#undef PLAYED

struct Device::Guard {};

Device::Device(const char* op, const char* argument, const Tensor& on) : place(cpu_place()) {
  if (!place.holds(on))
    refuse(op, argument, "expected a tensor on a CUDA device, got another device.");
  gpu = pretended;
  shared_bytes = pretended_shared;
}

Device::~Device() = default;

const char* error_text(cudaError_t error) {
  return error == cudaErrorInvalidValue ? "invalid argument" : "failed";
}

const void* upload(int, const void* data, size_t bytes) {
  return std::memcpy(new char[bytes], data, bytes);
}

}  // namespace smoothrot::cuda

STABLE_TORCH_LIBRARY(smoothrot_emulated, m) {
  smoothrot::define_ops(m);
  smoothrot::define_cuda_ops(m);
  m.def("pretend(int capability, int multiprocessors, int shared_bytes) -> ()");
  m.def("launched() -> str");
  m.def(
      "choose(int tokens, int outputs, int inputs, int group_size, int act_bits, int weight_bits, "
      "ScalarType out_dtype, ScalarType? bias_dtype) -> str");
  m.def("runs_on(str architectures, int capability) -> bool");
}

// Every device's tensors come here: a tensor on the wrong one must be refused, not dispatched
// elsewhere.
STABLE_TORCH_LIBRARY_IMPL(smoothrot_emulated, CompositeExplicitAutograd, m) {
  using namespace smoothrot::cuda;
  m.impl("quant", TORCH_BOX(&ops::quant));
  m.impl("hadamard_quant", TORCH_BOX(&ops::hadamard_quant));
  m.impl("silu_mul_hadamard_quant", TORCH_BOX(&ops::silu_mul_hadamard_quant));
  m.impl("rms_norm_quant", TORCH_BOX(&ops::rms_norm_quant));
  m.impl("prepack_weight", TORCH_BOX(&ops::prepack_weight));
  m.impl("gemm", TORCH_BOX(&ops::gemm));
  m.impl("linear", TORCH_BOX(&ops::linear));
  m.impl("silu_mul_linear", TORCH_BOX(&ops::silu_mul_linear));
  m.impl("gemm_experts", TORCH_BOX(&ops::gemm_experts));
  m.impl("combine_experts", TORCH_BOX(&ops::combine_experts));
  m.impl("prepare_cuda_rotation", TORCH_BOX(&ops::prepare_cuda_rotation));
  m.impl("cuda_kernels", TORCH_BOX(&ops::cuda_kernels));
  m.impl("force_cuda_gemm", TORCH_BOX(&ops::force_cuda_gemm));
  m.impl("cuda_quant_kernel", TORCH_BOX(&ops::cuda_quant_kernel));
  m.impl("pretend", TORCH_BOX(&pretend));
  m.impl("launched", TORCH_BOX(&launched));
  m.impl("choose", TORCH_BOX(&choose));
  m.impl("runs_on", TORCH_BOX(&runs_on));
}
