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

void prepack(const void* codes, const float* scale, const uint8_t* group_scale,
             const WeightLayout& w, uint8_t* packed, int64_t begin, int64_t end) {
  const auto* stored = static_cast<const uint8_t*>(codes);
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t first = panel * kPanelColumns;
    const int64_t columns = w.columns - first < kPanelColumns ? w.columns - first : kPanelColumns;
    uint8_t* out = packed + panel * w.panel_bytes;
    auto* scales = reinterpret_cast<float*>(out);
    for (int64_t c = 0; c < kPanelColumns; ++c) scales[c] = c < columns ? scale[first + c] : 0.0f;
    uint8_t* joined = out + kScaleBytes;
    std::memset(joined, 0, size_t(w.codes_at - kScaleBytes));
    for (int64_t g = 0; g < w.groups; ++g) {
      for (int64_t c = 0; c < columns; ++c) {
        const uint8_t one = group_scale[(first + c) * w.groups + g];
        joined[g * kGroupScaleBytes + c % kHalfColumns] |= uint8_t(one << c / kHalfColumns * 4);
      }
    }
    for (int64_t k = 0; k < w.inputs; k += kSliceInputs) {
      const int64_t end_of_slice = k + kSliceInputs < w.inputs ? k + kSliceInputs : w.inputs;
      pack_slice(stored + first * w.inputs * w.bits / 8, columns, int(w.bits), w, k, end_of_slice,
                 out + w.codes_at + k / kStepInputs * w.step_bytes);
    }
  }
}

}  // namespace smoothrot
