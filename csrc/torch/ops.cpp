// SPDX-License-Identifier: Apache-2.0
// The ops as torch sees them: schemas, argument checks, memory and threads. Bound through torch's stable ABI, so
// that one library serves every torch from TORCH_TARGET_VERSION on.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <optional>
#include <tuple>

#include "checks.h"
#include "huge_pages.h"
#include "rotations.h"
#include "schemas.h"

namespace smoothrot {
namespace {

constexpr int64_t kAlignment = 64;
constexpr int64_t kMostDims = 8;
constexpr int64_t kNormVectorInputs = 8;  // reference.NORM_VECTOR
// Activation tiles that the panels are multiplied with while they stay in the second-level cache.
constexpr int64_t kActivationBlockBytes = 256 * 1024;
// Work below these is not worth waking a thread for.
constexpr int64_t kGrainValues = 32 * 1024;
constexpr int64_t kGrainProducts = 1024 * 1024;

std::atomic<const Kernels*> chosen_kernels{nullptr};

const Kernels& kernels() {
  const Kernels* chosen = chosen_kernels.load(std::memory_order_acquire);
  if (!chosen) {
    const char* forced = std::getenv("SMOOTHROT_CPU_ISA");
    chosen = &select_kernels(forced ? forced : "");
    chosen_kernels.store(chosen, std::memory_order_release);
  }
  return *chosen;
}

Rotations& rotations() {
  static Rotations known;
  return known;
}

// An uninitialised CPU tensor; far cheaper than a dispatcher call, which counts at one token.
Tensor empty(const int64_t* sizes, int64_t dims, ScalarType dtype) {
  int64_t strides[kMostDims];
  int64_t stride = 1;
  for (int64_t i = dims - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= sizes[i];
  }
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dims, sizes, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return empty(sizes.begin(), int64_t(sizes.size()), dtype);
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Runs work(begin, end) over [0, tasks) on torch's threads. Each takes half of its share of what is left, at least
// `grain` tasks, and comes back for more: a thread that the machine holds up is not waited for with half of the work.
template <typename Work>
void share(int64_t tasks, int64_t grain, const Work& work) {
  const int64_t wanted = ceil_div(tasks, grain), available = int64_t(torch::stable::get_num_threads());
  const int64_t threads = wanted < available ? wanted : available;
  if (threads <= 1) return work(0, tasks);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    int64_t begin = next.load(std::memory_order_relaxed);
    while (begin < tasks) {
      const int64_t left = tasks - begin, part = left / (2 * threads);
      const int64_t end = begin + std::min(left, std::max(grain, part));
      if (!next.compare_exchange_weak(begin, end, std::memory_order_relaxed)) continue;
      work(begin, end);
      begin = next.load(std::memory_order_relaxed);
    }
  });
}

// Cuts one allocation into aligned parts.
class Arena {
 public:
  template <typename T>
  size_t reserve(int64_t count) {
    const int64_t at = bytes_;
    bytes_ += ceil_div(count * int64_t{sizeof(T)}, kAlignment) * kAlignment;
    return size_t(at);
  }
  void allocate() {
    memory_ = empty({bytes_ + kAlignment}, ScalarType::Byte);
    const auto address = reinterpret_cast<uintptr_t>(memory_->mutable_data_ptr());
    base_ = reinterpret_cast<uint8_t*>((address + kAlignment - 1) / kAlignment * kAlignment);
  }
  template <typename T>
  T* at(size_t offset) const {
    return reinterpret_cast<T*>(base_ + offset);
  }

 private:
  int64_t bytes_ = 0;
  std::optional<Tensor> memory_;
  uint8_t* base_ = nullptr;
};

// Scratch for one thread or, of a parallel range, for each.
struct ThreadScratch {
  int64_t bytes;
  size_t offset;
  ThreadScratch(Arena& arena, int64_t bytes_each, bool parallel) : bytes(bytes_each) {
    offset = arena.reserve<uint8_t>(bytes * (parallel ? torch::stable::get_num_threads() : 1));
  }
};

uint32_t thread_index() {
  uint32_t index = 0;
  torch_get_thread_idx(&index);
  return index;
}

QuantArgs quant_args(const char* op, const Tensor& x, Float dtype, int64_t block, double clip, int64_t bits,
                     Source source = Source::plain) {
  check_clip(op, clip);
  QuantArgs q{};
  q.x = x.const_data_ptr();
  q.dtype = dtype;
  q.inputs = x.size(x.dim() - 1) / (source == Source::silu_mul ? 2 : 1);
  q.source = source;
  q.factor = float(clip / double((1 << (bits - 1)) - 1));
  q.norm = 1.0f;
  q.bits = int(bits);
  if (block) {
    if (block < 0 || q.inputs % block) refuse(op, "block", "expected a divisor of ", q.inputs, ", got ", block, ".");
    q.rotation = rotations().find(block);
    if (!q.rotation) {
      refuse(op, "block", "expected a prepared block, got ", block, ". Call smoothrot_vllm.ops.prepare_rotation(",
             block, ") first.");
    }
    q.norm = float(1.0 / std::sqrt(double(block)));
  }
  return q;
}

// Stored codes and scales, the rows shared between the threads.
std::tuple<Tensor, Tensor> quantise(const QuantArgs& q, int64_t tokens) {
  Tensor codes =
      q.bits == 4 ? empty({tokens, q.inputs / 2}, ScalarType::Byte) : empty({tokens, q.inputs}, ScalarType::Char);
  Tensor scale = empty({tokens}, ScalarType::Float);
  if (!tokens) return {codes, scale};
  const Kernels& k = kernels();
  Arena arena;
  const ThreadScratch scratch(arena, k.scratch_bytes(q, 1), tokens > 1);
  arena.allocate();
  auto* scales = static_cast<float*>(scale.mutable_data_ptr());
  void* out = codes.mutable_data_ptr();
  share(tokens, ceil_div(kGrainValues, q.inputs), [&](int64_t begin, int64_t end) {
    k.quant_rows(q, out, scales, begin, end, arena.at<uint8_t>(scratch.offset + thread_index() * scratch.bytes));
  });
  return {codes, scale};
}

std::tuple<Tensor, Tensor> quant_impl(const char* op, const Tensor& x, int64_t block, double clip, int64_t bits) {
  const Float dtype = check_activations(op, "x", x, 2, 2);
  check_bits(op, "bits", bits);
  return quantise(quant_args(op, x, dtype, block, clip, bits), x.size(0));
}

std::tuple<Tensor, Tensor> quant(const Tensor& x, double clip, int64_t bits) {
  return quant_impl("quant", x, 0, clip, bits);
}

std::tuple<Tensor, Tensor> hadamard_quant(const Tensor& x, int64_t block, double clip, int64_t bits) {
  if (block < 1) refuse("hadamard_quant", "block", "expected a positive block size, got ", block, ".");
  return quant_impl("hadamard_quant", x, block, clip, bits);
}

std::tuple<Tensor, Tensor> silu_mul_hadamard_quant(const Tensor& gate_up, int64_t block, double clip, int64_t bits) {
  constexpr const char* op = "silu_mul_hadamard_quant";
  const Float dtype = check_gate_up(op, gate_up, 2, 2);
  check_bits(op, "bits", bits);
  return quantise(quant_args(op, gate_up, dtype, block, clip, bits, Source::silu_mul), gate_up.size(0));
}

std::tuple<Tensor, Tensor> rms_norm_quant(const Tensor& x, std::optional<Tensor> weight, double epsilon, double clip,
                                          int64_t bits, std::optional<Tensor> residual) {
  constexpr const char* op = "rms_norm_quant";
  const Float dtype = check_activations(op, "x", x, 2, 2);
  check_bits(op, "bits", bits);
  const int64_t tokens = x.size(0), inputs = x.size(1);
  if (inputs % kNormVectorInputs) {
    refuse(op, "x", "expected inputs in multiples of ", kNormVectorInputs, ", got ", describe(x), ".");
  }
  if (!(epsilon >= 0.0)) refuse(op, "epsilon", "expected a number of at least 0, got ", epsilon, ".");
  QuantArgs q = quant_args(op, x, dtype, 0, clip, bits, Source::rms_norm);
  q.norm_args.epsilon = float(epsilon);
  if (weight) {
    check_tensor(op, "weight", *weight, x.scalar_type(), {inputs});
    q.norm_args.weight = weight->const_data_ptr();
  }
  if (residual) {
    check_tensor(op, "residual", *residual, x.scalar_type(), {tokens, inputs});
    q.norm_args.residual = residual->mutable_data_ptr();
  }
  return quantise(q, tokens);
}

void prepare_rotation(const Tensor& base_matrix, int64_t power) {
  constexpr const char* op = "prepare_rotation";
  check_tensor(op, "base_matrix", base_matrix, ScalarType::Char, {kAnySize, kAnySize});
  const int64_t base = base_matrix.size(0);
  if (base_matrix.size(1) != base || (base != 1 && base % 4)) {
    refuse(op, "base_matrix", "expected a square matrix of order 1 or a multiple of 4, got ", describe(base_matrix),
           ".");
  }
  if (power < 1 || (power & (power - 1))) refuse(op, "power", "expected a power of two, got ", power, ".");
  const auto* signs = static_cast<const int8_t*>(base_matrix.const_data_ptr());
  for (int64_t i = 0; i < base * base; ++i) {
    if (signs[i] != 1 && signs[i] != -1)
      refuse(op, "base_matrix", "expected entries +1 and -1, got ", int(signs[i]), ".");
  }
  rotations().add(base, power, signs);
}

Tensor prepack_weight(const Tensor& weight, const Tensor& weight_scale, int64_t bits) {
  constexpr const char* op = "prepack_weight";
  check_bits(op, "bits", bits);
  check_tensor(op, "weight", weight, bits == 4 ? ScalarType::Byte : ScalarType::Char, {kAnySize, kAnySize});
  const int64_t inputs = weight.size(1) * (bits == 4 ? 2 : 1);
  if (inputs < 2 || inputs % 2) refuse(op, "weight", "expected an even number of inputs, got ", describe(weight), ".");
  const WeightLayout w = check_weight(op, weight_scale, inputs, bits, 4);
  if (w.columns != weight.size(0)) {
    refuse(op, "weight_scale", "expected a row for each of the ", weight.size(0), " outputs, got ",
           describe(weight_scale), ".");
  }
  Tensor packed = empty_in_huge_pages(w.panels, w.panel_bytes);
  auto* out = static_cast<uint8_t*>(packed.mutable_data_ptr());
  const void* codes = weight.const_data_ptr();
  const auto* scale = static_cast<const float*>(weight_scale.const_data_ptr());
  share(w.panels, ceil_div(kGrainValues, w.panel_bytes),
        [&](int64_t begin, int64_t end) { prepack(codes, scale, int(bits), w, out, begin, end); });
  return packed;
}

// What gemm and linear share: the tiles' memory and the multiplication itself.
class Multiplication {
 public:
  Multiplication(const char* op, const Kernels& k, int64_t tokens, const WeightLayout& w, int64_t weight_bits,
                 const Tensor& packed, const std::optional<Tensor>& bias, Float out_dtype)
      : kernels_(k) {
    check_packed(op, packed, w);
    GemmArgs& g = args;
    g.act.weight = w;
    g.act.tiles = tile_layout(tokens, w.groups == 1 ? k.max_rows : k.max_rows_grouped);
    g.packed = static_cast<const uint8_t*>(packed.const_data_ptr());
    g.weight_bits = int(weight_bits);
    if (bias) {
      g.bias_dtype = float_type(op, "bias", bias->scalar_type());
      check_tensor(op, "bias", *bias, bias->scalar_type(), {w.columns});
      g.bias = bias->const_data_ptr();
    }
    g.out_dtype = out_dtype;
    const int64_t tile_bytes = (g.act.tiles.rows + 1) * w.groups * w.group_steps * kStepInputs;
    const int64_t tiles_at_once = tile_bytes < kActivationBlockBytes ? kActivationBlockBytes / tile_bytes : 1;
    g.blocks = ceil_div(g.act.tiles.tiles, tiles_at_once);
  }

  // Memory for the tiles and for each thread's scratch; `scale` is null where the arena shall hold it.
  void allocate(int64_t scratch_bytes, const float* scale) {
    const WeightLayout& w = args.act.weight;
    const int64_t tokens = args.act.tiles.tokens;
    const size_t words = arena_.reserve<int32_t>(tokens * w.groups * w.group_steps);
    const size_t start = arena_.reserve<int32_t>(tokens * w.groups);
    const size_t scales = arena_.reserve<float>(scale ? 0 : tokens);
    scratch_.emplace(arena_, scratch_bytes, args.act.tiles.tiles > 1);
    arena_.allocate();
    args.act.words = arena_.at<int32_t>(words);
    args.act.start = arena_.at<int32_t>(start);
    args.act.scale = scale ? const_cast<float*>(scale) : arena_.at<float>(scales);
  }

  // Multiplies codes that are quantised already.
  void run_stored(void* out, const Tensor& codes, const Tensor& scale, int64_t act_bits) {
    QuantArgs sizes{};
    sizes.inputs = args.act.weight.inputs;
    allocate(kernels_.scratch_bytes(sizes, args.act.tiles.rows + 1), static_cast<const float*>(scale.const_data_ptr()));
    const void* stored = codes.const_data_ptr();
    run(out, [&](int64_t begin, int64_t end, void* scratch) {
      kernels_.decode_tiles(stored, int(act_bits), args.act, begin, end, scratch);
    });
  }

  // Runs `fill(begin, end, scratch)` over the tiles, then multiplies into `out`.
  template <typename Fill>
  void run(void* out, const Fill& fill) {
    args.out = out;
    const WeightLayout& w = args.act.weight;
    const int64_t tile_values = (args.act.tiles.rows + 1) * w.inputs;
    share(args.act.tiles.tiles, ceil_div(kGrainValues, tile_values), [&](int64_t begin, int64_t end) {
      fill(begin, end, arena_.at<void>(scratch_->offset + thread_index() * scratch_->bytes));
    });
    const int64_t task_products = ceil_div(args.act.tiles.tokens, args.blocks) * w.inputs * kPanelColumns;
    share(gemm_tasks(args), ceil_div(kGrainProducts, task_products),
          [&](int64_t begin, int64_t end) { kernels_.gemm(args, begin, end); });
  }

  GemmArgs args{};

 private:
  const Kernels& kernels_;
  Arena arena_;
  std::optional<ThreadScratch> scratch_;
};

Tensor gemm(const Tensor& codes, const Tensor& scale, const Tensor& packed, const Tensor& weight_scale,
            std::optional<Tensor> bias, ScalarType out_dtype, int64_t act_bits, int64_t weight_bits) {
  constexpr const char* op = "gemm";
  check_bits(op, "act_bits", act_bits);
  check_bits(op, "weight_bits", weight_bits);
  check_tensor(op, "codes", codes, act_bits == 4 ? ScalarType::Byte : ScalarType::Char, {kAnySize, kAnySize});
  const int64_t tokens = codes.size(0), inputs = codes.size(1) * (act_bits == 4 ? 2 : 1);
  if (inputs < 2 || inputs % 2) refuse(op, "codes", "expected an even number of inputs, got ", describe(codes), ".");
  check_tensor(op, "scale", scale, ScalarType::Float, {tokens});
  const WeightLayout w = check_weight(op, weight_scale, inputs, weight_bits, act_bits);
  const Kernels& k = kernels();
  Multiplication m(op, k, tokens, w, weight_bits, packed, bias, float_type(op, "out_dtype", out_dtype));
  Tensor out = empty({tokens, w.columns}, out_dtype);
  if (!tokens) return out;
  m.run_stored(out.mutable_data_ptr(), codes, scale, act_bits);
  return out;
}

Tensor linear_impl(const char* op, Source source, const Tensor& x, const Tensor& packed, const Tensor& weight_scale,
                   const std::optional<Tensor>& bias, int64_t block, double clip, int64_t act_bits,
                   int64_t weight_bits) {
  check_bits(op, "act_bits", act_bits);
  check_bits(op, "weight_bits", weight_bits);
  const Float dtype =
      source == Source::silu_mul ? check_gate_up(op, x, 1, kMostDims) : check_activations(op, "x", x, 1, kMostDims);
  const QuantArgs q = quant_args(op, x, dtype, block, clip, act_bits, source);
  const WeightLayout w = check_weight(op, weight_scale, q.inputs, weight_bits, act_bits);
  const int64_t tokens = x.numel() / x.size(x.dim() - 1);
  const Kernels& k = kernels();
  Multiplication m(op, k, tokens, w, weight_bits, packed, bias, dtype);
  int64_t sizes[kMostDims];
  for (int64_t i = 0; i + 1 < x.dim(); ++i) sizes[i] = x.size(i);
  sizes[x.dim() - 1] = w.columns;
  Tensor out = empty(sizes, x.dim(), x.scalar_type());
  if (!tokens) return out;
  if (tokens > 1 && m.args.act.tiles.tiles < torch::stable::get_num_threads()) {
    // Fewer tiles than threads: quantise by rows, which are more.
    const auto [codes, scale] = quantise(q, tokens);
    m.run_stored(out.mutable_data_ptr(), codes, scale, act_bits);
    return out;
  }
  m.allocate(k.scratch_bytes(q, m.args.act.tiles.rows + 1), nullptr);
  m.run(out.mutable_data_ptr(),
        [&](int64_t begin, int64_t end, void* scratch) { k.quant_tiles(q, m.args.act, begin, end, scratch); });
  return out;
}

Tensor linear(const Tensor& x, const Tensor& packed, const Tensor& weight_scale, std::optional<Tensor> bias,
              int64_t block, double clip, int64_t act_bits, int64_t weight_bits) {
  return linear_impl("linear", Source::plain, x, packed, weight_scale, bias, block, clip, act_bits, weight_bits);
}

Tensor silu_mul_linear(const Tensor& gate_up, const Tensor& packed, const Tensor& weight_scale,
                       std::optional<Tensor> bias, int64_t block, double clip, int64_t act_bits, int64_t weight_bits) {
  return linear_impl("silu_mul_linear", Source::silu_mul, gate_up, packed, weight_scale, bias, block, clip, act_bits,
                     weight_bits);
}

std::string kernel_name() { return kernels().name; }

std::string select_kernel(std::string isa) {
  chosen_kernels.store(&select_kernels(isa.c_str()), std::memory_order_release);
  return kernel_name();
}

}  // namespace
}  // namespace smoothrot

STABLE_TORCH_LIBRARY(smoothrot, m) {
  smoothrot::define_ops(m);
  m.def("prepare_rotation(Tensor base_matrix, int power) -> ()");
  m.def("kernel_name() -> str");
  m.def("select_kernel(str isa) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(smoothrot, CPU, m) {
  m.impl("quant", TORCH_BOX(&smoothrot::quant));
  m.impl("hadamard_quant", TORCH_BOX(&smoothrot::hadamard_quant));
  m.impl("silu_mul_hadamard_quant", TORCH_BOX(&smoothrot::silu_mul_hadamard_quant));
  m.impl("rms_norm_quant", TORCH_BOX(&smoothrot::rms_norm_quant));
  m.impl("prepare_rotation", TORCH_BOX(&smoothrot::prepare_rotation));
  m.impl("prepack_weight", TORCH_BOX(&smoothrot::prepack_weight));
  m.impl("gemm", TORCH_BOX(&smoothrot::gemm));
  m.impl("linear", TORCH_BOX(&smoothrot::linear));
  m.impl("silu_mul_linear", TORCH_BOX(&smoothrot::silu_mul_linear));
}

STABLE_TORCH_LIBRARY_IMPL(smoothrot, CompositeExplicitAutograd, m) {
  m.impl("kernel_name", TORCH_BOX(&smoothrot::kernel_name));
  m.impl("select_kernel", TORCH_BOX(&smoothrot::select_kernel));
}
