// SPDX-License-Identifier: Apache-2.0
// Launches the tiled GEMM; gemm_s8.cu has one weight for all tokens, gemm_experts.cu one for each expert.
#pragma once

#include "gemm_s8_kernel.h"

namespace smoothrot::cuda {

template <Codes Form, Codes Weight, bool Grouped, bool Routed, int Columns>
constexpr auto tiled_kernel() {
  if constexpr (Routed) {
    return gemm_experts_kernel<Form, Weight, Grouped, Columns>;
  } else {
    return gemm_s8_kernel<Form, Weight, Grouped, Columns>;
  }
}

template <Codes Form, Codes Weight, bool Grouped, bool Routed, int Columns>
cudaError_t launch_columns(const GemmArgs& g, int64_t token_tiles, cudaStream_t stream) {
  const int64_t column_tiles = (g.outputs + Columns - 1) / Columns;
  constexpr int64_t kMostGridY = 65535;
  if (column_tiles > kMostGridY) return cudaErrorInvalidValue;
  return launch(tiled_kernel<Form, Weight, Grouped, Routed, Columns>(), int(token_tiles), int(column_tiles),
                kTiledThreads, int64_t{kStages} * kStageBytes<Form, Weight, Columns>, stream, g);
}

// Narrow tiles where wide ones would leave multiprocessors without work, or take more registers than there are.
template <Codes Form, Codes Weight, bool Grouped, bool Routed>
cudaError_t launch_tiled(const GemmArgs& g, cudaStream_t stream) {
  constexpr int kNarrow = 64, kWide = 128;
  const int64_t token_tiles = Routed ? g.tile_count : (g.tokens + kTiledTokens - 1) / kTiledTokens;
  if constexpr (!(Grouped && Routed)) {
    if (token_tiles * (g.outputs / kWide) >= multiprocessors()) {
      return launch_columns<Form, Weight, Grouped, Routed, kWide>(g, token_tiles, stream);
    }
  }
  return launch_columns<Form, Weight, Grouped, Routed, kNarrow>(g, token_tiles, stream);
}

template <bool Routed>
struct Tiled {
  template <Codes Form, Codes Weight>
  static cudaError_t launch(const GemmArgs& g, cudaStream_t stream) {
    return g.group_size == g.inputs ? launch_tiled<Form, Weight, false, Routed>(g, stream)
                                    : launch_tiled<Form, Weight, true, Routed>(g, stream);
  }
};

}  // namespace smoothrot::cuda
