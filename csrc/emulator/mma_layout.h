// SPDX-License-Identifier: Apache-2.0
// Which matrix element each lane of a warp holds in mma.sync.m16n8k64 (int4) and m16n8k32 (int8):
// PTX ISA, "Matrix fragments for mma". tests/emulated compares it with CuTe's MMA_Traits.
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
