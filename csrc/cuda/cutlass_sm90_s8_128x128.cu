// SPDX-License-Identifier: Apache-2.0
#include "cutlass_sm90.cuh"

namespace smoothrot::cuda {

const char* cutlass_sm90_s8_128x128(const CutlassArgs& args) {
  return sm90::launch<int8_t, 128>(args);
}

}  // namespace smoothrot::cuda
