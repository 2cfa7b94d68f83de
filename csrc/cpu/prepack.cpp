// SPDX-License-Identifier: Apache-2.0
#include <cstring>

#include "kernels.h"

namespace smoothrot {
namespace {

// Inputs at a time of all columns of a panel, so that what is laid out stays in the first-level
// cache.
constexpr int64_t kSliceInputs = 512;

uint8_t nibble(const uint8_t* row, int64_t k) { return row[k / 2] >> (k % 2 * 4) & 0xF; }

// `count` bytes of two columns, two inputs in each, to a byte for each input: codes of `low` in its
// low nibble, offset to unsigned.
void join_bytes(const uint8_t* __restrict low, const uint8_t* __restrict high, int64_t count,
                uint8_t* __restrict joined) {
  for (int64_t i = 0; i < count; ++i) {
    const uint8_t l = low[i], h = high[i];
    joined[2 * i] = uint8_t(((l & 0x0F) | h << 4) ^ 0x88);
    joined[2 * i + 1] = uint8_t((l >> 4 | (h & 0xF0)) ^ 0x88);
  }
}

// Inputs [begin, end) of columns c and 16 + c of a panel, which share their bytes; `high` may be
// null past the last column.
void join_columns(const uint8_t* low, const uint8_t* high, int64_t begin, int64_t end,
                  uint8_t* joined) {
  int64_t k = begin;
  if (high && begin % 2 == 0) {
    join_bytes(low + begin / 2, high + begin / 2, (end - begin) / 2, joined);
    k += (end - begin) / 2 * 2;
  }
  for (; k < end; ++k)
    joined[k - begin] = uint8_t((nibble(low, k) | (high ? nibble(high, k) << 4 : 0)) ^ 0x88);
}

// Inputs [begin, end) of the `columns` columns at `rows`, in steps of four inputs.
void pack_slice(const uint8_t* rows, int64_t columns, int bits, const WeightLayout& w,
                int64_t begin, int64_t end, uint8_t* out) {
  uint8_t slice[kPanelColumns][kSliceInputs];
  const int64_t row_bytes = w.inputs * bits / 8, count = end - begin;
  const int64_t lanes = bits == 8 ? kPanelColumns : kHalfColumns,
                filled = columns < lanes ? columns : lanes;
  const int64_t steps = (count + kStepInputs - 1) / kStepInputs;
  for (int64_t c = 0; c < lanes; ++c) {
    // Columns and inputs past the last are zeros.
    const int64_t known = c < filled ? count : 0;
    std::memset(slice[c] + known, 0, size_t(steps * kStepInputs - known));
    if (c >= filled) continue;
    const uint8_t* row = rows + c * row_bytes;
    if (bits == 8) {
      for (int64_t k = 0; k < count; ++k) slice[c][k] = row[begin + k] ^ 0x80;
    } else {
      join_columns(row, c + kHalfColumns < columns ? row + kHalfColumns * row_bytes : nullptr,
                   begin, end, slice[c]);
    }
  }
  for (int64_t step = 0; step < steps; ++step, out += lanes * kStepInputs) {
    for (int64_t c = 0; c < lanes; ++c)
      std::memcpy(out + c * kStepInputs, &slice[c][step * kStepInputs], kStepInputs);
  }
}

}  // namespace

void prepack(const void* codes, const float* scale, int bits, const WeightLayout& w,
             uint8_t* packed, int64_t begin, int64_t end) {
  const auto* stored = static_cast<const uint8_t*>(codes);
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t first = panel * kPanelColumns;
    const int64_t columns = w.columns - first < kPanelColumns ? w.columns - first : kPanelColumns;
    uint8_t* out = packed + panel * w.panel_bytes;
    auto* scales = reinterpret_cast<float*>(out);
    uint8_t* panel_codes = out + w.groups * kPanelColumns * int64_t{sizeof(float)};
    for (int64_t g = 0; g < w.groups; ++g) {
      for (int64_t c = 0; c < kPanelColumns; ++c) {
        scales[g * kPanelColumns + c] = c < columns ? scale[(first + c) * w.groups + g] : 0.0f;
      }
    }
    for (int64_t g = 0; g < w.groups; ++g) {
      const int64_t group_end = (g + 1) * w.group_size;
      uint8_t* group = panel_codes + g * w.group_steps * w.step_bytes;
      for (int64_t k = g * w.group_size; k < group_end;
           k += kSliceInputs, group += kSliceInputs / kStepInputs * w.step_bytes) {
        const int64_t slice_end = k + kSliceInputs < group_end ? k + kSliceInputs : group_end;
        pack_slice(stored + first * w.inputs * bits / 8, columns, bits, w, k, slice_end, group);
      }
    }
  }
}

}  // namespace smoothrot
