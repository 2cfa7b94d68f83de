// SPDX-License-Identifier: Apache-2.0
// The CUDA ops. They refuse what the kernels cannot compute before anything is launched, only
// enqueue work on torch's current stream, and take all memory from torch.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <tuple>

namespace smoothrot::cuda::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Quantized = std::tuple<Tensor, Tensor>;

Quantized quant(const Tensor& x, double clip, int64_t bits);
Quantized hadamard_quant(const Tensor& x, int64_t block, double clip, int64_t bits);
Quantized silu_mul_hadamard_quant(const Tensor& gate_up, int64_t block, double clip, int64_t bits);
Quantized rms_norm_quant(const Tensor& x, std::optional<Tensor> weight, double epsilon, double clip,
                         int64_t bits, std::optional<Tensor> residual);
Tensor prepack_weight(const Tensor& weight, const Tensor& weight_scale,
                      std::optional<Tensor> group_scale, int64_t bits);
Tensor gemm(const Tensor& codes, const Tensor& scale, const Tensor& packed,
            const Tensor& weight_scale, std::optional<Tensor> bias, ScalarType out_dtype,
            int64_t act_bits, int64_t weight_bits, int64_t group_size);
Tensor linear(const Tensor& x, const Tensor& packed, const Tensor& weight_scale,
              std::optional<Tensor> bias, int64_t block, double clip, int64_t act_bits,
              int64_t weight_bits, int64_t group_size);
Tensor silu_mul_linear(const Tensor& gate_up, const Tensor& packed, const Tensor& weight_scale,
                       std::optional<Tensor> bias, int64_t block, double clip, int64_t act_bits,
                       int64_t weight_bits, int64_t group_size);
// gemm where the tokens of an expert are neighbors: packed and weight_scale are stacked by expert,
// tiles is int32 (3, any): of each tile its expert, its first token and the end of its expert's
// tokens. A bias is refused.
Tensor gemm_experts(const Tensor& codes, const Tensor& scale, const Tensor& packed,
                    const Tensor& weight_scale, std::optional<Tensor> bias, const Tensor& tiles,
                    ScalarType out_dtype, int64_t act_bits, int64_t weight_bits,
                    int64_t group_size);
// Of each token the sum of rows[sources] * weights, (tokens, top_k) each, in the order of sources.
Tensor combine_experts(const Tensor& rows, const Tensor& sources, const Tensor& weights,
                       ScalarType out_dtype);
// Names of every kernel of this build, with spaces between them.
std::string cuda_kernels();
// force_gemm of dispatch.h, for tests.
void force_cuda_gemm(std::string name);
// Name of the kernel that quantizes rows of `inputs` values rotated by a prepared block, 0 for
// none.
std::string cuda_quant_kernel(std::string producer, int64_t inputs, int64_t block, int64_t device);
// `base_matrix` lies on the CPU; `device` is a CUDA device index.
void prepare_cuda_rotation(const Tensor& base_matrix, int64_t power, int64_t device);

}  // namespace smoothrot::cuda::ops
