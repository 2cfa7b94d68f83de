// SPDX-License-Identifier: Apache-2.0
// Launchers of the quantise kernels.
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
       (h.power & (h.power - 1)) == 0 && q.inputs % (h.base * h.power) == 0 && (h.base == 1 || h.signs));
  return rotation && q.inputs > 0 && q.inputs <= most_rotated_inputs(h.base) && q.inputs % kInputMultiple == 0 &&
         q.tokens >= 0 && q.tokens <= INT32_MAX / 2 && (q.bits == 4 || (q.bits == 8 && q.form == Codes::int8));
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

// Threads for `units` of eight values with at most `units_per_thread` each, or 0 where a block has too few.
int threads_for(int64_t units, int units_per_thread) {
  const int64_t threads = (units + units_per_thread - 1) / units_per_thread;
  const int64_t whole_warps = (threads + kWarp - 1) / kWarp * kWarp;
  return whole_warps <= kMostThreads ? int(whole_warps) : 0;
}

template <Source S, int Units>
cudaError_t launch_rows(const RowArgs& a, int threads, cudaStream_t stream) {
  const QuantArgs& q = a.q;
  const int64_t shared = quant_shared_bytes(q);
  if (!rotates_in_shared_memory(q.rotation)) {
    return launch(quant_rows<S, Units>, int(q.tokens), 1, threads, shared, stream, a);
  }
  const int64_t most = int64_t{kBlocksPerMultiprocessor} * multiprocessors();
  const int blocks = int(q.tokens < most ? q.tokens : most);
  switch (signs_kept(q.rotation.base)) {
    case Base::none:
      return launch(rotate_rows<S, Units, Base::none>, int(q.tokens), 1, threads, shared, stream, a);
    case Base::floats:
      return launch(rotate_rows<S, Units, Base::floats>, blocks, 1, threads, shared, stream, a);
    default:
      return launch(rotate_rows<S, Units, Base::words>, blocks, 1, threads, shared, stream, a);
  }
}

template <Source S>
cudaError_t launch_source(const QuantArgs& q, cudaStream_t stream) {
  if (!valid(q)) return cudaErrorInvalidValue;
  if (q.tokens == 0) return cudaSuccess;
  const RowArgs a = row_args(q);
  const int64_t runs_padded = (q.rotation.base + kVector - 1) / kVector * kVector;
  const int64_t units = q.rotation.base == 1 ? q.inputs / kVector : q.inputs / q.rotation.base * runs_padded / kVector;
  if (const int threads = threads_for(units, 1)) return launch_rows<S, 1>(a, threads, stream);
  if (const int threads = threads_for(units, 2)) return launch_rows<S, 2>(a, threads, stream);
  if (const int threads = threads_for(units, 4)) return launch_rows<S, 4>(a, threads, stream);
  if (const int threads = threads_for(units, 8)) return launch_rows<S, 8>(a, threads, stream);
  return cudaErrorInvalidValue;
}

}  // namespace

int64_t quant_shared_bytes(const QuantArgs& q) {
  if (!rotates_in_shared_memory(q.rotation)) return 2 * kReductionBytes + q.inputs;
  const int64_t floats = q.inputs + q.inputs / 32 * kPadding;
  const int64_t bits_of_sign = signs_kept(q.rotation.base) == Base::floats ? 32 : 1;
  return kReductionBytes + (floats + sign_words(q.rotation.base) * bits_of_sign) * int64_t{sizeof(uint32_t)};
}

cudaError_t quant(const QuantArgs& args, cudaStream_t stream) { return launch_source<Source::plain>(args, stream); }

cudaError_t silu_mul_quant(const QuantArgs& args, cudaStream_t stream) {
  return launch_source<Source::silu_mul>(args, stream);
}

cudaError_t rms_norm_quant(const QuantArgs& q, cudaStream_t stream) {
  if (!valid(q) || q.rotation.power != 0) return cudaErrorInvalidValue;
  if (q.tokens == 0) return cudaSuccess;
  const RowArgs a = row_args(q);
  const auto run = [&](void (*kernel)(RowArgs)) {
    return launch(kernel, int(q.tokens), 1, kNormThreads, quant_shared_bytes(q), stream, a);
  };
  const int64_t sweep = kNormThreads * kVector;
  if (q.inputs <= sweep) return run(rms_norm_rows<1>);
  if (q.inputs <= 2 * sweep) return run(rms_norm_rows<2>);
  if (q.inputs <= 4 * sweep) return run(rms_norm_rows<4>);
  if (q.inputs <= 8 * sweep) return run(rms_norm_rows<8>);
  return run(rms_norm_rows<16>);
}

}  // namespace smoothrot::cuda
