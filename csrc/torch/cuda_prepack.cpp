// SPDX-License-Identifier: Apache-2.0
// The op that packs a weight at load.
#include <torch/csrc/stable/ops.h>

#include "cuda_checks.h"
#include "cuda_ops.h"

namespace smoothrot::cuda::ops {
namespace {

// Codes and group scales of `experts` weights, which are one tensor each, in one.
Tensor prepack_grouped(const char* op, const Device& device, const Tensor& weight,
                       const Tensor& group_scale, bool stacked, int64_t group_size) {
  PrepackArgs a{};
  a.weight = weight.const_data_ptr();
  a.group_scale = static_cast<const uint8_t*>(group_scale.const_data_ptr());
  a.group_size = group_size;
  a.experts = stacked ? weight.size(0) : 1;
  a.outputs = weight.size(weight.dim() - 2);
  a.inputs = 2 * weight.size(weight.dim() - 1);
  const int64_t bytes = grouped_bytes(a.outputs, a.inputs, group_size);
  Tensor packed = stacked ? torch::stable::new_empty(weight, {a.experts, bytes}, ScalarType::Byte)
                          : torch::stable::new_empty(weight, {bytes}, ScalarType::Byte);
  a.packed = packed.mutable_data_ptr();
  check_launched(op, prepack_groups(a, device.stream));
  return packed;
}

}  // namespace

Tensor prepack_weight(const Tensor& weight, const Tensor& weight_scale,
                      std::optional<Tensor> group_scale, int64_t bits) {
  constexpr const char* op = "prepack_weight";
  check_bits(op, "bits", bits);
  const Device device(op, "weight", weight);
  const bool stacked = weight.dim() == 3 && weight.size(0) > 0;
  if (stacked) {
    const int64_t experts = weight.size(0);
    check_tensor(op, "weight", weight, stored_dtype(bits), {kAnySize, kAnySize, kAnySize},
                 device.place);
    check_tensor(op, "weight_scale", weight_scale, ScalarType::Float, {experts, kAnySize, 1},
                 device.place);
    if (group_scale)
      check_tensor(op, "group_scale", *group_scale, ScalarType::Byte, {experts, kAnySize, kAnySize},
                   device.place);
  }
  // All experts have the shapes of the first.
  const auto first = [&](const Tensor& t) { return stacked ? torch::stable::select(t, 0, 0) : t; };
  const Tensor own = first(weight);
  const int64_t outputs = check_weight_scale(op, first(weight_scale), device.place);
  check_tensor(op, "weight", own, stored_dtype(bits), {outputs, kAnySize}, device.place);
  check_aligned(op, "weight", own);
  const int64_t inputs = own.size(1) * (bits == 4 ? 2 : 1);
  check_inputs(op, "weight", inputs, kMostGemmInputs);
  std::optional<Tensor> own_groups;
  if (group_scale) own_groups = first(*group_scale);
  const int64_t group_size = group_size_of(op, own_groups, outputs, inputs, device.place);
  if (check_groups(op, group_size, inputs, bits, 4))
    return prepack_grouped(op, device, weight, *group_scale, stacked, group_size);
  // The kernels read the checkpoint's layout; a copy, because an op's result must not alias its
  // argument.
  Tensor packed = torch::stable::empty_like(weight);
  torch::stable::copy_(packed, weight);
  return packed;
}

}  // namespace smoothrot::cuda::ops
