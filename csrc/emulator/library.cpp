// SPDX-License-Identifier: Apache-2.0
// The hand-written CUDA kernels and the emulator as one library of C functions, for tests/emulated.
#include <algorithm>
#include <list>
#include <string>
#include <unordered_map>
#include <vector>

#include "../cuda/gemm_experts.cu"
#include "../cuda/gemm_s8.cu"
#include "../cuda/gemm_small.cu"
#include "../cuda/quant.cu"
#include "../cuda/weights.cu"

extern "C" {

struct smoothrot_options {
  int reverse_order;
  int dropped_barrier;
  int wait_slack;
  int multiprocessors;
  int trace;
};

struct smoothrot_counters {
  int64_t loaded;
  int64_t stored;
  int64_t launches;
  int64_t barriers;
};

// Sets the options and clears the counters.
void smoothrot_set_options(const smoothrot_options* o) {
  smoothrot::emulator::options = {o->reverse_order != 0, o->dropped_barrier, o->wait_slack,
                                  o->multiprocessors, o->trace != 0};
  smoothrot::emulator::counters = {};
}

void smoothrot_get_counters(smoothrot_counters* out) {
  const auto& c = smoothrot::emulator::counters;
  *out = {c.loaded, c.stored, c.launches, c.barriers};
}

// Bytes that launches loaded from [begin, begin + bytes); needs options.trace.
int64_t smoothrot_loaded_from(const void* begin, int64_t bytes) {
  int64_t loaded = 0;
  for (const auto& access : smoothrot::emulator::counters.trace) {
    const auto offset = int64_t(access.address - reinterpret_cast<uintptr_t>(begin));
    if (offset >= 0 && offset < bytes) loaded += access.bytes;
  }
  return loaded;
}

// Bytes that the loads of the last launch take from DRAM through a cache of `cache_bytes`: 32-byte
// sectors, the least recently used one leaves. `resident` blocks run at a time, each issuing one
// load in turn. Needs options.trace.
int64_t smoothrot_dram_loaded(int64_t cache_bytes, int resident) {
  constexpr uintptr_t kSector = 32;
  std::vector<std::vector<smoothrot::emulator::Access>> blocks;
  for (const auto& access : smoothrot::emulator::counters.trace) {
    if (size_t(access.block) >= blocks.size()) blocks.resize(size_t(access.block) + 1);
    blocks[size_t(access.block)].push_back(access);
  }
  std::list<uintptr_t> recent;
  std::unordered_map<uintptr_t, std::list<uintptr_t>::iterator> cached;
  int64_t loaded = 0;
  const auto touch = [&](uintptr_t sector) {
    const auto found = cached.find(sector);
    if (found != cached.end()) {
      recent.splice(recent.begin(), recent, found->second);
      return;
    }
    loaded += kSector;
    cached[sector] = recent.insert(recent.begin(), sector);
    if (int64_t(cached.size() * kSector) > cache_bytes) {
      cached.erase(recent.back());
      recent.pop_back();
    }
  };
  for (size_t first = 0; first < blocks.size(); first += size_t(resident)) {
    const size_t last = std::min(blocks.size(), first + size_t(resident));
    bool more = true;
    for (size_t i = 0; more; ++i) {
      more = false;
      for (size_t b = first; b < last; ++b) {
        if (i >= blocks[b].size()) continue;
        more = true;
        const auto& access = blocks[b][i];
        const uintptr_t end = access.address + uintptr_t(access.bytes) - 1;
        for (uintptr_t s = access.address / kSector; s <= end / kSector; ++s) touch(s);
      }
    }
  }
  return loaded;
}

// `base_matrix` is [base][base] of +1 and -1, or null: the launcher gets its packed signs.
int smoothrot_quant(const char* producer, const smoothrot::cuda::QuantArgs* args,
                    const int8_t* base_matrix) {
  using namespace smoothrot::cuda;
  QuantArgs q = *args;
  std::vector<uint32_t> signs(size_t(sign_words(q.rotation.base)));
  if (base_matrix) pack_signs(base_matrix, q.rotation.base, signs.data());
  q.rotation.signs = base_matrix ? signs.data() : nullptr;
  const std::string name = producer;
  if (name == "rms_norm") return rms_norm_quant(q, nullptr);
  return name == "silu_mul" ? silu_mul_quant(q, nullptr) : quant(q, nullptr);
}

int smoothrot_prepack_groups(const smoothrot::cuda::PrepackArgs* args) {
  return prepack_groups(*args, nullptr);
}

int smoothrot_expand_weight(const smoothrot::cuda::GemmArgs* args, int64_t first, int64_t count,
                            void* expanded) {
  return expand_weight(*args, first, count, expanded, nullptr);
}

int smoothrot_gemm_small(const smoothrot::cuda::GemmArgs* args) {
  return gemm_small(*args, nullptr);
}

int smoothrot_gemm_s8(const smoothrot::cuda::GemmArgs* args) { return gemm_s8(*args, nullptr); }

int smoothrot_gemm_experts(const smoothrot::cuda::ExpertsArgs* args) {
  return gemm_experts(*args, nullptr);
}

int smoothrot_combine_experts(const smoothrot::cuda::CombineArgs* args) {
  return combine_experts(*args, nullptr);
}
}
