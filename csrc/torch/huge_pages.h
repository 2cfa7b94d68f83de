// SPDX-License-Identifier: Apache-2.0
// Memory for weights that every decoded token streams through once: in huge pages, where the system
// has them, a token costs far fewer address translations. A hint only: nothing depends on it but
// speed.
#pragma once

#include <sys/mman.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>

namespace smoothrot {

constexpr size_t kHugePage = 2 * 1024 * 1024;
constexpr size_t kSlab = 16 * kHugePage;
constexpr size_t kLine = 64;

// Bytes from the start of a huge page on, handed out from front to back and given back to the
// system as one: by mmap, so that it does not depend on how the process has set its allocator.
class Slab {
 public:
  explicit Slab(size_t bytes) : size_((bytes + kHugePage - 1) / kHugePage * kHugePage) {
    // What alignment leaves over is never touched.
    mapping_ = mmap(nullptr, size_ + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
                    -1, 0);
    if (mapping_ == MAP_FAILED) {
      throw std::runtime_error("smoothrot::prepack_weight: weight: expected " +
                               std::to_string(size_) +
                               " bytes of memory for its packed codes, got none.");
    }
    const auto address = reinterpret_cast<uintptr_t>(mapping_);
    memory_ = static_cast<char*>(mapping_) + (kHugePage - address % kHugePage) % kHugePage;
#ifdef MADV_HUGEPAGE
    // Not a page that is used in part: all of it would be resident.
    madvise(memory_, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
  }
  Slab(const Slab&) = delete;
  Slab& operator=(const Slab&) = delete;
  ~Slab() { munmap(mapping_, size_ + kHugePage); }

  // Null where so much is not left.
  void* take(size_t bytes) {
    const size_t rounded = (bytes + kLine - 1) / kLine * kLine;
    if (rounded > size_ - used_) return nullptr;
    char* const taken = memory_ + used_;
    used_ += rounded;
    return taken;
  }

 private:
  size_t size_, used_ = 0;
  void* mapping_;
  char* memory_;
};

// An uninitialized CPU tensor of bytes. Small ones share a slab, which lives as long as any of
// them.
inline torch::stable::Tensor empty_in_huge_pages(std::initializer_list<int64_t> sizes) {
  static std::mutex mutex;
  static std::shared_ptr<Slab> open;
  constexpr size_t kMostSizes = 3;
  int64_t strides[kMostSizes];
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= sizes.begin()[i]) strides[i] = stride;
  const auto bytes = size_t(stride);
  std::shared_ptr<Slab> slab;
  void* memory = nullptr;
  if (bytes > kSlab / 4) {
    slab = std::make_shared<Slab>(bytes);
    memory = slab->take(bytes);
  } else {
    const std::lock_guard<std::mutex> lock(mutex);
    if (!open || !(memory = open->take(bytes))) {
      open = std::make_shared<Slab>(kSlab);
      memory = open->take(bytes);
    }
    slab = open;
  }
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  // The deleter owns a share of the slab: to destroy the deleter is to let go of it.
  return torch::stable::from_blob(memory, {sizes.begin(), sizes.size()}, {strides, sizes.size()},
                                  cpu, torch::headeronly::ScalarType::Byte, [slab](void*) {});
}

}  // namespace smoothrot
