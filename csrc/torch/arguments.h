// SPDX-License-Identifier: Apache-2.0
// Argument checks that the CPU and the CUDA ops share: each refusal names the op, the argument,
// what was expected and what was got.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/shim_utils.h>

#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "../common/types.h"

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

// Where all tensors of a call must lie.
struct Place {
  int32_t type;
  int32_t index;  // -1: the device type has one member

  bool holds(const Tensor& t) const {
    int32_t actual = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &actual));
    return actual == type && (index < 0 || t.get_device_index() == index);
  }
  std::string name() const { return index < 0 ? "the CPU" : "cuda:" + std::to_string(index); }
};

inline Place cpu_place() { return {aoti_torch_device_type_cpu(), -1}; }

inline std::string describe(const Tensor& t, const Place& place) {
  std::ostringstream text;
  text << dtype_name(t.scalar_type()) << " (";
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  text << (t.is_contiguous() ? ")" : "), not contiguous");
  if (!place.holds(t)) text << ", not on " << place.name();
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
                         std::initializer_list<int64_t> sizes, const Place& place) {
  bool matches = place.holds(t) && t.scalar_type() == dtype && t.dim() == int64_t(sizes.size()) &&
                 t.is_contiguous();
  int64_t i = 0;
  for (const int64_t size : sizes)
    matches = matches && (size == kAnySize || t.size(i) == size), ++i;
  if (!matches)
    refuse(op, argument, "expected contiguous ", describe(dtype, sizes), ", got ",
           describe(t, place), ".");
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

inline void check_clip(const char* op, double clip) {
  if (!(clip > 0.0 && clip <= 1.0)) refuse(op, "clip", "expected 0 < clip <= 1, got ", clip, ".");
}

// The scale of a row is its largest magnitude times this.
inline float scale_factor(double clip, int64_t bits) {
  return float(clip / double((1 << (bits - 1)) - 1));
}

inline void check_block(const char* op, int64_t block, int64_t inputs) {
  if (block < 0 || inputs % block)
    refuse(op, "block", "expected a divisor of ", inputs, ", got ", block, ".");
}

// Activations (..., K): contiguous, a float type, K even and positive.
inline Float check_activations(const char* op, const char* argument, const Tensor& x,
                               int64_t least_dims, int64_t most_dims, const Place& place) {
  const Float dtype = float_type(op, argument, x.scalar_type());
  if (!place.holds(x) || !x.is_contiguous() || x.dim() < least_dims || x.dim() > most_dims) {
    refuse(op, argument, "expected a contiguous ",
           least_dims == most_dims ? "(tokens, inputs)" : "(..., inputs)", " tensor on ",
           place.name(), ", got ", describe(x, place), ".");
  }
  const int64_t inputs = x.size(x.dim() - 1);
  if (inputs < 2 || inputs % 2)
    refuse(op, argument, "expected an even number of inputs, got ", inputs, ".");
  return dtype;
}

// The scales (N, 1) of N > 0 output channels; returns N.
inline int64_t check_weight_scale(const char* op, const Tensor& scale, const Place& place) {
  check_tensor(op, "weight_scale", scale, ScalarType::Float, {kAnySize, 1}, place);
  if (scale.size(0) < 1)
    refuse(op, "weight_scale", "expected at least one output, got ", describe(scale, place), ".");
  return scale.size(0);
}

// Groups of `group_size` among `inputs`, 0 for -1; and that no int32 sum of all inputs can
// overflow.
inline int64_t check_groups(const char* op, int64_t group_size, int64_t inputs, int64_t weight_bits,
                            int64_t act_bits) {
  const bool grouped = group_size != -1;
  if (grouped && (weight_bits != 4 || (group_size != 32 && group_size != 64 && group_size != 128) ||
                  inputs % group_size)) {
    refuse(op, "group_size", "expected -1 or, of 4-bit weights, 32, 64 or 128 dividing the ",
           inputs, " inputs, got ", group_size, " of ", weight_bits, "-bit weights.");
  }
  const int64_t largest = (grouped ? kMostGroupScale : 1) * inputs
                          << (weight_bits - 1 + act_bits - 1);
  if (largest > INT32_MAX) {
    refuse(op, "weight", "expected few enough inputs for exact int32 sums, got ", inputs, " at ",
           weight_bits, " x ", act_bits, " bits.");
  }
  return grouped ? inputs / group_size : 0;
}

// Group scales (N, G), or none: inputs of a group, -1 without.
inline int64_t group_size_of(const char* op, const std::optional<Tensor>& group_scale,
                             int64_t outputs, int64_t inputs, const Place& place) {
  if (!group_scale) return -1;
  check_tensor(op, "group_scale", *group_scale, ScalarType::Byte, {outputs, kAnySize}, place);
  const int64_t groups = group_scale->size(1);
  if (groups < 1 || inputs % groups) {
    refuse(op, "group_scale", "expected (", outputs, ", groups) with groups dividing the ", inputs,
           " inputs, got ", describe(*group_scale, place), ".");
  }
  return inputs / groups;
}

}  // namespace smoothrot
