// SPDX-License-Identifier: Apache-2.0
// Packed int4 or int8 weights x int8 activation codes on sm_90a, CUTLASS 3.x. The weights are
// operand A, so the product computed is the transpose: rows are outputs, columns are tokens. Packed
// ones are widened to int8 in registers on their way to wgmma, which takes that operand alone from
// there; int8 ones go there from shared memory.
//
// Weights with group scales come as int8, multiplied by them beforehand (expand_weight). CUTLASS
// could scale them on their way: its mixed-input loop takes a scale for each row and tile of K. But
// it multiplies byte by byte where one instruction takes four, and refuses a group that is smaller
// than the tile (can_implement): for groups of 32 a barrier and a TMA copy for each wgmma.
#pragma once

// clang-format off: visitors and builders use what earlier headers declare, but do not include it.
#include "cutlass_sm90_compute.h"

#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <cutlass/util/packed_stride.hpp>
// clang-format on

#include "cutlass_gemm.h"

namespace smoothrot::cuda::sm90 {

using cute::_0;
using cute::_1;

template <typename Weight, typename Tile, typename Out>
struct Gemm {
  // Two consumer warpgroups share a tile.
  using MainloopSchedule = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
  using EpilogueSchedule = cutlass::epilogue::TmaWarpSpecializedCooperative;
  using Cluster = cute::Shape<_1, _1, _1>;
  using RowMajor = cutlass::layout::RowMajor;
  using ColumnMajor = cutlass::layout::ColumnMajor;
  static constexpr int kAlignWeight = 128 / cutlass::sizeof_bits<Weight>::value;
  static constexpr int kAlignCodes = 16;
  static constexpr int kAlignOut = 8;

  template <typename Node, typename... Children>
  using Tree = cutlass::epilogue::fusion::Sm90EVT<Node, Children...>;
  template <typename Element>
  using PerOutput = cutlass::epilogue::fusion::Sm90ColBroadcast<0, Tile, Element, float,
                                                                cute::Stride<_1, _0, int64_t>>;
  using PerToken = cutlass::epilogue::fusion::Sm90RowBroadcast<0, Tile, float, float,
                                                               cute::Stride<_0, _1, int64_t>>;
  using Accumulator = cutlass::epilogue::fusion::Sm90AccFetch;

  using ChannelScaled = Tree<ScaleNode, Accumulator, PerOutput<float>>;
  using Scaled = Tree<ScaleNode, ChannelScaled, PerToken>;
  using Biased = Tree<BiasNode<Out>, Scaled, PerOutput<Out>>;

  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, int32_t, float, void, ColumnMajor, kAlignOut,
      Out, ColumnMajor, kAlignOut, EpilogueSchedule, Biased>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Weight, RowMajor, kAlignWeight, int8_t,
      ColumnMajor, kAlignCodes, int32_t, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<int(
          sizeof(typename Epilogue::SharedStorage))>,
      MainloopSchedule>::CollectiveOp;
  using Kernel =
      cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue>;
  using Device = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  static cutlass::Status run(const CutlassArgs& a) {
    const auto weight_stride =
        cutlass::make_cute_packed_stride(typename Kernel::StrideA{}, {a.outputs, a.inputs, 1});
    const auto codes_stride =
        cutlass::make_cute_packed_stride(typename Kernel::StrideB{}, {a.tokens, a.inputs, 1});
    const auto out_stride =
        cutlass::make_cute_packed_stride(typename Kernel::StrideD{}, {a.pitch, a.tokens, 1});
    const typename ChannelScaled::Arguments channel_scaled{{}, {a.channel_scale, 1.0f, {}}, {}};
    const typename Scaled::Arguments scaled{channel_scaled, {a.token_scale, 1.0f, {}}, {}};
    const typename Biased::Arguments biased{
        scaled, {static_cast<const Out*>(a.bias), Out(0), {}}, {}};
    cutlass::KernelHardwareInfo hardware;
    hardware.sm_count = a.multiprocessors;
    const typename Device::Arguments arguments{
        cutlass::gemm::GemmUniversalMode::kGemm,
        {a.outputs, a.tokens, a.inputs, 1},
        {static_cast<const Weight*>(a.weight), weight_stride, static_cast<const int8_t*>(a.codes),
         codes_stride},
        {biased, nullptr, {}, static_cast<Out*>(a.out), out_stride},
        hardware};
    if (Device::get_workspace_size(arguments)) return cutlass::Status::kErrorWorkspaceNull;
    Device gemm;
    const auto stream = static_cast<cudaStream_t>(a.stream);
    const cutlass::Status status = gemm.initialize(arguments, nullptr, stream);
    return status == cutlass::Status::kSuccess ? gemm.run(stream) : status;
  }
};

// Tiles of 128 outputs by `Tokens`.
template <typename Weight, int Tokens>
const char* launch(const CutlassArgs& a) {
  using Tile = cute::Shape<cute::_128, cute::Int<Tokens>, cute::_128>;
  const cutlass::Status status = a.bfloat16 ? Gemm<Weight, Tile, cutlass::bfloat16_t>::run(a)
                                            : Gemm<Weight, Tile, cutlass::half_t>::run(a);
  return status == cutlass::Status::kSuccess ? nullptr : cutlass::cutlassGetStatusString(status);
}

}  // namespace smoothrot::cuda::sm90
