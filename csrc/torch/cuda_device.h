// SPDX-License-Identifier: Apache-2.0
// All that the CUDA ops need of torch's accelerator interface and of the CUDA runtime. Tests put a
// CPU in its place.
#pragma once

#include <memory>

#include "../cuda/dispatch.h"
#include "arguments.h"

namespace smoothrot::cuda {

// Where a call runs: the device of `on`, which must be one that this build has kernels for.
class Device {
 public:
  Device(const char* op, const char* argument, const Tensor& on);
  ~Device();
  Device(const Device&) = delete;

  Place place;
  GpuFacts gpu{};
  int64_t shared_bytes = 0;  // that a block can have
  cudaStream_t stream{};     // torch's current one; the device is current while this lives

 private:
  struct Guard;
  std::unique_ptr<Guard> guard_;
};

// Copies to memory of the device that is never freed.
const void* upload(int device, const void* data, size_t bytes);

}  // namespace smoothrot::cuda
