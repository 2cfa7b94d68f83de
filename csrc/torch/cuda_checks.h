// SPDX-License-Identifier: Apache-2.0
// What the CUDA ops ask of every tensor, and how codes of so many bits are stored.
#pragma once

#include <string>

#include "cuda_device.h"

namespace smoothrot::cuda {

constexpr uintptr_t kAlignment = 16;

inline void check_aligned(const char* op, const char* argument, const Tensor& t) {
  const auto address = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  if (address % kAlignment) {
    refuse(op, argument, "expected data at a multiple of ", kAlignment, " bytes, got an address ",
           address % kAlignment, " bytes past one. Pass a copy of the slice.");
  }
}

inline void check_inputs(const char* op, const char* argument, int64_t inputs, int64_t most) {
  if (inputs < kInputMultiple || inputs % kInputMultiple || inputs > most) {
    refuse(op, argument, "expected inputs in multiples of ", kInputMultiple, ", at most ", most,
           ", got ", inputs, ".");
  }
}

inline void check_launched(const char* op, const char* problem) {
  if (problem)
    throw std::runtime_error(std::string("smoothrot::") + op + ": CUDA kernel: " + problem);
}

inline void check_launched(const char* op, cudaError_t error) {
  check_launched(op, error == cudaSuccess ? nullptr : error_text(error));
}

inline Codes stored_form(int64_t bits) { return bits == 4 ? Codes::packed_int4 : Codes::int8; }
inline ScalarType stored_dtype(int64_t bits) {
  return bits == 4 ? ScalarType::Byte : ScalarType::Char;
}
inline int64_t stored_width(int64_t inputs, int64_t bits) {
  return bits == 4 ? inputs / 2 : inputs;
}

}  // namespace smoothrot::cuda
