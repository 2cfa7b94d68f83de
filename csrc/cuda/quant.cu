// SPDX-License-Identifier: Apache-2.0
// Launchers of the quantize kernels.
#include "quant_kernels.h"
#include "rotate_kernels.h"

namespace smoothrot::cuda {
namespace {

// Blocks that loop over rows, so that each reads the signs of a base matrix once for several.
constexpr int kBlocksPerMultiprocessor = 4;

constexpr int log2_of(int64_t value) { return value > 1 ? 1 + log2_of(value / 2) : 0; }

bool rotates_in_shared_memory(const Rotation& h) { return h.base > 1 || h.power > kVector; }

bool valid(const QuantArgs& q) {
  const Rotation& h = q.rotation;
  const bool rotation =
      h.power == 0 ||
      ((h.base == 1 || (h.base > kVector && h.base <= kMostBase && h.base % 4 == 0)) &&
       (h.power & (h.power - 1)) == 0 && q.inputs % (h.base * h.power) == 0 &&
       (h.base == 1 || h.signs));
  return rotation && q.inputs > 0 && q.inputs <= most_rotated_inputs(h.base) &&
         q.inputs % kInputMultiple == 0 && q.tokens >= 0 && q.tokens <= INT32_MAX / 2 &&
         (q.bits == 4 || (q.bits == 8 && q.form == Codes::int8));
}

RowArgs row_args(const QuantArgs& q) {
  RowArgs a{};
  a.q = q;
  a.zero_scale = float(1.0 / double(q.norm));
  a.mean_factor = float(1.0 / double(q.inputs));
  const Rotation& h = q.rotation;
  a.power_log2 = log2_of(h.power);
  const int in_registers = h.base == 1 && a.power_log2 > 3 ? 3 : 0;
  const int before = a.power_log2 - in_registers;
  a.first_stages = before < 3 ? before : 3;
  a.middle_stages = before - a.first_stages;
  a.padding = h.base > 1 && h.power < 32 ? 0 : kPadding;
  a.sign_pitch = int((h.base + kVector - 1) / kVector);
  a.sign_pitch_inverse = uint32_t(((int64_t{1} << 32) + a.sign_pitch - 1) / a.sign_pitch);
  return a;
}

// Threads for `units` of eight values with at most `units_per_thread` each, or 0 where a block has
// too few.
int threads_for(int64_t units, int units_per_thread) {
  const int64_t threads = (units + units_per_thread - 1) / units_per_thread;
  const int64_t whole_warps = (threads + kWarp - 1) / kWarp * kWarp;
  return whole_warps <= kMostThreads ? int(whole_warps) : 0;
}

struct RowKernel {
  const char* name;
  Source source;
  bool rotates;  // in shared memory
  Base base;
  int units;  // of eight values, of a thread
  void (*kernel)(RowArgs);
};

#define ROW_KERNELS(source, units)                                                                 \
  {"quant_" #source "_" #units,      Source::source, false, Base::none, units,                     \
   quant_rows<Source::source, units>},                                                             \
      {"rotate_" #source "_" #units,                                                               \
       Source::source,                                                                             \
       true,                                                                                       \
       Base::none,                                                                                 \
       units,                                                                                      \
       rotate_rows<Source::source, units, Base::none>},                                            \
      {"rotate_" #source "_" #units "_floats",          Source::source, true, Base::floats, units, \
       rotate_rows<Source::source, units, Base::floats>},                                          \
  {                                                                                                \
    "rotate_" #source "_" #units "_words", Source::source, true, Base::words, units,               \
        rotate_rows<Source::source, units, Base::words>                                            \
  }

const RowKernel kRowKernels[] = {
    ROW_KERNELS(plain, 1),    ROW_KERNELS(plain, 2),    ROW_KERNELS(plain, 4),
    ROW_KERNELS(plain, 8),    ROW_KERNELS(silu_mul, 1), ROW_KERNELS(silu_mul, 2),
    ROW_KERNELS(silu_mul, 4), ROW_KERNELS(silu_mul, 8),
};
#undef ROW_KERNELS

struct NormKernel {
  const char* name;
  int sweeps;  // of a block over the row
  void (*kernel)(RowArgs);
};

const NormKernel kNormKernels[] = {
    {"rms_norm_1", 1, rms_norm_rows<1>},    {"rms_norm_2", 2, rms_norm_rows<2>},
    {"rms_norm_4", 4, rms_norm_rows<4>},    {"rms_norm_8", 8, rms_norm_rows<8>},
    {"rms_norm_16", 16, rms_norm_rows<16>},
};

int64_t units_of(const QuantArgs& q) {
  const int64_t runs_padded = (q.rotation.base + kVector - 1) / kVector * kVector;
  return q.rotation.base == 1 ? q.inputs / kVector
                              : q.inputs / q.rotation.base * runs_padded / kVector;
}

// The one with the fewest units a thread; null where a block has too few threads for the row.
const RowKernel* find_row_kernel(Source source, const QuantArgs& q) {
  const bool rotates = rotates_in_shared_memory(q.rotation);
  const Base base = rotates ? signs_kept(q.rotation.base) : Base::none;
  for (const RowKernel& k : kRowKernels) {
    const bool suits = k.source == source && k.rotates == rotates && k.base == base;
    if (suits && threads_for(units_of(q), k.units)) return &k;
  }
  return nullptr;
}

const NormKernel* find_norm_kernel(const QuantArgs& q) {
  for (const NormKernel& k : kNormKernels) {
    if (q.inputs <= int64_t{k.sweeps} * kNormThreads * kVector) return &k;
  }
  return nullptr;
}

cudaError_t launch_source(Source source, const QuantArgs& q, cudaStream_t stream) {
  if (!valid(q)) return cudaErrorInvalidValue;
  if (q.tokens == 0) return cudaSuccess;
  const RowKernel* k = find_row_kernel(source, q);
  if (!k) return cudaErrorInvalidValue;
  const int64_t most = int64_t{kBlocksPerMultiprocessor} * multiprocessors();
  const int64_t blocks = k->base == Base::none || q.tokens < most ? q.tokens : most;
  return launch(k->kernel, int(blocks), 1, threads_for(units_of(q), k->units),
                quant_shared_bytes(q), stream, row_args(q));
}

}  // namespace

int64_t quant_shared_bytes(const QuantArgs& q) {
  if (!rotates_in_shared_memory(q.rotation)) return 2 * kReductionBytes + q.inputs;
  const int64_t floats = q.inputs + q.inputs / 32 * kPadding;
  const int64_t bits_of_sign = signs_kept(q.rotation.base) == Base::floats ? 32 : 1;
  return kReductionBytes +
         (floats + sign_words(q.rotation.base) * bits_of_sign) * int64_t{sizeof(uint32_t)};
}

cudaError_t quant(const QuantArgs& args, cudaStream_t stream) {
  return launch_source(Source::plain, args, stream);
}

cudaError_t silu_mul_quant(const QuantArgs& args, cudaStream_t stream) {
  return launch_source(Source::silu_mul, args, stream);
}

cudaError_t rms_norm_quant(const QuantArgs& q, cudaStream_t stream) {
  if (!valid(q) || q.rotation.power != 0) return cudaErrorInvalidValue;
  if (q.tokens == 0) return cudaSuccess;
  const NormKernel* k = find_norm_kernel(q);
  if (!k) return cudaErrorInvalidValue;
  return launch(k->kernel, int(q.tokens), 1, kNormThreads, quant_shared_bytes(q), stream,
                row_args(q));
}

const char* quant_kernel_name(const std::string& producer, const QuantArgs& q) {
  if (!valid(q)) return nullptr;
  if (producer == "rms_norm") {
    const NormKernel* k = q.rotation.power ? nullptr : find_norm_kernel(q);
    return k ? k->name : nullptr;
  }
  if (producer != "plain" && producer != "silu_mul") return nullptr;
  const RowKernel* k = find_row_kernel(producer == "plain" ? Source::plain : Source::silu_mul, q);
  return k ? k->name : nullptr;
}

std::string quant_kernel_names() {
  std::string names;
  for (const RowKernel& k : kRowKernels) names += std::string(k.name) + " ";
  for (const NormKernel& k : kNormKernels) names += std::string(k.name) + " ";
  names.pop_back();
  return names;
}

}  // namespace smoothrot::cuda
