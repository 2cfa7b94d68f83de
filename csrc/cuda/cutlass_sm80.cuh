// SPDX-License-Identifier: Apache-2.0
// int4 x int4 with the native m16n8k64 of sm_80 to sm_89, CUTLASS 2.x. Both scales, the bias and
// the rounding are nodes of an epilogue visitor tree, so that no int32 result is ever written to
// memory.
#pragma once

// clang-format off: visitors.hpp uses what the others declare, but does not include them.
#include <cutlass/gemm/kernel/default_gemm_universal_with_visitor.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/epilogue/threadblock/fusion/visitors.hpp>
// clang-format on

#include "cutlass_gemm.h"
#include "cutlass_sm80_compute.h"

namespace smoothrot::cuda::sm80 {

using cute::_0;
using cute::_1;
template <int M, int N, int K>
using Shape = cutlass::gemm::GemmShape<M, N, K>;

template <typename Tile, typename Warp, int Stages, typename Out>
struct Gemm {
  using Int4 = cutlass::int4b_t;
  using Row = cutlass::layout::RowMajor;
  static constexpr int kAlignInt4 = 32;
  static constexpr int kAlignOut = 8;

  using Threads =
      cutlass::epilogue::threadblock::OutputTileThreadLayout<Tile, Warp, Out, kAlignOut, 1>;
  template <typename Element>
  using PerColumn =
      cutlass::epilogue::threadblock::VisitorRowBroadcast<Threads, Element,
                                                          cute::Stride<_0, _1, int32_t>>;
  using PerToken =
      cutlass::epilogue::threadblock::VisitorColBroadcast<Threads, float,
                                                          cute::Stride<_1, _0, int32_t>>;
  using Accumulator = cutlass::epilogue::threadblock::VisitorAccFetch;
  using Store = cutlass::epilogue::threadblock::VisitorAuxStore<
      Threads, Out, cutlass::FloatRoundStyle::round_to_nearest, cute::Stride<int64_t, _1, int64_t>>;
  template <typename Node, typename... Children>
  using Tree = cutlass::epilogue::threadblock::Sm80EVT<Node, Children...>;

  using ChannelScaled = Tree<ScaleNode, Accumulator, PerColumn<float>>;
  using Scaled = Tree<ScaleNode, ChannelScaled, PerToken>;
  using Biased = Tree<BiasNode<Out>, Scaled, PerColumn<Out>>;
  using Epilogue = Tree<Store, Biased>;

  using Kernel = typename cutlass::gemm::kernel::DefaultGemmWithVisitor<
      Int4, Row, cutlass::ComplexTransform::kNone, kAlignInt4, Int4, cutlass::layout::ColumnMajor,
      cutlass::ComplexTransform::kNone, kAlignInt4, Out, Row, kAlignOut, int32_t, float,
      cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80, Tile, Warp, Shape<16, 8, 64>, Epilogue,
      cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<>, Stages,
      cutlass::arch::OpMultiplyAddSaturate, 1>::GemmKernel;
  using Device = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  static typename Device::Arguments arguments(const CutlassArgs& a) {
    const typename ChannelScaled::Arguments channel_scaled{{}, {a.channel_scale, 1.0f, {}}, {}};
    const typename Scaled::Arguments scaled{channel_scaled, {a.token_scale, 1.0f, {}}, {}};
    const typename Biased::Arguments biased{
        scaled, {static_cast<const Out*>(a.bias), Out(0), {}}, {}};
    const int64_t outputs = a.outputs;
    const typename Epilogue::Arguments epilogue{biased,
                                                {static_cast<Out*>(a.out), {outputs, _1{}, 0}}};
    return {cutlass::gemm::GemmUniversalMode::kGemm,
            {a.tokens, a.outputs, a.inputs},
            1,
            epilogue,
            const_cast<void*>(a.codes),
            const_cast<void*>(a.weight),
            nullptr,
            nullptr,
            0,
            0,
            0,
            0,
            a.inputs,
            a.inputs,
            0,
            0};
  }

  static cutlass::Status run(const CutlassArgs& a) {
    Device gemm;
    const auto stream = static_cast<cudaStream_t>(a.stream);
    const cutlass::Status status = gemm.initialize(arguments(a), nullptr, stream);
    return status == cutlass::Status::kSuccess ? gemm.run(stream) : status;
  }
};

template <typename Tile, typename Warp, int Stages>
const char* launch(const CutlassArgs& a) {
  const cutlass::Status status = a.bfloat16 ? Gemm<Tile, Warp, Stages, cutlass::bfloat16_t>::run(a)
                                            : Gemm<Tile, Warp, Stages, cutlass::half_t>::run(a);
  return status == cutlass::Status::kSuccess ? nullptr : cutlass::cutlassGetStatusString(status);
}

}  // namespace smoothrot::cuda::sm80
