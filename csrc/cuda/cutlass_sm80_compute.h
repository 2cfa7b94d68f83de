// SPDX-License-Identifier: Apache-2.0
// The arithmetic nodes of the sm_80 epilogue, apart from the kernels so that a host program can
// evaluate them.
#pragma once

// clang-format off: visitors.hpp uses what the others declare, but does not include them.
#include <cutlass/cutlass.h>
#include <cutlass/numeric_conversion.h>
#include <cutlass/arch/memory.h>
#include <cutlass/epilogue/thread/activation.h>
#include <cutlass/epilogue/threadblock/default_thread_map_tensor_op.h>
#include <cute/tensor.hpp>
#include <cutlass/epilogue/threadblock/fusion/visitors.hpp>
// clang-format on

namespace smoothrot::cuda::sm80 {

// Float32 throughout: the reference rounds after each of these, so none may be fused (-fmad=false).
template <template <typename> class Operation, typename Output>
using Compute =
    cutlass::epilogue::threadblock::VisitorCompute<Operation, Output, float,
                                                   cutlass::FloatRoundStyle::round_to_nearest>;

using ScaleNode = Compute<cutlass::multiplies, float>;
template <typename Out>
using BiasNode = Compute<cutlass::plus, Out>;

}  // namespace smoothrot::cuda::sm80
