// SPDX-License-Identifier: Apache-2.0
// Launcher of the small-M GEMM.
#include "gemm_small_kernel.h"

namespace smoothrot::cuda {
namespace {

template <Codes Form, Codes Weight, bool Grouped, int Tiles, int Octets>
cudaError_t launch_small(const GemmArgs& g, cudaStream_t stream) {
  constexpr int64_t kOutputs = Tiles * kTileOutputs;
  constexpr int64_t kShared = sizeof(SmallShared<Tiles, Octets>);
  const int blocks = int((g.outputs + kOutputs - 1) / kOutputs);
  return launch(gemm_small_kernel<Form, Weight, Grouped, Tiles, Octets>, blocks, 1, kSmallThreads,
                kShared, stream, g);
}

// The widest whose blocks occupy half of the multiprocessors, which draw all that DRAM gives.
Width choose_width(const GemmArgs& g, int widest) {
  const int64_t tiles = 2 * g.outputs / kTileOutputs / multiprocessors();
  return tiles >= widest ? Width::wide : tiles >= widest / 2 ? Width::medium : Width::narrow;
}

template <Codes Form, Codes Weight, bool Grouped, int Octets>
cudaError_t launch_tiles(const GemmArgs& g, Width width, cudaStream_t stream) {
  // With groups and 16 tokens twice as many would not fit the registers (sm_80).
  constexpr int kWidest = kLaneWords<Weight> == 2 || (Grouped && Octets == 2) ? 4 : 8;
  switch (width == Width::automatic ? choose_width(g, kWidest) : width) {
    case Width::wide:
      return launch_small<Form, Weight, Grouped, kWidest, Octets>(g, stream);
    case Width::medium:
      return launch_small<Form, Weight, Grouped, kWidest / 2, Octets>(g, stream);
    default:
      return launch_small<Form, Weight, Grouped, kWidest / 4, Octets>(g, stream);
  }
}

template <Codes Form, Codes Weight, bool Grouped>
cudaError_t launch_octets(const GemmArgs& g, Width width, cudaStream_t stream) {
  return g.tokens <= kOctet ? launch_tiles<Form, Weight, Grouped, 1>(g, width, stream)
                            : launch_tiles<Form, Weight, Grouped, 2>(g, width, stream);
}

struct Small {
  template <Codes Form, Codes Weight>
  static cudaError_t launch(const GemmArgs& g, Width width, cudaStream_t stream) {
    if constexpr (Weight == Codes::packed_int4) {
      if (g.group_scale) return launch_octets<Form, Weight, true>(g, width, stream);
    }
    return launch_octets<Form, Weight, false>(g, width, stream);
  }
};

}  // namespace

cudaError_t gemm_small(const GemmArgs& g, cudaStream_t stream, Width width) {
  if (!valid(g) || g.tokens > kSmallGemmTokens) return cudaErrorInvalidValue;
  if (g.tokens == 0) return cudaSuccess;
  return launch_forms<Small>(g, g, width, stream);
}

}  // namespace smoothrot::cuda
