// SPDX-License-Identifier: Apache-2.0
// What the hand-written GEMMs share: operands as int8 lanes, and the float epilogue of
// reference.gemm.
#pragma once

#include "device.h"
#include "launch.h"

namespace smoothrot::cuda {

// Each nibble in the high half of an int8 lane is 16 times its value: even and odd inputs of a
// packed word, no shift of the odd ones. Sums then carry 16 for each operand unpacked so, which a
// right shift takes out exactly.
SMOOTHROT_DEVICE uint32_t even_nibbles(uint32_t packed) { return packed << 4 & 0xF0F0F0F0u; }
SMOOTHROT_DEVICE uint32_t odd_nibbles(uint32_t packed) { return packed & 0xF0F0F0F0u; }
constexpr int kNibbleShift = 4;

// Both operands as they are, for the int4 MMA of sm_80 to sm_89.
template <Codes Form, Codes Weight>
constexpr bool kUsesInt4 =
    kNativeInt4 && Form == Codes::packed_int4 && Weight == Codes::packed_int4;

// What sums of int8 products carry. A weight with groups is unpacked to exact values.
template <Codes Form, Codes Weight, bool Grouped>
constexpr int kByteShift =
    kNibbleShift * ((Form == Codes::packed_int4) + (Weight == Codes::packed_int4 && !Grouped));

// What multiplies four codes at once by the scale of their group: with bytes b of code + 8, b *
// scale + offset is code * scale + 128, from 8 to 233, so no byte carries into the next.
struct GroupFactor {
  uint32_t scale, offset;
};

constexpr int kWordGroups = int(kGroupsOfAWord);

// Of a word of group scales.
SMOOTHROT_DEVICE int32_t group_scale_of(uint32_t word, int group) {
  return int32_t(word >> (4 * group) & 15);
}

SMOOTHROT_DEVICE GroupFactor group_factor(uint32_t word, int group) {
  const auto scale = uint32_t(group_scale_of(word, group));
  return {scale, 0x80808080u - scale * 0x08080808u};
}

// The low nibbles of each byte times their group's scale, as int8: one LOP3, one IMAD, one LOP3.
SMOOTHROT_DEVICE uint32_t scaled_nibbles(uint32_t packed, const GroupFactor& factor) {
  const uint32_t raised = and_xor(packed, 0x0F0F0F0Fu, 0x08080808u);
  return (raised * factor.scale + factor.offset) ^ 0x80808080u;
}

// The inputs of a packed word, even and odd.
SMOOTHROT_DEVICE void scaled_inputs(uint32_t packed, const GroupFactor& factor, uint32_t& even,
                                    uint32_t& odd) {
  even = scaled_nibbles(packed, factor);
  odd = scaled_nibbles(packed >> 4, factor);
}

// Eight inputs of one operand without groups, a word or two, as the two words of int8 lanes that an
// MMA takes. Against a packed operand int8 codes go by even and odd inputs too.
template <Codes Form, Codes Other>
SMOOTHROT_DEVICE void eight_inputs(const uint32_t* words, uint32_t& first, uint32_t& second) {
  if constexpr (Form == Codes::packed_int4) {
    first = even_nibbles(words[0]);
    second = odd_nibbles(words[0]);
  } else if constexpr (Other == Codes::packed_int4) {
    first = pick_bytes(words[0], words[1], 0x6420);
    second = pick_bytes(words[0], words[1], 0x7531);
  } else {
    first = words[0];
    second = words[1];
  }
}

SMOOTHROT_DEVICE float load_float(const void* values, Float dtype, int64_t i) {
  if (dtype == Float::f32) return load_global(static_cast<const float*>(values) + i);
  const uint16_t half = load_global(static_cast<const uint16_t*>(values) + i);
  return dtype == Float::bf16 ? bf16_float(half) : f16_float(half);
}

SMOOTHROT_DEVICE uint32_t half_of(Float dtype, float value) {
  return dtype == Float::bf16 ? float_bf16(value) : float_f16(value);
}

SMOOTHROT_DEVICE void store_float(void* values, Float dtype, int64_t i, float value) {
  if (dtype == Float::f32) {
    store_global(static_cast<float*>(values) + i, value);
  } else {
    store_global(static_cast<uint16_t*>(values) + i, uint16_t(half_of(dtype, value)));
  }
}

// Two neighbors, `i` even.
SMOOTHROT_DEVICE void store_pair(void* values, Float dtype, int64_t i, float first, float second) {
  if (dtype == Float::f32) {
    store_global(reinterpret_cast<Words2*>(static_cast<float*>(values) + i),
                 Words2{{float_bits(first), float_bits(second)}});
  } else {
    store_global(reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(values) + i),
                 half_of(dtype, first) | half_of(dtype, second) << 16);
  }
}

// Launcher::launch<Form, Weight>(args, width, stream) for the forms of `g`.
template <class Launcher, class Args>
cudaError_t launch_forms(const GemmArgs& g, const Args& args, Width width, cudaStream_t stream) {
  constexpr Codes kPacked = Codes::packed_int4, kBytes = Codes::int8;
  if (g.weight_form == kPacked) {
    return g.form == kPacked ? Launcher::template launch<kPacked, kPacked>(args, width, stream)
                             : Launcher::template launch<kBytes, kPacked>(args, width, stream);
  }
  return g.form == kPacked ? Launcher::template launch<kPacked, kBytes>(args, width, stream)
                           : Launcher::template launch<kBytes, kBytes>(args, width, stream);
}

inline bool valid_groups(const GemmArgs& g) {
  if (!g.group_scale) return g.group_size == kPerChannel;
  return g.weight_form == Codes::packed_int4 && is_group_size(g.group_size) &&
         g.inputs % g.group_size == 0;
}

inline bool valid(const GemmArgs& g) {
  return g.tokens >= 0 && g.tokens <= INT32_MAX && g.outputs > 0 && g.outputs <= INT32_MAX &&
         g.inputs > 0 && g.inputs <= kMostGemmInputs && g.inputs % kInputMultiple == 0 &&
         valid_groups(g);
}

}  // namespace smoothrot::cuda
