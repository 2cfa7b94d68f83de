// SPDX-License-Identifier: Apache-2.0
// Prints how many fragment elements of csrc/emulator/mma_layout.h lie elsewhere than CuTe says.
#include <cstdio>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/tensor.hpp>

#include "../../csrc/emulator/mma_layout.h"

namespace {

using namespace smoothrot::emulator;

// CuTe numbers the elements of an (m, k), (n, k) or (m, n) tile with the first index running
// fastest.
bool same(int offset, int rows, Element e) {
  return offset % rows == e.row && offset / rows == e.column;
}

// `B` gives the layout of that operand.
template <class Operation, class B = Operation>
int mismatches(int per_word, int halves) {
  using Traits = cute::MMA_Traits<Operation>;
  int wrong = 0;
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 2 * halves * per_word; ++i) {
      wrong += !same(typename Traits::ALayout{}(lane, i), 16, element_a(lane, i, per_word));
    }
    for (int i = 0; i < halves * per_word; ++i) {
      wrong +=
          !same(typename cute::MMA_Traits<B>::BLayout{}(lane, i), 8, element_b(lane, i, per_word));
    }
    for (int i = 0; i < 4; ++i)
      wrong += !same(typename Traits::CLayout{}(lane, i), 16, element_c(lane, i));
  }
  return wrong;
}

}  // namespace

int main() {
  using namespace cute;
  const int int4 = mismatches<SM80_16x8x64_S32S4S4S32_TN>(8, 2);
  // CUTLASS 4.2 has lane t of four begin at k = 4t in B of m16n8k32, where eight values a lane
  // cannot cover 32. The PTX ISA says 8t, as in m8n8k32.
  const int shallow = mismatches<SM80_16x8x32_S32S4S4S32_TN, SM80_8x8x32_S32S4S4S32_TN>(8, 1);
  const int int8 = mismatches<SM80_16x8x32_S32S8S8S32_TN>(4, 2);
  std::printf("int4 %d %d int8 %d\n", int4, shallow, int8);
}
