// SPDX-License-Identifier: Apache-2.0
#include <cstring>

#include "kernels.h"

namespace smoothrot {
namespace {

// The four nibbles of a 16-bit word, one per byte.
uint32_t spread(uint32_t word) {
  word = (word | word << 8) & 0x00FF00FFu;
  return (word | word << 4) & 0x0F0F0F0Fu;
}

// Four consecutive 4-bit codes of one column from input `k`, offset to unsigned; those past `end` are zero codes.
uint32_t four_nibbles(const uint8_t* row, int64_t k, int64_t end) {
  uint32_t bytes = 0;
  for (int64_t i = k; i < k + kStepInputs && i < end; ++i) {
    bytes |= uint32_t(row[i / 2] >> (i % 2 * 4) & 0xF) << (8 * (i - k));
  }
  return bytes ^ 0x08080808u;
}

uint32_t load_word(const uint8_t* row, int64_t k) {
  const uint8_t* p = row + k / 2;
  return uint32_t(p[0]) | uint32_t(p[1]) << 8;
}

// Columns c and 16 + c of a panel share their bytes; `high` may be null past the last column.
void pack_nibbles(const uint8_t* low, const uint8_t* high, const WeightLayout& w, int64_t group, uint8_t* out) {
  const int64_t begin = group * w.group_size, end = begin + w.group_size;
  for (int64_t k = begin; k < end; k += kStepInputs, out += w.step_bytes) {
    uint32_t word;
    if (k + kStepInputs <= end && k % 2 == 0) {
      word = spread(load_word(low, k)) | (high ? spread(load_word(high, k)) << 4 : 0);
      word ^= 0x88888888u;
    } else {
      word = four_nibbles(low, k, end) | (high ? four_nibbles(high, k, end) << 4 : 0);
    }
    std::memcpy(out, &word, sizeof(word));
  }
}

void pack_bytes(const uint8_t* row, const WeightLayout& w, int64_t group, uint8_t* out) {
  const int64_t begin = group * w.group_size, end = begin + w.group_size;
  for (int64_t k = begin; k < end; k += kStepInputs, out += w.step_bytes) {
    for (int64_t j = 0; j < kStepInputs; ++j) out[j] = uint8_t((k + j < end ? row[k + j] : 0) ^ 0x80);
  }
}

}  // namespace

void prepack(const void* codes, const float* scale, int bits, const WeightLayout& w, uint8_t* packed, int64_t begin,
             int64_t end) {
  const auto* stored = static_cast<const uint8_t*>(codes);
  const int64_t row_bytes = w.inputs * bits / 8;
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t first = panel * kPanelColumns;
    uint8_t* out = packed + panel * w.panel_bytes;
    std::memset(out, 0, size_t(w.panel_bytes));
    auto* scales = reinterpret_cast<float*>(out);
    uint8_t* panel_codes = out + w.groups * kPanelColumns * int64_t{sizeof(float)};
    for (int c = 0; c < kPanelColumns && first + c < w.columns; ++c) {
      for (int64_t g = 0; g < w.groups; ++g) scales[g * kPanelColumns + c] = scale[(first + c) * w.groups + g];
    }
    for (int64_t g = 0; g < w.groups; ++g) {
      uint8_t* group = panel_codes + g * w.group_steps * w.step_bytes;
      for (int c = 0; c < kPanelColumns && first + c < w.columns; ++c) {
        const uint8_t* row = stored + (first + c) * row_bytes;
        if (bits == 8) {
          pack_bytes(row, w, g, group + 4 * c);
        } else if (c < kHalfColumns) {
          const bool has_high = first + c + kHalfColumns < w.columns;
          pack_nibbles(row, has_high ? row + kHalfColumns * row_bytes : nullptr, w, g, group + 4 * c);
        }
      }
    }
  }
}

}  // namespace smoothrot
