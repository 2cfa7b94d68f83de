// SPDX-License-Identifier: Apache-2.0
// Argument checks of the CPU ops.
#pragma once

#include "../cpu/kernels.h"
#include "arguments.h"

namespace smoothrot {

inline std::string describe(const Tensor& t) { return describe(t, cpu_place()); }

inline void check_tensor(const char* op, const char* argument, const Tensor& t, ScalarType dtype,
                         std::initializer_list<int64_t> sizes) {
  check_tensor(op, argument, t, dtype, sizes, cpu_place());
}

inline Float check_activations(const char* op, const char* argument, const Tensor& x,
                               int64_t least_dims, int64_t most_dims) {
  return check_activations(op, argument, x, least_dims, most_dims, cpu_place());
}

inline Float check_gate_up(const char* op, const Tensor& gate_up, int64_t least_dims,
                           int64_t most_dims) {
  const Float dtype = check_activations(op, "gate_up", gate_up, least_dims, most_dims);
  if (gate_up.size(gate_up.dim() - 1) % 4)
    refuse(op, "gate_up", "expected 2 x an even number of columns, got ", describe(gate_up), ".");
  return dtype;
}

inline WeightLayout check_weight(const char* op, const Tensor& scale, int64_t inputs,
                                 int64_t group_size, int64_t weight_bits, int64_t act_bits) {
  const int64_t columns = check_weight_scale(op, scale, cpu_place());
  const int64_t groups = check_groups(op, group_size, inputs, weight_bits, act_bits);
  return weight_layout(columns, inputs, groups, weight_bits);
}

struct CodesShape {
  int64_t rows;
  int64_t inputs;
};

// Stored codes of activations and the scale of each row.
inline CodesShape check_codes(const char* op, const Tensor& codes, const Tensor& scale,
                              int64_t act_bits) {
  check_tensor(op, "codes", codes, act_bits == 4 ? ScalarType::Byte : ScalarType::Char,
               {kAnySize, kAnySize});
  const CodesShape shape{codes.size(0), codes.size(1) * (act_bits == 4 ? 2 : 1)};
  if (shape.inputs < 2 || shape.inputs % 2)
    refuse(op, "codes", "expected an even number of inputs, got ", describe(codes), ".");
  check_tensor(op, "scale", scale, ScalarType::Float, {shape.rows});
  return shape;
}

inline void check_packed(const char* op, const Tensor& packed, const WeightLayout& w) {
  check_tensor(op, "packed", packed, ScalarType::Byte, {w.panels, w.panel_bytes});
}

}  // namespace smoothrot
