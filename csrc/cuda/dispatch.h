// SPDX-License-Identifier: Apache-2.0
// Which kernel multiplies: decided from numbers alone, so that it can be tested without a GPU.
#pragma once

#include <string>

#include "cutlass_gemm.h"
#include "launch.h"

namespace smoothrot::cuda {

enum class GemmKernel {
  small,
  s8,
  sm80_32x64,
  sm80_64x128,
  sm80_128x128,
  sm80_128x256,
  sm90_128x32,
  sm90_128x64,
  sm90_128x128,
};

// A CUTLASS kernel's tile: tokens x outputs, whichever of the two it calls rows.
struct CutlassTile {
  GemmKernel kernel;
  const char* name;
  CutlassLauncher launch;
  int tokens, outputs;
};

struct GpuFacts {
  int capability;  // 10 * major + minor
  int multiprocessors;
};

// How the activations of a fused linear layer are best quantised: gemm_small takes packed codes everywhere, and they
// are half as many bytes.
Codes activation_form(const GpuFacts& gpu, int bits, int64_t tokens);

GemmKernel choose_gemm(const GpuFacts& gpu, const GemmArgs& args);

const char* gemm_name(GemmKernel kernel);

// Null, or what went wrong.
const char* run_gemm(GemmKernel kernel, const GpuFacts& gpu, const GemmArgs& args, cudaStream_t stream);

// Text of a CUDA error; defined where the CUDA runtime is.
const char* error_text(cudaError_t error);

// Whether one of the machine-code architectures of this build ("80 90a 100 120") runs on the device: sm_XY runs on
// every X.Z with Z >= Y, and one with a suffix on its own capability only.
bool architecture_runs(const std::string& architectures, int capability);

}  // namespace smoothrot::cuda
