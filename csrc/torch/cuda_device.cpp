// SPDX-License-Identifier: Apache-2.0
#include "cuda_device.h"

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <mutex>
#include <unordered_map>

namespace smoothrot::cuda {
namespace {

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("smoothrot::") + what +
                             ": CUDA: " + cudaGetErrorString(error));
  }
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

// torch's current stream of a device. The function lies in libtorch_cuda, which a build against a
// CPU torch cannot link and which is not in the scope that this library's symbols are looked up in;
// torch has loaded it long before.
cudaStream_t current_stream(int device) {
  using GetStream = AOTITorchError (*)(int32_t, void**);
  static const auto get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<GetStream>(
        library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr);
  }();
  if (!get)
    throw std::runtime_error(
        "smoothrot: expected a CUDA build of torch with its stable ABI, found none loaded.");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

struct Facts {
  GpuFacts gpu;
  int64_t shared_bytes;
};

const Facts& facts(int device) {
  static std::mutex mutex;
  static std::unordered_map<int, Facts> known;
  std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  const int capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
                         attribute(cudaDevAttrComputeCapabilityMinor, device);
  return known[device] = {{capability, attribute(cudaDevAttrMultiProcessorCount, device)},
                          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)};
}

}  // namespace

struct Device::Guard {
  torch::stable::accelerator::DeviceGuard guard;
};

Device::Device(const char* op, const char* argument, const Tensor& on) {
  if (!on.is_cuda())
    refuse(op, argument, "expected a tensor on a CUDA device, got another device.");
  const int index = on.get_device_index();
  place = {aoti_torch_device_type_cuda(), index};
  const Facts& device = facts(index);
  gpu = device.gpu;
  shared_bytes = device.shared_bytes;
  if (!architecture_runs(SMOOTHROT_CUDA_ARCHITECTURES, gpu.capability)) {
    refuse(op, argument,
           "expected a device of an architecture in sm_(" SMOOTHROT_CUDA_ARCHITECTURES "), got ",
           place.name(), " of sm_", gpu.capability,
           ". Build with TORCH_CUDA_ARCH_LIST for this device.");
  }
  guard_ = std::make_unique<Guard>(Guard{torch::stable::accelerator::DeviceGuard(index)});
  stream = current_stream(index);
}

Device::~Device() = default;

const char* error_text(cudaError_t error) { return cudaGetErrorString(error); }

const void* upload(int device, const void* data, size_t bytes) {
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* memory = nullptr;
  check(cudaMalloc(&memory, bytes), "cudaMalloc");
  check(cudaMemcpy(memory, data, bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
  return memory;
}

}  // namespace smoothrot::cuda
