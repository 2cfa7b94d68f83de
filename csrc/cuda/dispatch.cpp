// SPDX-License-Identifier: Apache-2.0
#include "dispatch.h"

#include <sstream>

namespace smoothrot::cuda {
namespace {

constexpr int64_t kCutlassOutputs = 8;  // a 16-byte store of 16-bit outputs
constexpr int64_t kMostInt32 = INT32_MAX;

// Largest first. The build defines SMOOTHROT_SM80 and SMOOTHROT_SM90 for the families it compiles.
#ifdef SMOOTHROT_SM80
constexpr CutlassTile kSm80[] = {
    {GemmKernel::sm80_128x256, "cutlass_sm80_128x256", cutlass_sm80_128x256, 128, 256},
    {GemmKernel::sm80_128x128, "cutlass_sm80_128x128", cutlass_sm80_128x128, 128, 128},
    {GemmKernel::sm80_64x128, "cutlass_sm80_64x128", cutlass_sm80_64x128, 64, 128},
    {GemmKernel::sm80_32x64, "cutlass_sm80_32x64", cutlass_sm80_32x64, 32, 64},
};
#endif
#ifdef SMOOTHROT_SM90
constexpr CutlassTile kSm90[] = {
    {GemmKernel::sm90_128x128, "cutlass_sm90_128x128", cutlass_sm90_128x128, 128, 128},
    {GemmKernel::sm90_128x64, "cutlass_sm90_128x64", cutlass_sm90_128x64, 64, 128},
    {GemmKernel::sm90_128x32, "cutlass_sm90_128x32", cutlass_sm90_128x32, 32, 128},
};
#endif

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Of the tiles that the tokens fill at least half, the largest whose grid gives every multiprocessor a block, or the
// smallest: idle multiprocessors cost more than the operand traffic that larger tiles save.
template <size_t Count>
GemmKernel choose_tile(const CutlassTile (&tiles)[Count], const GpuFacts& gpu, const GemmArgs& args) {
  const CutlassTile* chosen = &tiles[Count - 1];
  for (size_t i = Count; i-- > 0;) {
    const CutlassTile& tile = tiles[i];
    const int64_t blocks = ceil_div(args.tokens, tile.tokens) * ceil_div(args.outputs, tile.outputs);
    if (2 * args.tokens > tile.tokens && blocks >= gpu.multiprocessors) chosen = &tile;
  }
  return chosen->kernel;
}

bool fits_cutlass(const GemmArgs& args) {
  const bool one_dtype = !args.bias || args.bias_dtype == args.out_dtype;
  return args.weight_form == Codes::packed_int4 && args.group_size == args.inputs && args.out_dtype != Float::f32 &&
         one_dtype && args.outputs % kCutlassOutputs == 0 && args.inputs % kInputMultiple == 0 &&
         args.tokens <= kMostInt32 && args.outputs <= kMostInt32;
}

const CutlassTile* find_tile(GemmKernel kernel) {
#ifdef SMOOTHROT_SM80
  for (const CutlassTile& tile : kSm80) {
    if (tile.kernel == kernel) return &tile;
  }
#endif
#ifdef SMOOTHROT_SM90
  for (const CutlassTile& tile : kSm90) {
    if (tile.kernel == kernel) return &tile;
  }
#endif
  return nullptr;
}

}  // namespace

Codes activation_form(const GpuFacts& gpu, int bits, int64_t tokens) {
  const bool packed = gpu.capability < 90 || tokens <= kSmallGemmTokens;
  return bits == 4 && packed ? Codes::packed_int4 : Codes::int8;
}

GemmKernel choose_gemm(const GpuFacts& gpu, const GemmArgs& args) {
  if (args.group_size != args.inputs) return GemmKernel::s8;
  if (args.tokens <= kSmallGemmTokens) return GemmKernel::small;
  if (!fits_cutlass(args)) return GemmKernel::s8;
#ifdef SMOOTHROT_SM80
  if (gpu.capability < 90 && args.form == Codes::packed_int4) return choose_tile(kSm80, gpu, args);
#endif
#ifdef SMOOTHROT_SM90
  if (gpu.capability == 90 && args.form == Codes::int8) return choose_tile(kSm90, gpu, args);
#endif
  return GemmKernel::s8;
}

const char* gemm_name(GemmKernel kernel) {
  if (kernel == GemmKernel::small) return "small";
  if (kernel == GemmKernel::s8) return "s8";
  return find_tile(kernel)->name;
}

const char* run_gemm(GemmKernel kernel, const GpuFacts& gpu, const GemmArgs& g, cudaStream_t stream) {
  if (kernel == GemmKernel::small || kernel == GemmKernel::s8) {
    const cudaError_t error = kernel == GemmKernel::small ? gemm_small(g, stream) : gemm_s8(g, stream);
    return error == cudaSuccess ? nullptr : error_text(error);
  }
  return find_tile(kernel)->launch({g.codes, g.weight, g.scale, g.weight_scale, g.bias, g.out, int32_t(g.tokens),
                                    int32_t(g.outputs), int32_t(g.inputs), g.out_dtype == Float::bf16,
                                    gpu.multiprocessors, stream});
}

bool architecture_runs(const std::string& architectures, int capability) {
  std::istringstream list(architectures);
  for (std::string one; list >> one;) {
    const int number = std::stoi(one);
    const bool own_only = one.find_first_not_of("0123456789") != std::string::npos;
    if (own_only ? number == capability : number / 10 == capability / 10 && number <= capability) return true;
  }
  return false;
}

}  // namespace smoothrot::cuda
