// SPDX-License-Identifier: Apache-2.0
// Launchers of the tiled GEMM of a layer's experts, and of the sum of what they give a token.
#include "combine_kernel.h"
#include "gemm_s8_launch.h"

namespace smoothrot::cuda {
namespace {

static_assert(kExpertTileTokens == kTiledTokens);

struct TiledExperts {
  static const GemmArgs& gemm(const ExpertsArgs& e) { return e.gemm; }

  template <Codes Form, Codes Weight, int Group, int Columns>
  static cudaError_t launch_tiles(const ExpertsArgs& e, cudaStream_t stream) {
    return launch_columns<Form, Weight, Group, Columns>(
        gemm_experts_kernel<Form, Weight, Group, Columns>, e, e.tile_count, e.gemm.outputs, stream);
  }

  template <Codes Form, Codes Weight, int Group>
  static cudaError_t launch(const ExpertsArgs& e, Width width, cudaStream_t stream) {
    return takes_wide_tiles(width, e.tile_count, e.gemm.outputs)
               ? launch_tiles<Form, Weight, Group, kWideColumns>(e, stream)
               : launch_tiles<Form, Weight, Group, kNarrowColumns>(e, stream);
  }
};

}  // namespace

cudaError_t gemm_experts(const ExpertsArgs& e, cudaStream_t stream, Width width) {
  const bool tiled = e.experts > 0 && e.experts <= INT32_MAX && e.tile_count >= 0 &&
                     e.tile_count <= INT32_MAX && e.expert_bytes % 16 == 0;
  if (!valid(e.gemm) || !tiled || e.gemm.bias || width == Width::medium)
    return cudaErrorInvalidValue;
  if (e.gemm.tokens == 0 || e.tile_count == 0) return cudaSuccess;
  return launch_forms<ByGroups<TiledExperts>>(e.gemm, e, width, stream);
}

cudaError_t combine_experts(const CombineArgs& c, cudaStream_t stream) {
  const int64_t blocks = c.outputs > 0 ? (c.outputs + kCombineThreads - 1) / kCombineThreads : 0;
  if (c.tokens < 0 || c.tokens > INT32_MAX || c.top_k < 1 || blocks < 1 ||
      blocks > kMostCombineBlocks) {
    return cudaErrorInvalidValue;
  }
  if (c.tokens == 0) return cudaSuccess;
  return launch(combine_rows, int(c.tokens), int(blocks), kCombineThreads, 0, stream, c);
}

}  // namespace smoothrot::cuda
