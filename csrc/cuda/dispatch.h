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

// Weights are expanded and multiplied by so many at a time: what the second-level cache of sm_90,
// 50 MB, holds beside activations, so that most are read from there. It bounds the memory, too.
constexpr int64_t kExpandedBytes = 32 << 20;
constexpr int64_t kTileOutputs = 128;  // of a tile on sm_90

// Tokens from which expanding a weight with groups pays on sm_90. It moves 1.5 bytes a weight, 0.45
// ps by the data sheet of an H100. A token then costs 1 fs a weight at the full rate of wgmma, and
// 4.5 fs with gemm_s8, which unpacking keeps busy there 144 cycles where its MMAs need 64: even at
// 130 tokens, before the launches, of which there are two or more. Reckoned, never measured.
constexpr int64_t kExpandTokens = 256;

struct GemmKernel {
  // sm90 takes packed weights without groups; sm90_s8 those of 8 bits, and expands those with
  // groups to them.
  enum class Family { small, s8, sm80, sm90, sm90_s8 };

  const char* name;
  Family family;
  Width width = Width::automatic;    // small and s8
  CutlassLauncher launch = nullptr;  // the others
  int tokens = 0, outputs = 0;       // a CUTLASS tile, whichever of the two it calls rows

  // Memory that run needs for weights on their way, at most kExpandedBytes or what kTileOutputs of
  // them take.
  int64_t workspace_bytes(const GemmArgs& args) const;
  // Null, or what went wrong. `workspace` may be used again by what follows on the stream.
  const char* run(const GpuFacts& gpu, const GemmArgs& args, void* workspace,
                  cudaStream_t stream) const;
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
