// SPDX-License-Identifier: Apache-2.0
#include "dispatch.h"

#include <algorithm>
#include <atomic>
#include <sstream>

namespace smoothrot::cuda {
namespace {

using Family = GemmKernel::Family;

constexpr int64_t kCutlassOutputs = 8;  // a 16-byte store of 16-bit outputs
constexpr int64_t kMostInt32 = INT32_MAX;

// The first of a hand-written family chooses its own width; of CUTLASS tiles the largest come
// first. The build defines SMOOTHROT_SM80 and SMOOTHROT_SM90 for the families it compiles.
constexpr GemmKernel kKernels[] = {
    {"small", Family::small},
    {"small_narrow", Family::small, Width::narrow},
    {"small_medium", Family::small, Width::medium},
    {"small_wide", Family::small, Width::wide},
    {"s8", Family::s8},
    {"s8_narrow", Family::s8, Width::narrow},
    {"s8_wide", Family::s8, Width::wide},
#ifdef SMOOTHROT_SM80
    {"cutlass_sm80_128x256", Family::sm80, Width::automatic, cutlass_sm80_128x256, 128, 256},
    {"cutlass_sm80_128x128", Family::sm80, Width::automatic, cutlass_sm80_128x128, 128, 128},
    {"cutlass_sm80_64x128", Family::sm80, Width::automatic, cutlass_sm80_64x128, 64, 128},
    {"cutlass_sm80_32x64", Family::sm80, Width::automatic, cutlass_sm80_32x64, 32, 64},
#endif
#ifdef SMOOTHROT_SM90
    {"cutlass_sm90_128x128", Family::sm90, Width::automatic, cutlass_sm90_128x128, 128, 128},
    {"cutlass_sm90_128x64", Family::sm90, Width::automatic, cutlass_sm90_128x64, 64, 128},
    {"cutlass_sm90_128x32", Family::sm90, Width::automatic, cutlass_sm90_128x32, 32, 128},
    {"cutlass_sm90_s8_128x256", Family::sm90_s8, Width::automatic, cutlass_sm90_s8_128x256, 256,
     128},
    {"cutlass_sm90_s8_128x128", Family::sm90_s8, Width::automatic, cutlass_sm90_s8_128x128, 128,
     128},
    {"cutlass_sm90_s8_128x64", Family::sm90_s8, Width::automatic, cutlass_sm90_s8_128x64, 64, 128},
#endif
};

struct NamedWidth {
  const char* name;
  Width width;
};
constexpr NamedWidth kExperts[] = {{"experts_narrow", Width::narrow},
                                   {"experts_wide", Width::wide}};

std::atomic<const GemmKernel*> forced_kernel{nullptr};
std::atomic<Width> forced_experts{Width::automatic};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

const GemmKernel& first_of(Family family) {
  const GemmKernel* kernel = kKernels;
  while (kernel->family != family) ++kernel;
  return *kernel;
}

// Outputs of a launch: those that are expanded at a time, or all.
int64_t launch_outputs(Family family, const GemmArgs& args) {
  if (family != Family::sm90_s8 || !args.group_scale) return args.outputs;
  const int64_t tiles = kExpandedBytes / args.inputs / kTileOutputs;
  return std::min(args.outputs, std::max(tiles, int64_t{1}) * kTileOutputs);
}

// Of the family's tiles that the tokens fill at least half, the largest whose grid gives every
// multiprocessor a block, or the smallest: idle multiprocessors cost more than the operand traffic
// that larger tiles save.
const GemmKernel& choose_tile(Family family, const GpuFacts& gpu, const GemmArgs& args) {
  const GemmKernel* smallest = nullptr;
  const int64_t outputs = launch_outputs(family, args);
  for (const GemmKernel& tile : kKernels) {
    if (tile.family != family) continue;
    const int64_t blocks = ceil_div(args.tokens, tile.tokens) * ceil_div(outputs, tile.outputs);
    if (2 * args.tokens > tile.tokens && blocks >= gpu.multiprocessors) return tile;
    smallest = &tile;
  }
  return *smallest;
}

// Empty, or what a CUTLASS kernel would need.
std::string cutlass_obstacle(const GemmArgs& args) {
  const bool one_dtype = !args.bias || args.bias_dtype == args.out_dtype;
  if (args.out_dtype == Float::f32 || !one_dtype) return "16-bit outputs and a bias of their dtype";
  if (args.outputs % kCutlassOutputs) return "outputs in multiples of 8";
  if (args.tokens > kMostInt32 || args.outputs > kMostInt32)
    return "tokens and outputs that int32 holds";
  return "";
}

CutlassArgs cutlass_args(const GpuFacts& gpu, const GemmArgs& g, cudaStream_t stream) {
  return {g.codes,
          g.weight,
          g.scale,
          g.weight_scale,
          g.bias,
          g.out,
          int32_t(g.tokens),
          int32_t(g.outputs),
          int32_t(g.inputs),
          int32_t(g.outputs),
          g.out_dtype == Float::bf16,
          gpu.multiprocessors,
          stream};
}

// Expands and multiplies one part of the outputs after the other.
const char* run_expanded(CutlassLauncher launch, const GpuFacts& gpu, const GemmArgs& g,
                         void* workspace, cudaStream_t stream) {
  constexpr int64_t kHalf = 2;  // bytes of an output and a bias
  const int64_t part = launch_outputs(Family::sm90_s8, g);
  for (int64_t first = 0; first < g.outputs; first += part) {
    const int64_t count = std::min(part, g.outputs - first);
    const cudaError_t error = expand_weight(g, first, count, workspace, stream);
    if (error != cudaSuccess) return error_text(error);
    CutlassArgs args = cutlass_args(gpu, g, stream);
    args.weight = workspace;
    args.channel_scale += first;
    if (g.bias) args.bias = static_cast<const char*>(g.bias) + first * kHalf;
    args.out = static_cast<char*>(g.out) + first * kHalf;
    args.outputs = int32_t(count);
    if (const char* problem = launch(args)) return problem;
  }
  return nullptr;
}

}  // namespace

std::string GemmKernel::obstacle(const GpuFacts& gpu, const GemmArgs& args) const {
  const bool packed = args.weight_form == Codes::packed_int4;
  switch (family) {
    case Family::small:
      return args.tokens <= kSmallGemmTokens ? "" : "at most 16 tokens";
    case Family::s8:
      return "";
    case Family::sm80:
      if (gpu.capability >= 90) return "a GPU of sm_80 to sm_89";
      if (args.form != Codes::packed_int4) return "4-bit activations, packed";
      if (!packed || args.group_scale) return "4-bit weights without groups";
      return cutlass_obstacle(args);
    default:
      if (gpu.capability != 90) return "a GPU of sm_90";
      if (args.form != Codes::int8) return "activation codes of a byte each";
      if (family == Family::sm90 && (!packed || args.group_scale))
        return "4-bit weights without groups";
      if (family == Family::sm90_s8 && packed && !args.group_scale)
        return "8-bit weights, or 4-bit ones with groups";
      return cutlass_obstacle(args);
  }
}

Codes activation_form(const GpuFacts& gpu, int bits, int64_t tokens) {
  const GemmKernel* forced = forced_kernel.load();
  const bool as_bytes =
      forced && (forced->family == Family::sm90 || forced->family == Family::sm90_s8);
  const bool packed = gpu.capability < 90 || (tokens <= kSmallGemmTokens && !as_bytes);
  return bits == 4 && packed ? Codes::packed_int4 : Codes::int8;
}

const GemmKernel& choose_gemm(const GpuFacts& gpu, const GemmArgs& args) {
  if (const GemmKernel* forced = forced_kernel.load()) return *forced;
  const GemmKernel& small = first_of(Family::small);
  if (small.obstacle(gpu, args).empty()) return small;
  const bool expands = args.group_scale && args.tokens >= kExpandTokens;
  for (const GemmKernel& tile : kKernels) {
    if (!tile.launch || !tile.obstacle(gpu, args).empty()) continue;
    if (!args.group_scale || expands) return choose_tile(tile.family, gpu, args);
  }
  return first_of(Family::s8);
}

int64_t GemmKernel::workspace_bytes(const GemmArgs& g) const {
  return family == Family::sm90_s8 && g.group_scale ? launch_outputs(family, g) * g.inputs : 0;
}

const char* GemmKernel::run(const GpuFacts& gpu, const GemmArgs& g, void* workspace,
                            cudaStream_t stream) const {
  if (!launch) {
    const cudaError_t error =
        family == Family::small ? gemm_small(g, stream, width) : gemm_s8(g, stream, width);
    return error == cudaSuccess ? nullptr : error_text(error);
  }
  return workspace_bytes(g) ? run_expanded(launch, gpu, g, workspace, stream)
                            : launch(cutlass_args(gpu, g, stream));
}

Width experts_width() { return forced_experts.load(); }

std::string gemm_names() {
  std::string names;
  for (const GemmKernel& kernel : kKernels) names += std::string(kernel.name) + " ";
  for (const NamedWidth& experts : kExperts) names += std::string(experts.name) + " ";
  names.pop_back();
  return names;
}

bool force_gemm(const std::string& name) {
  const GemmKernel* kernel = nullptr;
  Width width = Width::automatic;
  for (const GemmKernel& one : kKernels) kernel = one.name == name ? &one : kernel;
  for (const NamedWidth& one : kExperts) width = one.name == name ? one.width : width;
  if (!name.empty() && !kernel && width == Width::automatic) return false;
  forced_kernel = kernel;
  forced_experts = width;
  return true;
}

bool architecture_runs(const std::string& architectures, int capability) {
  std::istringstream list(architectures);
  for (std::string one; list >> one;) {
    const int number = std::stoi(one);
    const bool own_only = one.find_first_not_of("0123456789") != std::string::npos;
    if (own_only ? number == capability : number / 10 == capability / 10 && number <= capability)
      return true;
  }
  return false;
}

}  // namespace smoothrot::cuda
