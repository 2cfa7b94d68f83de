// SPDX-License-Identifier: Apache-2.0
// The arithmetic nodes of the sm_90a epilogue, apart from the kernels so that a host program can
// evaluate them.
#pragma once

// clang-format off: the visitors use what the earlier headers declare, but do not include them.
#include <cutlass/cutlass.h>
#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp>
// clang-format on

namespace smoothrot::cuda::sm90 {

// Float32 throughout: the reference rounds after each of these, so none may be fused (-fmad=false).
template <template <typename> class Operation, typename Output>
using Compute = cutlass::epilogue::fusion::Sm90Compute<Operation, Output, float,
                                                       cutlass::FloatRoundStyle::round_to_nearest>;

using ScaleNode = Compute<cutlass::multiplies, float>;
template <typename Out>
using BiasNode = Compute<cutlass::plus, Out>;

}  // namespace smoothrot::cuda::sm90
