// SPDX-License-Identifier: Apache-2.0
// The arithmetic of the sm_80 CUTLASS epilogue on the host: sums, scales and biases from standard input, both 16-bit
// results to standard output. Arrays of `count` values, in eights as the kernels take them.
// clang-format off: declares blockIdx, which nvcc knows and CUTLASS's headers name.
#include <cuda_runtime.h>
#include <device_launch_parameters.h>
// clang-format on

#include <cstdint>
#include <cstdio>
#include <vector>

#include "../../csrc/cuda/cutlass_sm80_compute.h"

namespace {

constexpr int kFragment = 8;
template <typename T>
using Fragment = cutlass::Array<T, kFragment>;

template <typename T>
std::vector<Fragment<T>> read(size_t fragments) {
  std::vector<Fragment<T>> values(fragments);
  if (std::fread(values.data(), sizeof(Fragment<T>), fragments, stdin) != fragments) throw 1;
  return values;
}

template <typename Out>
void epilogue(const std::vector<Fragment<int32_t>>& sums, const std::vector<Fragment<float>>& channel,
              const std::vector<Fragment<float>>& token, const std::vector<Fragment<Out>>& bias) {
  using namespace smoothrot::cuda::sm80;
  typename ScaleNode::Callbacks scale;
  typename BiasNode<Out>::Callbacks add;
  for (size_t i = 0; i < sums.size(); ++i) {
    const Fragment<float> channel_scaled = scale.visit(0, 0, 0, 0, sums[i], sums[i], channel[i]);
    const Fragment<float> scaled = scale.visit(0, 0, 0, 0, sums[i], channel_scaled, token[i]);
    const Fragment<Out> y = add.visit(0, 0, 0, 0, sums[i], scaled, bias[i]);
    std::fwrite(&y, sizeof(y), 1, stdout);
  }
}

}  // namespace

int main() {
  int64_t count = 0;
  if (std::fread(&count, sizeof(count), 1, stdin) != 1 || count % kFragment) return 1;
  const size_t fragments = size_t(count / kFragment);
  const auto sums = read<int32_t>(fragments);
  const auto channel = read<float>(fragments), token = read<float>(fragments);
  const auto half_bias = read<cutlass::half_t>(fragments);
  const auto bfloat_bias = read<cutlass::bfloat16_t>(fragments);
  epilogue<cutlass::half_t>(sums, channel, token, half_bias);
  epilogue<cutlass::bfloat16_t>(sums, channel, token, bfloat_bias);
}
