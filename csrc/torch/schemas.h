// SPDX-License-Identifier: Apache-2.0
// Schemas of the ops that every device implements, and of those that only CUDA does.
#pragma once

namespace smoothrot {

template <typename Library>
void define_ops(Library& m) {
  m.def("quant(Tensor x, float clip, int bits) -> (Tensor, Tensor)");
  m.def("hadamard_quant(Tensor x, int block, float clip, int bits) -> (Tensor, Tensor)");
  m.def(
      "silu_mul_hadamard_quant(Tensor gate_up, int block, float clip, int bits) -> (Tensor, "
      "Tensor)");
  m.def(
      "rms_norm_quant(Tensor x, Tensor? weight, float epsilon, float clip, int bits, Tensor(a!)? "
      "residual) -> "
      "(Tensor, Tensor)");
  m.def(
      "prepack_weight(Tensor weight, Tensor weight_scale, Tensor? group_scale, int bits) -> "
      "Tensor");
  m.def(
      "gemm(Tensor codes, Tensor scale, Tensor packed, Tensor weight_scale, Tensor? bias, "
      "ScalarType out_dtype, "
      "int act_bits, int weight_bits, int group_size) -> Tensor");
  m.def(
      "linear(Tensor x, Tensor packed, Tensor weight_scale, Tensor? bias, int block, float clip, "
      "int act_bits, "
      "int weight_bits, int group_size) -> Tensor");
  m.def(
      "silu_mul_linear(Tensor gate_up, Tensor packed, Tensor weight_scale, Tensor? bias, int "
      "block, float clip, "
      "int act_bits, int weight_bits, int group_size) -> Tensor");
  m.def(
      "gemm_experts(Tensor codes, Tensor scale, Tensor packed, Tensor weight_scale, Tensor? bias, "
      "Tensor tiles, ScalarType out_dtype, int act_bits, int weight_bits, int group_size) -> "
      "Tensor");
  m.def(
      "combine_experts(Tensor rows, Tensor sources, Tensor weights, ScalarType out_dtype) -> "
      "Tensor");
}

template <typename Library>
void define_cuda_ops(Library& m) {
  m.def("prepare_cuda_rotation(Tensor base_matrix, int power, int device) -> ()");
  m.def("cuda_architectures() -> str");
  m.def("cuda_kernels() -> str");
  m.def("force_cuda_gemm(str name) -> ()");
  m.def("cuda_quant_kernel(str producer, int inputs, int block, int device) -> str");
}

}  // namespace smoothrot
