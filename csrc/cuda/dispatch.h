// SPDX-License-Identifier: Apache-2.0
// Which kernel multiplies: decided from numbers alone, so that it can be tested without a GPU.
#pragma once

#include <string>

#include "cutlass_gemm.h"
#include "launch.h"

namespace smoothrot::cuda {

struct GpuFacts {
  int capability;  // 10 * major + minor
  int multiprocessors;
};

struct GemmKernel {
  enum class Family { small, s8, sm80, sm90 };

  const char* name;
  Family family;
  Width width = Width::automatic;    // small and s8
  CutlassLauncher launch = nullptr;  // sm80 and sm90
  int tokens = 0, outputs = 0;       // a CUTLASS tile, whichever of the two it calls rows

  // Null, or what went wrong.
  const char* run(const GpuFacts& gpu, const GemmArgs& args, cudaStream_t stream) const;
  // What keeps it from computing these on this GPU; empty if nothing does.
  std::string obstacle(const GpuFacts& gpu, const GemmArgs& args) const;
};

// How the activations of a fused linear layer are best quantized: gemm_small takes packed codes
// everywhere, and they are half as many bytes.
Codes activation_form(const GpuFacts& gpu, int bits, int64_t tokens);

const GemmKernel& choose_gemm(const GpuFacts& gpu, const GemmArgs& args);

// Forced or automatic.
Width experts_width();

// Every kernel of this build that multiplies, a name for each tile, with spaces between them.
std::string gemm_names();

// From now on every product is the named kernel's; an empty name gives the choice back. For tests,
// which so reach each kernel at any size. Names of gemm_experts leave the other products alone.
// False for a name that gemm_names lacks.
bool force_gemm(const std::string& name);

// Text of a CUDA error; defined where the CUDA runtime is.
const char* error_text(cudaError_t error);

// Whether one of the machine-code architectures of this build ("80 90a 100 120") runs on the
// device: sm_XY runs on every X.Z with Z >= Y, and one with a suffix on its own capability only.
bool architecture_runs(const std::string& architectures, int capability);

}  // namespace smoothrot::cuda
