// SPDX-License-Identifier: Apache-2.0
// The rotations that have been prepared, by block size. smoothrot_vllm.hadamard builds the base
// matrices; the kernels keep their signs in lookup form here for the life of the process.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "../cpu/kernels.h"

namespace smoothrot {

class Rotations {
 public:
  // `matrix` is [base][base] of +1 and -1. A block that is known already is left alone.
  void add(int64_t base, int64_t power, const int8_t* matrix) {
    std::lock_guard<std::mutex> lock(mutex_);
    std::unique_ptr<Entry>& entry = entries_[base * power];
    if (entry) return;
    entry = std::make_unique<Entry>();
    if (base > 1) {
      const int64_t groups = base / 4;
      entry->signs.resize(size_t(base * groups));
      for (int64_t b = 0; b < base; ++b) {
        for (int64_t j = 0; j < base; ++j) {
          entry->signs[size_t(j * groups + b / 4)] |=
              uint8_t((matrix[b * base + j] < 0) << (b % 4));
        }
      }
    }
    entry->rotation = {base, power, entry->signs.data()};
  }

  // Null for a block that was never prepared; what is returned stays valid.
  const Rotation* find(int64_t block) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = entries_.find(block);
    return found == entries_.end() ? nullptr : &found->second->rotation;
  }

 private:
  struct Entry {
    std::vector<uint8_t> signs;
    Rotation rotation;
  };
  std::mutex mutex_;
  std::unordered_map<int64_t, std::unique_ptr<Entry>> entries_;
};

}  // namespace smoothrot
