// SPDX-License-Identifier: Apache-2.0
// The primitives of ../cuda/device.h, emulated.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../common/float16.h"
#include "emulator.h"
#include "mma_layout.h"

#define SMOOTHROT_DEVICE inline
#define SMOOTHROT_KERNEL(...) static void
#ifndef SMOOTHROT_EMULATED_INT4
  #define SMOOTHROT_EMULATED_INT4 1
#endif

namespace smoothrot::cuda {

namespace emu = smoothrot::emulator;

constexpr bool kNativeInt4 = SMOOTHROT_EMULATED_INT4;

inline int thread_index() { return emu::self().index; }
inline int thread_index_anew() { return thread_index(); }
inline int block_index_x() { return emu::block->index_x; }
inline int block_index_y() { return emu::block->index_y; }
inline int block_count_x() { return emu::block->count_x; }
inline int block_threads() { return int(emu::block->threads.size()); }
inline unsigned char* shared_memory() { return emu::block->shared; }
inline void block_barrier() { emu::wait_for_block(); }

template <class T>
inline T load_global(const T* address) {
  emu::count(address, int(sizeof(T)), false);
  return *address;
}

template <class T>
inline T load_once(const T* address, bool wanted) {
  return wanted ? load_global(address) : T{};
}

template <class T>
inline T load_mutable(const T* address) {
  return load_global(address);
}

template <class T>
inline void store_global(T* address, const T& value) {
  emu::count(address, int(sizeof(T)), true);
  *address = value;
}

inline void copy_async16(void* target, const void* source, bool copied) {
  emu::copy_async(target, source, copied ? 16 : 0, 16);
}
inline void copy_async4(void* target, const void* source, bool copied) {
  emu::copy_async(target, source, copied ? 4 : 0, 4);
}
inline void commit_copies() { emu::commit_copies(); }
template <int Pending>
inline void wait_for_copies() {
  emu::wait_for_copies(Pending);
}

inline uint32_t shuffle_xor(uint32_t value, int mask) {
  emu::Exchange& x = emu::exchange();
  x.words[emu::lane()][0] = value;
  emu::wait_for_warp();
  const uint32_t other = x.words[emu::lane() ^ mask][0];
  emu::wait_for_warp();
  return other;
}

inline uint32_t warp_max(uint32_t value) {
  for (int mask = 1; mask < emu::kWarp; mask *= 2)
    value = std::max(value, shuffle_xor(value, mask));
  return value;
}

inline uint32_t float_bits(float value) { return f32_bits(value); }
inline float bits_float(uint32_t bits) { return f32_from_bits(bits); }
inline float add(float a, float b) { return a + b; }
inline float subtract(float a, float b) { return a - b; }
inline float multiply(float a, float b) { return a * b; }
inline float divide(float a, float b) { return a / b; }
inline float square_root(float a) { return std::sqrt(a); }
inline float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline float round_to_even(float a) { return std::nearbyint(a); }
inline float clamp(float a, float low, float high) { return std::fmin(std::fmax(a, low), high); }

inline float bf16_float(uint16_t half) { return bf16_to_f32(half); }
inline float f16_float(uint16_t half) { return f16_to_f32(half); }
inline uint16_t float_bf16(float value) { return f32_to_bf16(value); }
inline uint16_t float_f16(float value) { return f32_to_f16(value); }

// Bytes of the eight in (high, low) that the selector's nibbles name, lowest first.
inline uint32_t pick_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i)
    out |= uint32_t(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xFF) << (8 * i);
  return out;
}

inline uint32_t and_xor(uint32_t value, uint32_t mask, uint32_t flip) {
  return (value & mask) ^ flip;
}

// Lane i names row i % 8 of 8x8 16-bit matrix i / 8; register m receives the lane's word of matrix
// m.
inline void load_matrices(uint32_t (&out)[4], const void* row) {
  emu::Exchange& x = emu::exchange();
  x.pointers[emu::lane()] = row;
  emu::wait_for_warp();
  for (int m = 0; m < 4; ++m) {
    const auto* source = static_cast<const unsigned char*>(x.pointers[m * 8 + emu::lane() / 4]);
    std::memcpy(&out[m], source + 4 * (emu::lane() % 4), 4);
  }
  emu::wait_for_warp();
}

// `Words` registers of B, one for each half of the largest depth, and twice as many of A.
template <int Bits, int Words>
inline void multiply_fragments(int32_t (&sums)[4], const uint32_t (&a)[2 * Words],
                               const uint32_t (&b)[Words]) {
  constexpr int kPerWord = 32 / Bits, kDepth = 4 * Words * kPerWord;
  emu::Exchange& x = emu::exchange();
  const int lane = emu::lane();
  const auto value = [](uint32_t word, int i) {
    return int8_t(int32_t(word << (32 - Bits - Bits * i)) >> (32 - Bits));
  };
  for (int i = 0; i < 2 * Words * kPerWord; ++i) {
    const emu::Element e = emu::element_a(lane, i, kPerWord);
    x.left[e.row][e.column] = value(a[i / kPerWord], i % kPerWord);
  }
  for (int i = 0; i < Words * kPerWord; ++i) {
    const emu::Element e = emu::element_b(lane, i, kPerWord);
    x.right[e.row][e.column] = value(b[i / kPerWord], i % kPerWord);
  }
  emu::wait_for_warp();
  for (int i = 0; i < 4; ++i) {
    const emu::Element e = emu::element_c(lane, i);
    int32_t sum = 0;
    for (int k = 0; k < kDepth; ++k) sum += int32_t{x.left[e.row][k]} * x.right[e.column][k];
    sums[i] += sum;
  }
  emu::wait_for_warp();
}

inline void mma_s4(int32_t (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply_fragments<4, 2>(sums, a, b);
}

inline void mma_s4(int32_t (&sums)[4], const uint32_t (&a)[2], const uint32_t (&b)[1]) {
  multiply_fragments<4, 1>(sums, a, b);
}

inline void mma_s8(int32_t (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply_fragments<8, 2>(sums, a, b);
}

template <class Args>
inline cudaError_t launch(void (*kernel)(Args), int grid_x, int grid_y, int threads,
                          int64_t shared_bytes, cudaStream_t, const Args& args) {
  return emu::launch(grid_x, grid_y, threads, shared_bytes, [&] { kernel(args); });
}

inline int multiprocessors() { return emu::options.multiprocessors; }

}  // namespace smoothrot::cuda
