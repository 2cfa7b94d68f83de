// SPDX-License-Identifier: Apache-2.0
// Runs CUDA kernels on the CPU, for tests: a fiber per thread, barriers are the points where fibers
// change.
//
// A thread runs alone until it must wait, so a missing barrier gives wrong data every time rather
// than now and then; tests run both thread orders. Shared memory starts poisoned and asynchronous
// copies land only when they are waited for. Kernels must keep whole warps together and not return
// before a barrier. Nothing here tells of speed, bank conflicts or the memory model.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "runtime.h"

#ifndef __x86_64__
  #error "the emulator switches fibers in x86-64 assembly"
#endif

namespace smoothrot::emulator {

constexpr int kWarp = 32;
constexpr int kMostThreads = 1024;
constexpr size_t kStackBytes = 64 * 1024;
constexpr int kNone = -1;

// What a test can set before a launch.
struct Options {
  bool reverse_order = false;
  int dropped_barrier =
      kNone;           // the block barrier, counted from 0 in each block, that threads run past
  int wait_slack = 0;  // more groups of asynchronous copies than asked for may stay pending
  int multiprocessors = 2;
  bool trace = false;
};

struct Access {
  uintptr_t address;
  int bytes;
  int block;
};

// What the launches since the last reset did.
struct Counters {
  int64_t loaded = 0;
  int64_t stored = 0;
  int64_t launches = 0;
  int64_t barriers = 0;       // of the block that met most
  std::vector<Access> trace;  // of loads, with options.trace
};

inline Options options;
inline Counters counters;

struct Barrier {
  int expected = 0;
  int arrived = 0;
  unsigned generation = 0;
};

struct Copy {
  void* target;
  int bytes_written;
  unsigned char bytes[16];
};

struct Thread {
  void* stack_pointer;
  int index;
  bool done;
  int barriers;
  std::vector<std::vector<Copy>> pending;  // committed groups, oldest first, then the open one
};

// Words that the lanes of a warp show each other.
struct Exchange {
  uint32_t words[kWarp][4];
  const void* pointers[kWarp];
  int8_t left[16][64];
  int8_t right[8][64];
};

struct Block {
  int index_x, index_y, count_x;
  int number() const { return index_y * count_x + index_x; }
  int current;
  void* scheduler;
  unsigned char* shared;
  Barrier all;
  std::vector<Barrier> warps;
  std::vector<Exchange> exchanges;
  std::vector<Thread> threads;
  const std::function<void()>* body;
};

inline Block* block = nullptr;

inline Thread& self() { return block->threads[size_t(block->current)]; }
inline int lane() { return block->current % kWarp; }
inline Exchange& exchange() { return block->exchanges[size_t(block->current / kWarp)]; }

// Saves the callee-saved registers and the stack pointer, and continues on another stack (System V
// ABI).
extern "C" void smoothrot_switch_fiber(void** saved, void* next);
asm(R"(
  .pushsection .text
  .weak smoothrot_switch_fiber
  .type smoothrot_switch_fiber, @function
smoothrot_switch_fiber:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
  .popsection
)");

inline void yield() { smoothrot_switch_fiber(&self().stack_pointer, block->scheduler); }

inline void wait(Barrier& barrier) {
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  while (barrier.generation == generation) yield();
}

inline void wait_for_warp() { wait(block->warps[size_t(block->current / kWarp)]); }

inline void wait_for_block() {
  if (self().barriers++ != options.dropped_barrier) wait(block->all);
}

inline void run_thread() {
  (*block->body)();
  self().done = true;
  for (;;) yield();
}

inline void prepare(Thread& thread, int index, unsigned char* stack) {
  thread.index = index;
  thread.done = false;
  thread.barriers = 0;
  thread.pending.assign(1, {});
  auto top = reinterpret_cast<uintptr_t>(stack + kStackBytes) & ~uintptr_t{15};
  auto* words = reinterpret_cast<void**>(top);
  *--words = nullptr;  // keeps the entry's stack aligned as after a call
  *--words = reinterpret_cast<void*>(run_thread);
  thread.stack_pointer = words - 6;
}

// Runs a warp until it waits for others; returns whether anything moved.
inline bool run_warp(int warp) {
  bool moved = false;
  for (bool again = true; again;) {
    const unsigned before = block->warps[size_t(warp)].generation;
    for (int i = 0; i < kWarp; ++i) {
      const int index = warp * kWarp + (options.reverse_order ? kWarp - 1 - i : i);
      Thread& thread = block->threads[size_t(index)];
      if (thread.done) continue;
      const unsigned generation = block->all.generation;
      block->current = index;
      smoothrot_switch_fiber(&block->scheduler, thread.stack_pointer);
      moved |= thread.done || block->all.generation != generation;
    }
    again = block->warps[size_t(warp)].generation != before;
    moved |= again;
  }
  return moved;
}

inline bool run_block(int threads) {
  const int warps = threads / kWarp;
  for (;;) {
    bool moved = false, done = true;
    for (int i = 0; i < warps; ++i) moved |= run_warp(options.reverse_order ? warps - 1 - i : i);
    for (const Thread& thread : block->threads) done &= thread.done;
    if (done) return true;
    if (!moved) return false;
  }
}

inline cudaError_t launch(int grid_x, int grid_y, int threads, int64_t shared_bytes,
                          const std::function<void()>& body) {
  static const std::unique_ptr<unsigned char[]> stacks(
      new unsigned char[kMostThreads * kStackBytes]);
  if (threads % kWarp || threads < 1 || threads > kMostThreads || grid_x < 1 || grid_y < 1) {
    return cudaErrorInvalidValue;
  }
  std::vector<unsigned char> memory(size_t(shared_bytes) + 128);
  Block state{};
  state.shared = memory.data() + (128 - reinterpret_cast<uintptr_t>(memory.data()) % 128);
  state.count_x = grid_x;
  state.body = &body;
  state.threads.resize(size_t(threads));
  state.exchanges.resize(size_t(threads / kWarp));
  block = &state;
  ++counters.launches;
  bool finished = true;
  for (int i = 0; i < grid_x * grid_y && finished; ++i) {
    state.index_x = i % grid_x;
    state.index_y = i / grid_x;
    state.all = {threads, 0, 0};
    state.warps.assign(size_t(threads / kWarp), {kWarp, 0, 0});
    std::memset(state.shared, 0xCD, size_t(shared_bytes));
    for (int t = 0; t < threads; ++t)
      prepare(state.threads[size_t(t)], t, stacks.get() + size_t(t) * kStackBytes);
    finished = run_block(threads);
    if (counters.barriers < state.threads[0].barriers)
      counters.barriers = state.threads[0].barriers;
  }
  block = nullptr;
  return finished ? cudaSuccess : cudaErrorLaunchFailure;
}

inline void count(const void* address, int bytes, bool store) {
  (store ? counters.stored : counters.loaded) += bytes;
  if (options.trace && !store)
    counters.trace.push_back({reinterpret_cast<uintptr_t>(address), bytes, block->number()});
}

// The copy's source is read at once and its target written when the copy is waited for: a wait that
// is missing or too weak leaves the target as it was. Of the `written` bytes the first `bytes` are
// copied, the others zero.
inline void copy_async(void* target, const void* source, int bytes, int written) {
  Copy copy{target, written, {}};
  if (bytes) {
    std::memcpy(copy.bytes, source, size_t(bytes));
    count(source, bytes, false);
  }
  self().pending.back().push_back(copy);
}

inline void commit_copies() { self().pending.emplace_back(); }

inline void wait_for_copies(int pending_groups) {
  auto& pending = self().pending;
  while (int(pending.size()) - 1 > pending_groups + options.wait_slack) {
    for (const Copy& copy : pending.front())
      std::memcpy(copy.target, copy.bytes, size_t(copy.bytes_written));
    pending.erase(pending.begin());
  }
}

}  // namespace smoothrot::emulator
