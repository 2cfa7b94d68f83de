// SPDX-License-Identifier: Apache-2.0
// What is done to weights with group scales before a GEMM: once at load, and for those kernels that
// cannot multiply by them.
#include "gemm_common.h"

namespace smoothrot::cuda {
namespace {

constexpr int kWeightThreads = 256;
constexpr int64_t kMostGridY = 65535;

// A block's share of an expert, 16 bytes a thread: codes as they are, group scales in nibbles.
SMOOTHROT_KERNEL(kWeightThreads)
prepack_groups_kernel(const PrepackArgs a) {
  const int64_t bytes = grouped_bytes(a.outputs, a.inputs, a.group_size);
  const int64_t codes = code_bytes(a.outputs, a.inputs);
  const int64_t at = (int64_t{block_index_x()} * kWeightThreads + thread_index()) * 16;
  if (at >= bytes) return;
  Words4 words = {};
  if (at < codes) {
    const auto* weight = static_cast<const unsigned char*>(a.weight) + block_index_y() * codes;
    words = load_global(reinterpret_cast<const Words4*>(weight + at));
  } else {
    const int groups = int(a.inputs / a.group_size);
    const int pitch = (groups + kWordGroups - 1) / kWordGroups;
    const uint8_t* scales = a.group_scale + block_index_y() * a.outputs * groups;
    for (int w = 0; w < 4; ++w) {
      const int64_t word = (at - codes) / 4 + w, row = word / pitch;
      const int first = int(word % pitch) * kWordGroups;
      for (int i = 0; i < kWordGroups && row < a.outputs && first + i < groups; ++i)
        words.word[w] |= uint32_t(load_global(scales + row * groups + first + i)) << (4 * i);
    }
  }
  store_global(static_cast<Words4*>(a.packed) + (block_index_y() * bytes + at) / 16, words);
}

struct ExpandArgs {
  const Words4* weight;         // [rows][inputs / 32]
  const uint32_t* group_scale;  // [rows][pitch]
  Words4* expanded;             // [rows][inputs / 16]
  int count;                    // 16-byte words of the weight
  int row_words, pitch, shift;  // log2 of the granules of a group
};

// 32 inputs of a row a thread, which have one scale.
SMOOTHROT_KERNEL(kWeightThreads)
expand_weight_kernel(const ExpandArgs a) {
  const int i = block_index_x() * kWeightThreads + thread_index();
  if (i >= a.count) return;
  const int row = i / a.row_words, group = (i - row * a.row_words) >> a.shift;
  const uint32_t scales = load_global(a.group_scale + int64_t{row} * a.pitch + group / kWordGroups);
  const GroupFactor factor = group_factor(scales, group % kWordGroups);
  const Words4 packed = load_global(a.weight + i);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    Words4 out;
#pragma unroll
    for (int w = 0; w < 2; ++w) {
      uint32_t even, odd;
      scaled_inputs(packed.word[2 * half + w], factor, even, odd);
      out.word[2 * w] = pick_bytes(even, odd, 0x5140);
      out.word[2 * w + 1] = pick_bytes(even, odd, 0x7362);
    }
    store_global(a.expanded + 2 * int64_t{i} + half, out);
  }
}

int blocks_of(int64_t threads) { return int((threads + kWeightThreads - 1) / kWeightThreads); }

// So that a thread's number is an int.
constexpr int64_t kMostWeightThreads = INT32_MAX - kWeightThreads;

}  // namespace

cudaError_t prepack_groups(const PrepackArgs& a, cudaStream_t stream) {
  const bool grouped = is_group_size(a.group_size) && a.inputs > 0 && a.inputs % a.group_size == 0;
  if (!grouped || a.outputs < 1 || a.experts < 0 || a.experts > kMostGridY)
    return cudaErrorInvalidValue;
  const int64_t threads = grouped_bytes(a.outputs, a.inputs, a.group_size) / 16;
  if (threads > kMostWeightThreads) return cudaErrorInvalidValue;
  if (a.experts == 0) return cudaSuccess;
  return launch(prepack_groups_kernel, blocks_of(threads), int(a.experts), kWeightThreads, 0,
                stream, a);
}

cudaError_t expand_weight(const GemmArgs& g, int64_t first, int64_t count, void* expanded,
                          cudaStream_t stream) {
  if (!valid(g) || !g.group_scale || first < 0 || count < 1 || first + count > g.outputs)
    return cudaErrorInvalidValue;
  const int64_t row_words = g.inputs / 32, pitch = group_words(g.inputs, g.group_size);
  const int64_t words = count * row_words;
  if (words > kMostWeightThreads) return cudaErrorInvalidValue;
  const int shift = g.group_size == 32 ? 0 : g.group_size == 64 ? 1 : 2;
  return launch(expand_weight_kernel, blocks_of(words), 1, kWeightThreads, 0, stream,
                ExpandArgs{static_cast<const Words4*>(g.weight) + first * row_words,
                           g.group_scale + first * pitch, static_cast<Words4*>(expanded),
                           int(words), int(row_words), int(pitch), shift});
}

}  // namespace smoothrot::cuda
