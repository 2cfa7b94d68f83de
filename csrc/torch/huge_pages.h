// SPDX-License-Identifier: Apache-2.0
// Memory for weights that every decoded token streams through once: in huge pages, where the system has them, a token
// costs far fewer address translations. A hint only: nothing depends on it but speed.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstdlib>
#include <new>

#ifdef __linux__
  #include <sys/mman.h>
#endif

namespace smoothrot {

constexpr int64_t kHugePage = 2 * 1024 * 1024;

// An uninitialised CPU tensor of bytes, (rows, row_bytes), whose whole huge pages are asked for as such. The rest stays
// in small ones, so that no more memory is resident than is written.
inline torch::stable::Tensor empty_in_huge_pages(int64_t rows, int64_t row_bytes) {
  const int64_t bytes = rows * row_bytes;
  const bool huge = bytes >= kHugePage;
  const size_t alignment = huge ? size_t(kHugePage) : 64;
  void* memory = std::aligned_alloc(alignment, (size_t(bytes) + alignment - 1) / alignment * alignment);
  if (!memory) throw std::bad_alloc();
#ifdef __linux__
  if (huge) madvise(memory, size_t(bytes / kHugePage * kHugePage), MADV_HUGEPAGE);
#endif
  const int64_t sizes[] = {rows, row_bytes}, strides[] = {row_bytes, 1};
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  return torch::stable::from_blob(memory, {sizes, 2}, {strides, 2}, cpu, torch::headeronly::ScalarType::Byte,
                                  &std::free);
}

}  // namespace smoothrot
