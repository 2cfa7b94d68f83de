// SPDX-License-Identifier: Apache-2.0
// The tiled GEMM of one linear.
#include "gemm_s8_launch.h"

namespace smoothrot::cuda {

cudaError_t gemm_s8(const GemmArgs& g, cudaStream_t stream) {
  if (!valid(g)) return cudaErrorInvalidValue;
  if (g.tokens == 0) return cudaSuccess;
  return launch_forms<Tiled<false>>(g, stream);
}

}  // namespace smoothrot::cuda
