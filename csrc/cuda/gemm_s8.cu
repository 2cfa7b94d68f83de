// SPDX-License-Identifier: Apache-2.0
// Launcher of the tiled GEMM.
#include "gemm_s8_kernel.h"

namespace smoothrot::cuda {
namespace {

template <Codes Form, Codes Weight, bool Grouped, int Columns>
cudaError_t launch_columns(const GemmArgs& g, int64_t token_tiles, cudaStream_t stream) {
  const int64_t column_tiles = (g.outputs + Columns - 1) / Columns;
  constexpr int64_t kMostGridY = 65535;
  if (column_tiles > kMostGridY) return cudaErrorInvalidValue;
  return launch(gemm_s8_kernel<Form, Weight, Grouped, Columns>, int(token_tiles), int(column_tiles), kTiledThreads,
                int64_t{kStages} * kStageBytes<Form, Weight, Columns>, stream, g);
}

// Narrow tiles where wide ones would leave multiprocessors without work.
template <Codes Form, Codes Weight, bool Grouped>
cudaError_t launch_tiled(const GemmArgs& g, cudaStream_t stream) {
  constexpr int kNarrow = 64, kWide = 128;
  const int64_t token_tiles = (g.tokens + kTiledTokens - 1) / kTiledTokens;
  if (token_tiles * (g.outputs / kWide) >= multiprocessors()) {
    return launch_columns<Form, Weight, Grouped, kWide>(g, token_tiles, stream);
  }
  return launch_columns<Form, Weight, Grouped, kNarrow>(g, token_tiles, stream);
}

struct Tiled {
  template <Codes Form, Codes Weight>
  static cudaError_t launch(const GemmArgs& g, cudaStream_t stream) {
    return g.group_size == g.inputs ? launch_tiled<Form, Weight, false>(g, stream)
                                    : launch_tiled<Form, Weight, true>(g, stream);
  }
};

}  // namespace

cudaError_t gemm_s8(const GemmArgs& g, cudaStream_t stream) {
  if (!valid(g)) return cudaErrorInvalidValue;
  if (g.tokens == 0) return cudaSuccess;
  return launch_forms<Tiled>(g, stream);
}

}  // namespace smoothrot::cuda
