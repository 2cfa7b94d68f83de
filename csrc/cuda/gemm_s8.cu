// SPDX-License-Identifier: Apache-2.0
// Launcher of the tiled GEMM.
#include "gemm_s8_launch.h"

namespace smoothrot::cuda {
namespace {

struct Tiled {
  static const GemmArgs& gemm(const GemmArgs& g) { return g; }

  template <Codes Form, Codes Weight, int Group, int Columns>
  static cudaError_t launch_tiles(const GemmArgs& g, int64_t token_tiles, cudaStream_t stream) {
    return launch_columns<Form, Weight, Group, Columns>(
        gemm_s8_kernel<Form, Weight, Group, Columns>, g, token_tiles, g.outputs, stream);
  }

  template <Codes Form, Codes Weight, int Group>
  static cudaError_t launch(const GemmArgs& g, Width width, cudaStream_t stream) {
    const int64_t token_tiles = (g.tokens + kTiledTokens - 1) / kTiledTokens;
    return takes_wide_tiles(width, token_tiles, g.outputs)
               ? launch_tiles<Form, Weight, Group, kWideColumns>(g, token_tiles, stream)
               : launch_tiles<Form, Weight, Group, kNarrowColumns>(g, token_tiles, stream);
  }
};

}  // namespace

cudaError_t gemm_s8(const GemmArgs& g, cudaStream_t stream, Width width) {
  if (!valid(g) || width == Width::medium) return cudaErrorInvalidValue;
  if (g.tokens == 0) return cudaSuccess;
  return launch_forms<ByGroups<Tiled>>(g, g, width, stream);
}

}  // namespace smoothrot::cuda
