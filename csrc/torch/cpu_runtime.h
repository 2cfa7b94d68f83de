// SPDX-License-Identifier: Apache-2.0
// What the CPU ops run on: the kernels chosen for this processor, memory, and torch's threads.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <optional>

#include "checks.h"

namespace smoothrot {

constexpr int64_t kAlignment = 64;
constexpr int64_t kMostDims = 8;
// Work below these is not worth waking a thread for.
constexpr int64_t kGrainValues = 32 * 1024;
constexpr int64_t kGrainProducts = 1024 * 1024;

inline std::atomic<const Kernels*> chosen_kernels{nullptr};

inline const Kernels& kernels() {
  const Kernels* chosen = chosen_kernels.load(std::memory_order_acquire);
  if (!chosen) {
    const char* forced = std::getenv("SMOOTHROT_CPU_ISA");
    chosen = &select_kernels(forced ? forced : "");
    chosen_kernels.store(chosen, std::memory_order_release);
  }
  return *chosen;
}

// An uninitialized CPU tensor; far cheaper than a dispatcher call, which counts at one token.
inline Tensor empty(const int64_t* sizes, int64_t dims, ScalarType dtype) {
  int64_t strides[kMostDims];
  int64_t stride = 1;
  for (int64_t i = dims - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= sizes[i];
  }
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dims, sizes, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return empty(sizes.begin(), int64_t(sizes.size()), dtype);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Runs work(begin, end) over [0, tasks) on torch's threads. Each takes half of its share of what is
// left, at least `grain` tasks, and comes back for more: a thread that the machine holds up is not
// waited for with half of the work.
template <typename Work>
void share(int64_t tasks, int64_t grain, const Work& work) {
  const int64_t wanted = ceil_div(tasks, grain),
                available = int64_t(torch::stable::get_num_threads());
  const int64_t threads = wanted < available ? wanted : available;
  if (threads <= 1) return work(0, tasks);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    int64_t begin = next.load(std::memory_order_relaxed);
    while (begin < tasks) {
      const int64_t left = tasks - begin, part = left / (2 * threads);
      const int64_t end = begin + std::min(left, std::max(grain, part));
      if (!next.compare_exchange_weak(begin, end, std::memory_order_relaxed)) continue;
      work(begin, end);
      begin = next.load(std::memory_order_relaxed);
    }
  });
}

// Cuts one allocation into aligned parts.
class Arena {
 public:
  template <typename T>
  size_t reserve(int64_t count) {
    const int64_t at = bytes_;
    bytes_ += ceil_div(count * int64_t{sizeof(T)}, kAlignment) * kAlignment;
    return size_t(at);
  }
  void allocate() {
    memory_ = empty({bytes_ + kAlignment}, ScalarType::Byte);
    const auto address = reinterpret_cast<uintptr_t>(memory_->mutable_data_ptr());
    base_ = reinterpret_cast<uint8_t*>((address + kAlignment - 1) / kAlignment * kAlignment);
  }
  template <typename T>
  T* at(size_t offset) const {
    return reinterpret_cast<T*>(base_ + offset);
  }

 private:
  int64_t bytes_ = 0;
  std::optional<Tensor> memory_;
  uint8_t* base_ = nullptr;
};

inline uint32_t thread_index() {
  uint32_t index = 0;
  torch_get_thread_idx(&index);
  return index;
}

// Scratch for one thread or, of a parallel range, for each.
struct ThreadScratch {
  int64_t bytes;
  size_t offset;
  ThreadScratch(Arena& arena, int64_t bytes_each, bool parallel) : bytes(bytes_each) {
    offset = arena.reserve<uint8_t>(bytes * (parallel ? torch::stable::get_num_threads() : 1));
  }
  void* of_this_thread(const Arena& arena) const {
    return arena.at<void>(offset + thread_index() * size_t(bytes));
  }
};

}  // namespace smoothrot
