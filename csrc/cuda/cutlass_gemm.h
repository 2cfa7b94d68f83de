// SPDX-License-Identifier: Apache-2.0
// Launchers of the CUTLASS kernels: y = (accumulator * channel_scale) * token_scale + bias in
// float32, rounded once. Plain C++ without CUTLASS or torch headers.
#pragma once

#include <cstdint>

namespace smoothrot::cuda {

struct CutlassArgs {
  const void* codes;           // [tokens][inputs]: packed int4 for sm_80, int8 for sm_90
  const void* weight;          // [outputs][inputs]: packed int4, or int8 for sm_90_s8
  const float* token_scale;    // [tokens]
  const float* channel_scale;  // [outputs]
  const void* bias;            // [outputs] in the dtype of `out`, or null
  void* out;                   // [tokens][outputs], rows `pitch` apart
  int32_t tokens, outputs, inputs;
  int32_t pitch;  // a multiple of 8; `outputs` for sm_80
  bool bfloat16;  // dtype of `out`, else float16
  int32_t multiprocessors;
  void* stream;  // cudaStream_t
};

// Each returns null, or what went wrong. Nothing is allocated, nothing waits for the device.
using CutlassLauncher = const char* (*)(const CutlassArgs&);

const char* cutlass_sm80_32x64(const CutlassArgs& args);
const char* cutlass_sm80_64x128(const CutlassArgs& args);
const char* cutlass_sm80_128x128(const CutlassArgs& args);
const char* cutlass_sm80_128x256(const CutlassArgs& args);

const char* cutlass_sm90_128x32(const CutlassArgs& args);
const char* cutlass_sm90_128x64(const CutlassArgs& args);
const char* cutlass_sm90_128x128(const CutlassArgs& args);

const char* cutlass_sm90_s8_128x64(const CutlassArgs& args);
const char* cutlass_sm90_s8_128x128(const CutlassArgs& args);
const char* cutlass_sm90_s8_128x256(const CutlassArgs& args);

}  // namespace smoothrot::cuda
