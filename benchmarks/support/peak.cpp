// SPDX-License-Identifier: Apache-2.0
// What the machine can do at best: the floors that the benchmarks compare with. Built by
// timing.py with -march=native; one call runs on one thread, the caller starts as many as it wants
// to load.
#include <cstdint>
#include <cstring>

using Vec = int32_t __attribute__((vector_size(64)));

// Reads `bytes` (a multiple of 256) once; returns a sum so that nothing is optimized away.
extern "C" int32_t read_all(const char* data, int64_t bytes) {
  Vec sum[4] = {};
  for (int64_t i = 0; i < bytes; i += 256) {
    for (int lane = 0; lane < 4; ++lane) {
      Vec v;
      std::memcpy(&v, data + i + 64 * lane, 64);
      __builtin_prefetch(data + i + 64 * lane + 4096);
      sum[lane] ^= v;
    }
  }
  const Vec all = sum[0] ^ sum[1] ^ sum[2] ^ sum[3];
  return all[0];
}

// What one turn of dot_products multiplies and adds.
#if defined(__AVX512VNNI__)
constexpr int64_t kPerTurn = 16 * 64;
#elif defined(__AVX2__)
constexpr int64_t kPerTurn = 8 * 4 * 32;
#else
constexpr int64_t kPerTurn = 0;
#endif

// Int8 multiply-adds of one turn; 0: no peak is known.
extern "C" int64_t dot_products_per_turn() { return kPerTurn; }

// Independent chains of the widest int8 dot product, `turns` long, without memory. Without VNNI:
// pairs added in 16 bits and, after eight, which is as many as 16 bits hold of 4-bit by 8-bit
// products, in 32.
extern "C" void dot_products(int64_t turns) {
  for (int64_t i = 0; i < turns; ++i) {
#if defined(__AVX512VNNI__)
  #define DOT(n) "vpdpbusd %%zmm30, %%zmm31, %%zmm" #n "\n"
    asm volatile(DOT(0) DOT(1) DOT(2) DOT(3) DOT(4) DOT(5) DOT(6) DOT(7) DOT(8) DOT(9) DOT(10)
                     DOT(11) DOT(12) DOT(13) DOT(14) DOT(15)::
                         : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8",
                           "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
#elif defined(__AVX2__)
  #define PAIRS(sum, product)                     \
    "vpmaddubsw %%ymm14, %%ymm15, %%ymm" #product \
    "\n"                                          \
    "vpaddw %%ymm" #product ", %%ymm" #sum ", %%ymm" #sum "\n"
  #define STEP PAIRS(0, 8) PAIRS(1, 9) PAIRS(2, 10) PAIRS(3, 11)
  #define FOLD(sum, total)                                \
    "vpmaddwd %%ymm15, %%ymm" #sum ", %%ymm" #sum         \
    "\n"                                                  \
    "vpaddd %%ymm" #sum ", %%ymm" #total ", %%ymm" #total \
    "\n"                                                  \
    "vpxor %%ymm" #sum ", %%ymm" #sum ", %%ymm" #sum "\n"
    asm volatile(STEP STEP STEP STEP STEP STEP STEP STEP FOLD(0, 4) FOLD(1, 5) FOLD(2, 6)
                     FOLD(3, 7)::
                         : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8",
                           "xmm9", "xmm10", "xmm11");
#endif
  }
}
