// SPDX-License-Identifier: Apache-2.0
// One fault for each tool of compute-sanitizer that sanitizer.py uses: a tool that does not
// find its own proves nothing by silence. Named as the project's kernels are, so that the filters
// by name are tried as well.
#include <cstdio>
#include <cstring>

namespace smoothrot::cuda {

// One thread writes past the end of the allocation.
template <int Threads>
static __global__ void planted_memcheck(int* out, int count) {
  if (threadIdx.x <= count) out[threadIdx.x] = Threads;
}

// A thread reads what another warp's writes, with no barrier between.
template <int Threads>
static __global__ void planted_racecheck(int* out, int) {
  __shared__ volatile int shared[Threads];
  shared[threadIdx.x] = int(threadIdx.x);
  out[threadIdx.x % 32] = shared[Threads - 1 - threadIdx.x];
}

// Half of a warp meets a barrier that the other half does not.
template <int Threads>
static __global__ void planted_synccheck(int* out, int count) {
  if (threadIdx.x < 16) {
    __syncthreads();
    out[threadIdx.x] = count;
  }
}

}  // namespace smoothrot::cuda

int main(int argc, char** argv) {
  using namespace smoothrot::cuda;
  constexpr int kThreads = 64, kCount = 32;
  int* out = nullptr;
  if (argc != 2 || cudaMalloc(&out, kCount * sizeof(int)) != cudaSuccess) return 3;
  if (!std::strcmp(argv[1], "memcheck")) planted_memcheck<kThreads><<<1, kThreads>>>(out, kCount);
  if (!std::strcmp(argv[1], "racecheck")) planted_racecheck<kThreads><<<1, kThreads>>>(out, kCount);
  if (!std::strcmp(argv[1], "synccheck")) planted_synccheck<kThreads><<<1, kThreads>>>(out, kCount);
  std::printf("%s\n", cudaGetErrorString(cudaDeviceSynchronize()));
  return 0;
}
