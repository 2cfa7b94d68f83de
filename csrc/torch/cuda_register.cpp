// SPDX-License-Identifier: Apache-2.0
#include <torch/csrc/stable/library.h>

#include "cuda_ops.h"
#include "schemas.h"

namespace {

std::string cuda_architectures() { return SMOOTHROT_CUDA_ARCHITECTURES; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(smoothrot, m) { smoothrot::define_cuda_ops(m); }

STABLE_TORCH_LIBRARY_IMPL(smoothrot, CUDA, m) {
  m.impl("quant", TORCH_BOX(&smoothrot::cuda::ops::quant));
  m.impl("hadamard_quant", TORCH_BOX(&smoothrot::cuda::ops::hadamard_quant));
  m.impl("silu_mul_hadamard_quant", TORCH_BOX(&smoothrot::cuda::ops::silu_mul_hadamard_quant));
  m.impl("rms_norm_quant", TORCH_BOX(&smoothrot::cuda::ops::rms_norm_quant));
  m.impl("prepack_weight", TORCH_BOX(&smoothrot::cuda::ops::prepack_weight));
  m.impl("gemm", TORCH_BOX(&smoothrot::cuda::ops::gemm));
  m.impl("linear", TORCH_BOX(&smoothrot::cuda::ops::linear));
  m.impl("silu_mul_linear", TORCH_BOX(&smoothrot::cuda::ops::silu_mul_linear));
  m.impl("gemm_experts", TORCH_BOX(&smoothrot::cuda::ops::gemm_experts));
  m.impl("combine_experts", TORCH_BOX(&smoothrot::cuda::ops::combine_experts));
}

STABLE_TORCH_LIBRARY_IMPL(smoothrot, CompositeExplicitAutograd, m) {
  m.impl("prepare_cuda_rotation", TORCH_BOX(&smoothrot::cuda::ops::prepare_cuda_rotation));
  m.impl("cuda_kernels", TORCH_BOX(&smoothrot::cuda::ops::cuda_kernels));
  m.impl("force_cuda_gemm", TORCH_BOX(&smoothrot::cuda::ops::force_cuda_gemm));
  m.impl("cuda_quant_kernel", TORCH_BOX(&smoothrot::cuda::ops::cuda_quant_kernel));
  m.impl("cuda_architectures", TORCH_BOX(&cuda_architectures));
}
