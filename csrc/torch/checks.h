// SPDX-License-Identifier: Apache-2.0
// Argument checks of the ops: each refusal names the op, the argument, what was expected and what was got.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

#include "../cpu/kernels.h"

namespace smoothrot {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kAnySize = -1;

inline const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    default:
      return "another dtype";
  }
}

template <typename... Parts>
[[noreturn]] void refuse(const char* op, const char* argument, const Parts&... parts) {
  std::ostringstream message;
  message << "smoothrot::" << op << ": " << argument << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline std::string describe(const Tensor& t) {
  std::ostringstream text;
  text << dtype_name(t.scalar_type()) << " (";
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  text << (t.is_contiguous() ? ")" : "), not contiguous");
  if (!t.is_cpu()) text << ", not on the CPU";
  return text.str();
}

inline std::string describe(ScalarType dtype, std::initializer_list<int64_t> sizes) {
  std::ostringstream text;
  text << dtype_name(dtype) << " (";
  const char* comma = "";
  for (const int64_t size : sizes) {
    text << comma;
    size == kAnySize ? text << "any" : text << size;
    comma = ", ";
  }
  text << ")";
  return text.str();
}

inline void check_tensor(const char* op, const char* argument, const Tensor& t, ScalarType dtype,
                         std::initializer_list<int64_t> sizes) {
  bool matches = t.is_cpu() && t.scalar_type() == dtype && t.dim() == int64_t(sizes.size()) && t.is_contiguous();
  int64_t i = 0;
  for (const int64_t size : sizes) matches = matches && (size == kAnySize || t.size(i) == size), ++i;
  if (!matches) refuse(op, argument, "expected contiguous ", describe(dtype, sizes), ", got ", describe(t), ".");
}

inline Float float_type(const char* op, const char* argument, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return Float::f32;
    case ScalarType::BFloat16:
      return Float::bf16;
    case ScalarType::Half:
      return Float::f16;
    default:
      refuse(op, argument, "expected float32, bfloat16 or float16, got ", dtype_name(dtype), ".");
  }
}

inline void check_bits(const char* op, const char* argument, int64_t bits) {
  if (bits != 4 && bits != 8) refuse(op, argument, "expected 4 or 8, got ", bits, ".");
}

// Activations (..., K): contiguous, a float type, K even and positive.
inline Float check_activations(const char* op, const Tensor& x, int64_t least_dims, int64_t most_dims) {
  const Float dtype = float_type(op, "x", x.scalar_type());
  if (!x.is_cpu() || !x.is_contiguous() || x.dim() < least_dims || x.dim() > most_dims) {
    refuse(op, "x", "expected a contiguous ", least_dims == most_dims ? "(tokens, inputs)" : "(..., inputs)",
           " CPU tensor, got ", describe(x), ".");
  }
  const int64_t inputs = x.size(x.dim() - 1);
  if (inputs < 2 || inputs % 2) refuse(op, "x", "expected an even number of inputs, got ", inputs, ".");
  return dtype;
}

inline void check_clip(const char* op, double clip) {
  if (!(clip > 0.0 && clip <= 1.0)) refuse(op, "clip", "expected 0 < clip <= 1, got ", clip, ".");
}

// Groups of `scale` (N, G) over `inputs`, and that no int32 accumulator can overflow.
inline WeightLayout check_weight(const char* op, const Tensor& scale, int64_t inputs, int64_t weight_bits,
                                 int64_t act_bits) {
  check_tensor(op, "weight_scale", scale, ScalarType::Float, {kAnySize, kAnySize});
  const int64_t columns = scale.size(0), groups = scale.size(1);
  if (columns < 1 || groups < 1 || inputs % groups) {
    refuse(op, "weight_scale", "expected (outputs, groups) with groups dividing the ", inputs, " inputs, got ",
           describe(scale), ".");
  }
  const int64_t largest = inputs / groups << (weight_bits - 1 + act_bits - 1);
  if (largest > INT32_MAX) {
    refuse(op, "weight_scale", "expected groups short enough for exact int32 sums, got ", inputs / groups,
           " inputs a group at ", weight_bits, " x ", act_bits, " bits. Use more groups.");
  }
  return weight_layout(columns, inputs, groups, weight_bits);
}

inline void check_packed(const char* op, const Tensor& packed, const WeightLayout& w) {
  check_tensor(op, "packed", packed, ScalarType::Byte, {w.panels, w.panel_bytes});
}

}  // namespace smoothrot
