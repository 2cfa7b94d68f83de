// SPDX-License-Identifier: Apache-2.0
// Which matrix element each lane of a warp holds in mma.sync.m16n8k64 (int4) and m16n8k32 (int8):
// PTX ISA, "Matrix fragments for mma". tests/emulated compares it with CuTe's MMA_Traits. The
// m16n8k32 of int4 is the first half of m16n8k64, without a2, a3 and b1.
//
// int8, where a register of A or B holds four k (int4: eight, so all k below count double) and
// one of C holds a sum; L7 is lane 7:
//
//   A  k  0-3  4-7  8-11 12-15  16-19 20-23 24-27 28-31    B  n  0    1    2   ...   7
//   m  0 | L0   L1   L2   L3   | L0    L1    L2    L3  |   k  0-3 | L0   L4   L8  ...  L28 |
//   m  1 | L4   L5   L6   L7   | L4    L5    L6    L7  |      4-7 | L1   L5   L9  ...  L29 | b0
//    ... |         a0          |          a2           |     8-11 | L2   L6   L10 ...  L30 |
//   m  7 | L28  L29  L30  L31  | L28   L29   L30   L31 |    12-15 | L3   L7   L11 ...  L31 |
//        +---------------------+-----------------------+          +------------------------+
//   m  8 | L0   L1   L2   L3   | L0    L1    L2    L3  |    16-19 | L0   L4   L8  ...  L28 |
//    ... |         a1          |          a3           |      ... |                        | b1
//   m 15 | L28  L29  L30  L31  | L28   L29   L30   L31 |    28-31 | L3   L7   L11 ...  L31 |
//
//   C  n  0   1    2   3    4   5    6   7
//   m  0 |  L0   |  L1   |  L2   |  L3   |  c0 the even n, c1 the odd one
//    ... |       |       |       |       |
//   m  7 |  L28  |  L29  |  L30  |  L31  |
//        +-------+-------+-------+-------+
//   m  8 |  L0   |  L1   |  L2   |  L3   |  c2 the even n, c3 the odd one
//    ... |       |       |       |       |
//   m 15 |  L28  |  L29  |  L30  |  L31  |
#pragma once

namespace smoothrot::emulator {

struct Element {
  int row;     // m of A and the accumulator, n of B
  int column;  // k of A and B, n of the accumulator
};

// Element i of a lane's registers, counted over registers and within each from the low bits up;
// `per_word` values share a 32-bit register: 8 for int4, 4 for int8.
constexpr Element element_a(int lane, int i, int per_word) {
  const int word = i / per_word;
  return {lane / 4 + 8 * (word % 2),
          lane % 4 * per_word + i % per_word + 4 * per_word * (word / 2)};
}

constexpr Element element_b(int lane, int i, int per_word) {
  return {lane / 4, lane % 4 * per_word + i % per_word + 4 * per_word * (i / per_word)};
}

constexpr Element element_c(int lane, int i) {
  return {lane / 4 + 8 * (i / 2), lane % 4 * 2 + i % 2};
}

}  // namespace smoothrot::emulator
