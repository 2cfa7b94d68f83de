// SPDX-License-Identifier: Apache-2.0
// Launches the tiled GEMM; gemm_s8.cu has one weight for all tokens, gemm_experts.cu one for each
// expert.
#pragma once

#include "gemm_s8_kernel.h"

namespace smoothrot::cuda {

// A grid of a block for each of `token_tiles` and each `Columns` outputs.
template <Codes Form, Codes Weight, int Group, int Columns, class Args>
cudaError_t launch_columns(void (*kernel)(Args), const Args& args, int64_t token_tiles,
                           int64_t outputs, cudaStream_t stream) {
  const int64_t column_tiles = (outputs + Columns - 1) / Columns;
  constexpr int64_t kMostGridY = 65535;
  if (column_tiles > kMostGridY) return cudaErrorInvalidValue;
  return launch(kernel, int(token_tiles), int(column_tiles), kTiledThreads,
                int64_t{kStages} * kStageBytes<Form, Weight, Group, Columns>, stream, args);
}

// Launcher::launch<Form, Weight, Group>(args, width, stream) for the group size of `g`, 0 for none.
template <class Launcher>
struct ByGroups {
  template <Codes Form, Codes Weight, class Args>
  static cudaError_t launch(const Args& args, Width width, cudaStream_t stream) {
    if constexpr (Weight == Codes::packed_int4) {
      switch (Launcher::gemm(args).group_size) {
        case 32:
          return Launcher::template launch<Form, Weight, 32>(args, width, stream);
        case 64:
          return Launcher::template launch<Form, Weight, 64>(args, width, stream);
        case 128:
          return Launcher::template launch<Form, Weight, 128>(args, width, stream);
      }
    }
    return Launcher::template launch<Form, Weight, 0>(args, width, stream);
  }
};

constexpr int kNarrowColumns = 64, kWideColumns = 128;

// Asked for, or such that every multiprocessor has a block.
inline bool takes_wide_tiles(Width width, int64_t token_tiles, int64_t outputs) {
  return width == Width::automatic ? token_tiles * (outputs / kWideColumns) >= multiprocessors()
                                   : width == Width::wide;
}

}  // namespace smoothrot::cuda
