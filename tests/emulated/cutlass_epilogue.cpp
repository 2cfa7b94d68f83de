// SPDX-License-Identifier: Apache-2.0
// The arithmetic of a CUTLASS epilogue on the host, of sm_90a with SMOOTHROT_EPILOGUE_SM90 and else
// of sm_80: sums, scales and biases from standard input, both 16-bit results to standard output.
// Arrays of `count` values, in eights.
// clang-format off: declares blockIdx, which nvcc knows and CUTLASS's headers name.
#include <cuda_runtime.h>
#include <device_launch_parameters.h>
// clang-format on

void __syncthreads();  // named outside templates, never called here

#include <cstdint>
#include <cstdio>
#include <vector>

#ifdef SMOOTHROT_EPILOGUE_SM90
  #include "../../csrc/cuda/cutlass_sm90_compute.h"
using namespace smoothrot::cuda::sm90;
#else
  #include "../../csrc/cuda/cutlass_sm80_compute.h"
using namespace smoothrot::cuda::sm80;
#endif

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

// What a node makes of two inputs; the sums are there for nodes that want them.
template <typename Node, typename Left, typename Right>
auto visit(const Fragment<int32_t>& sums, const Left& left, const Right& right) {
#ifdef SMOOTHROT_EPILOGUE_SM90
  const typename Node::Params params{};
  return typename Node::ConsumerStoreCallbacks(params).visit(sums, 0, 0, 0, left, right);
#else
  return typename Node::Callbacks().visit(0, 0, 0, 0, sums, left, right);
#endif
}

template <typename Out>
void epilogue(const std::vector<Fragment<int32_t>>& sums,
              const std::vector<Fragment<float>>& channel,
              const std::vector<Fragment<float>>& token, const std::vector<Fragment<Out>>& bias) {
  for (size_t i = 0; i < sums.size(); ++i) {
    const Fragment<float> channel_scaled = visit<ScaleNode>(sums[i], sums[i], channel[i]);
    const Fragment<float> scaled = visit<ScaleNode>(sums[i], channel_scaled, token[i]);
    const Fragment<Out> y = visit<BiasNode<Out>>(sums[i], scaled, bias[i]);
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
