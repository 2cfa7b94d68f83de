// SPDX-License-Identifier: Apache-2.0
#include "cutlass_sm80.cuh"

namespace smoothrot::cuda {

const char* cutlass_sm80_32x64(const CutlassArgs& args) {
  return sm80::launch<sm80::Shape<32, 64, 256>, sm80::Shape<32, 64, 128>, 5>(args);
}

}  // namespace smoothrot::cuda
