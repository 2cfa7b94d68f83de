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

// Int8 multiply-adds of one call to dot_products per turn.
extern "C" int64_t dot_products_per_turn() {
#ifdef __AVX512VNNI__
  return 16 * 64;
#else
  return 0;
#endif
}

// Sixteen independent chains of the widest int8 dot product, `turns` long, without memory.
extern "C" void dot_products(int64_t turns) {
#ifdef __AVX512VNNI__
  for (int64_t i = 0; i < turns; ++i) {
  #define DOT(n) "vpdpbusd %%zmm30, %%zmm31, %%zmm" #n "\n"
    asm volatile(DOT(0) DOT(1) DOT(2) DOT(3) DOT(4) DOT(5) DOT(6) DOT(7) DOT(8) DOT(9) DOT(10)
                     DOT(11) DOT(12) DOT(13) DOT(14) DOT(15)::
                         : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8",
                           "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
  }
#endif
}
