// SPDX-License-Identifier: Apache-2.0
#include "cutlass_sm80.cuh"

namespace smoothrot::cuda {

const char* cutlass_sm80_64x128(const CutlassArgs& args) {
  return sm80::launch<sm80::Shape<64, 128, 256>, sm80::Shape<64, 64, 128>, 3>(args);
}

}  // namespace smoothrot::cuda
