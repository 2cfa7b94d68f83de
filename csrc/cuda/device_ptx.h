// SPDX-License-Identifier: Apache-2.0
// The primitives of device.h as PTX and intrinsics. Float operations are single and rounded to
// nearest, whatever -fmad says, because the order of additions is part of what the kernels promise.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#define SMOOTHROT_DEVICE __device__ __forceinline__
// Threads of a block at most and, optionally, blocks that a multiprocessor must hold.
#define SMOOTHROT_KERNEL(...) static __global__ void __launch_bounds__(__VA_ARGS__)

namespace smoothrot::cuda {

// From sm_90 on ptxas replaces an int4 MMA with a call to some 200 instructions.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool kNativeInt4 = false;
#else
constexpr bool kNativeInt4 = true;
#endif

SMOOTHROT_DEVICE int thread_index() { return int(threadIdx.x); }
// The same, opaque to the compiler: what follows from it is computed anew and not kept in
// registers.
SMOOTHROT_DEVICE int thread_index_anew() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}
SMOOTHROT_DEVICE int block_index_x() { return int(blockIdx.x); }
SMOOTHROT_DEVICE int block_index_y() { return int(blockIdx.y); }
SMOOTHROT_DEVICE int block_count_x() { return int(gridDim.x); }
SMOOTHROT_DEVICE int block_threads() { return int(blockDim.x); }
SMOOTHROT_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}
SMOOTHROT_DEVICE void block_barrier() { __syncthreads(); }

// Data that no thread writes during the kernel.
template <class T>
SMOOTHROT_DEVICE T load_global(const T* address) {
  static_assert(sizeof(T) == 16 || sizeof(T) == 8 || sizeof(T) == 4 || sizeof(T) <= 2);
  if constexpr (sizeof(T) == 16) {
    const uint4 v = __ldg(reinterpret_cast<const uint4*>(address));
    return T{{v.x, v.y, v.z, v.w}};
  } else if constexpr (sizeof(T) == 8) {
    const uint2 v = __ldg(reinterpret_cast<const uint2*>(address));
    return T{{v.x, v.y}};
  } else {
    return __ldg(address);
  }
}

// The same for 16 bytes that no other thread wants, past the first-level cache; zeros where not
// `wanted`.
template <class T>
SMOOTHROT_DEVICE T load_once(const T* address, bool wanted) {
  static_assert(sizeof(T) == 16);
  T v = {};
  asm("{ .reg .pred wanted; setp.ne.u32 wanted, %5, 0;\n"
      "  @wanted ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4]; }"
      : "+r"(v.word[0]), "+r"(v.word[1]), "+r"(v.word[2]), "+r"(v.word[3])
      : "l"(address), "r"(uint32_t(wanted)));
  return v;
}

// Data that this kernel writes afterwards.
template <class T>
SMOOTHROT_DEVICE T load_mutable(const T* address) {
  return *address;
}

template <class T>
SMOOTHROT_DEVICE void store_global(T* address, const T& value) {
  *address = value;
}

SMOOTHROT_DEVICE uint32_t shared_address(const void* pointer) {
  return uint32_t(__cvta_generic_to_shared(pointer));
}

// 16 bytes to shared memory, zeros where not `copied`.
SMOOTHROT_DEVICE void copy_async16(void* target, const void* source, bool copied) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(target)),
               "l"(source), "r"(copied ? 16 : 0)
               : "memory");
}
// The same of 4 bytes.
SMOOTHROT_DEVICE void copy_async4(void* target, const void* source, bool copied) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(target)),
               "l"(source), "r"(copied ? 4 : 0)
               : "memory");
}
SMOOTHROT_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Pending>
SMOOTHROT_DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

SMOOTHROT_DEVICE uint32_t shuffle_xor(uint32_t value, int mask) {
  return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
}
SMOOTHROT_DEVICE uint32_t warp_max(uint32_t value) { return __reduce_max_sync(0xFFFFFFFFu, value); }

SMOOTHROT_DEVICE uint32_t float_bits(float value) { return __float_as_uint(value); }
SMOOTHROT_DEVICE float bits_float(uint32_t bits) { return __uint_as_float(bits); }
SMOOTHROT_DEVICE float add(float a, float b) { return __fadd_rn(a, b); }
SMOOTHROT_DEVICE float subtract(float a, float b) { return __fsub_rn(a, b); }
SMOOTHROT_DEVICE float multiply(float a, float b) { return __fmul_rn(a, b); }
SMOOTHROT_DEVICE float divide(float a, float b) { return __fdiv_rn(a, b); }
SMOOTHROT_DEVICE float square_root(float a) { return __fsqrt_rn(a); }
SMOOTHROT_DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
SMOOTHROT_DEVICE float round_to_even(float a) { return rintf(a); }
SMOOTHROT_DEVICE float clamp(float a, float low, float high) { return fminf(fmaxf(a, low), high); }

SMOOTHROT_DEVICE float bf16_float(uint16_t half) { return __uint_as_float(uint32_t(half) << 16); }
SMOOTHROT_DEVICE float f16_float(uint16_t half) { return __half2float(__ushort_as_half(half)); }
SMOOTHROT_DEVICE uint16_t float_bf16(float value) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(value));
}
SMOOTHROT_DEVICE uint16_t float_f16(float value) {
  return __half_as_ushort(__float2half_rn(value));
}

SMOOTHROT_DEVICE uint32_t pick_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  return __byte_perm(low, high, selector);
}

// (value & mask) ^ flip in one instruction; of two constants nvcc makes two.
SMOOTHROT_DEVICE uint32_t and_xor(uint32_t value, uint32_t mask, uint32_t flip) {
  uint32_t out;
  asm("lop3.b32 %0, %1, %2, %3, 0x6A;" : "=r"(out) : "r"(value), "r"(mask), "r"(flip));
  return out;
}

SMOOTHROT_DEVICE void load_matrices(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

// Of 64 inputs, or of 32.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ < 900
SMOOTHROT_DEVICE void mma_s4(int32_t (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, "
      "%9}, {%0, %1, %2, %3};"
      : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
SMOOTHROT_DEVICE void mma_s4(int32_t (&sums)[4], const uint32_t (&a)[2], const uint32_t (&b)[1]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s4.s4.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, "
      "%2, %3};"
      : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(b[0]));
}
#else
// Not on this architecture.
__device__ void mma_s4(int32_t (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
__device__ void mma_s4(int32_t (&sums)[4], const uint32_t (&a)[2], const uint32_t (&b)[1]);
#endif

SMOOTHROT_DEVICE void mma_s8(int32_t (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, "
      "%9}, {%0, %1, %2, %3};"
      : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <class Args>
inline cudaError_t launch(void (*kernel)(Args), int grid_x, int grid_y, int threads,
                          int64_t shared_bytes, cudaStream_t stream, const Args& args) {
  constexpr int64_t kWithoutAsking = 48 * 1024;
  if (shared_bytes > kWithoutAsking) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    if (error != cudaSuccess) {
      (void)cudaGetLastError();
      return error;
    }
  }
  kernel<<<dim3(unsigned(grid_x), unsigned(grid_y)), unsigned(threads), size_t(shared_bytes),
           stream>>>(args);
  return cudaGetLastError();
}

inline int multiprocessors() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 1;
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
    return 1;
  return count;
}

}  // namespace smoothrot::cuda
