// SPDX-License-Identifier: Apache-2.0
#include "cutlass_sm90.cuh"

namespace smoothrot::cuda {

const char* cutlass_sm90_128x64(const CutlassArgs& args) {
  return sm90::launch<cutlass::int4b_t, 64>(args);
}

}  // namespace smoothrot::cuda
