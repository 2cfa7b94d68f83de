// SPDX-License-Identifier: Apache-2.0
// The tiled GEMM of a layer's experts, and the sum of what they give a token.
#include "combine_kernel.h"
#include "gemm_s8_launch.h"

namespace smoothrot::cuda {

static_assert(kExpertTileTokens == kTiledTokens);

cudaError_t gemm_experts(const GemmArgs& g, cudaStream_t stream) {
  const bool tiled = g.experts > 0 && g.experts <= INT32_MAX && g.tile_count >= 0 && g.tile_count <= INT32_MAX;
  if (!valid(g) || !tiled || g.bias) return cudaErrorInvalidValue;
  if (g.tokens == 0 || g.tile_count == 0) return cudaSuccess;
  return launch_forms<Tiled<true>>(g, stream);
}

cudaError_t combine_experts(const CombineArgs& c, cudaStream_t stream) {
  const int64_t values = c.outputs > 0 ? (c.outputs + kCombineThreads - 1) / kCombineThreads : 0;
  if (c.tokens < 0 || c.tokens > INT32_MAX || c.top_k < 1 || values < 1 || values > kMostCombineBlocks) {
    return cudaErrorInvalidValue;
  }
  if (c.tokens == 0) return cudaSuccess;
  return launch(combine_rows, int(c.tokens), int(values), kCombineThreads, 0, stream, c);
}

}  // namespace smoothrot::cuda
