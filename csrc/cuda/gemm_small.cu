// SPDX-License-Identifier: Apache-2.0
// Launcher of the small-M GEMM.
#include "gemm_small_kernel.h"

namespace smoothrot::cuda {
namespace {

template <Codes Form, Codes Weight, int Tiles, int Octets>
cudaError_t launch_small(const GemmArgs& g, cudaStream_t stream) {
  constexpr int64_t kOutputs = Tiles * kTileOutputs;
  constexpr int64_t kShared = sizeof(SmallShared<Tiles, Octets>);
  const int blocks = int((g.outputs + kOutputs - 1) / kOutputs);
  return launch(gemm_small_kernel<Form, Weight, Tiles, Octets>, blocks, 1, kSmallThreads, kShared,
                stream, g);
}

// The widest whose blocks occupy half of the multiprocessors, which draw all that DRAM gives.
Width choose_width(const GemmArgs& g, int widest) {
  const int64_t tiles = 2 * g.outputs / kTileOutputs / multiprocessors();
  return tiles >= widest ? Width::wide : tiles >= widest / 2 ? Width::medium : Width::narrow;
}

template <Codes Form, Codes Weight, int Octets>
cudaError_t launch_tiles(const GemmArgs& g, Width width, cudaStream_t stream) {
  constexpr int kWidest = 8 / kLaneWords<Weight>;
  switch (width == Width::automatic ? choose_width(g, kWidest) : width) {
    case Width::wide:
      return launch_small<Form, Weight, kWidest, Octets>(g, stream);
    case Width::medium:
      return launch_small<Form, Weight, kWidest / 2, Octets>(g, stream);
    default:
      return launch_small<Form, Weight, kWidest / 4, Octets>(g, stream);
  }
}

struct Small {
  template <Codes Form, Codes Weight>
  static cudaError_t launch(const GemmArgs& g, Width width, cudaStream_t stream) {
    return g.tokens <= kOctet ? launch_tiles<Form, Weight, 1>(g, width, stream)
                              : launch_tiles<Form, Weight, 2>(g, width, stream);
  }
};

}  // namespace

cudaError_t gemm_small(const GemmArgs& g, cudaStream_t stream, Width width) {
  if (!valid(g) || g.tokens > kSmallGemmTokens || g.group_size != g.inputs)
    return cudaErrorInvalidValue;
  if (g.tokens == 0) return cudaSuccess;
  return launch_forms<Small>(g, g, width, stream);
}

}  // namespace smoothrot::cuda
