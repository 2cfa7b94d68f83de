// SPDX-License-Identifier: Apache-2.0
// Launcher of the small-M GEMM.
#include "gemm_small_kernel.h"

namespace smoothrot::cuda {
namespace {

template <Codes Form, int Tiles, int Octets>
cudaError_t launch_small(const GemmArgs& g, cudaStream_t stream) {
  constexpr int64_t kOutputs = Tiles * kTileOutputs;
  constexpr int64_t kShared = sizeof(SmallShared<Tiles, Octets>);
  const int blocks = int((g.outputs + kOutputs - 1) / kOutputs);
  return launch(gemm_small_kernel<Form, Tiles, Octets>, blocks, 1, kSmallThreads, kShared, stream, g);
}

// Wide blocks read the activations less often; narrow ones keep multiprocessors busy, half of which draw all that DRAM
// gives.
template <Codes Form, int Octets>
cudaError_t launch_tiles(const GemmArgs& g, cudaStream_t stream) {
  const int64_t enough = 2 * g.outputs / kTileOutputs / multiprocessors();
  if (enough >= 8) return launch_small<Form, 8, Octets>(g, stream);
  if (enough >= 4) return launch_small<Form, 4, Octets>(g, stream);
  return launch_small<Form, 2, Octets>(g, stream);
}

template <Codes Form>
cudaError_t launch_octets(const GemmArgs& g, cudaStream_t stream) {
  return g.tokens <= kOctet ? launch_tiles<Form, 1>(g, stream) : launch_tiles<Form, 2>(g, stream);
}

}  // namespace

cudaError_t gemm_small(const GemmArgs& g, cudaStream_t stream) {
  if (!valid(g) || g.tokens > kSmallGemmTokens || g.group_size != g.inputs) return cudaErrorInvalidValue;
  if (g.tokens == 0) return cudaSuccess;
  if (g.form == Codes::packed_int4) return launch_octets<Codes::packed_int4>(g, stream);
  return launch_octets<Codes::int8>(g, stream);
}

}  // namespace smoothrot::cuda
