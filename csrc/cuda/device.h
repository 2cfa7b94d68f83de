// SPDX-License-Identifier: Apache-2.0
// What the hand-written kernels ask of the machine. They hold no assembly and no <<<>>>, so that
// the same source runs under nvcc and, in tests, under the emulator.
#pragma once

#ifdef SMOOTHROT_EMULATED
  #include "../emulator/device.h"
#else
  #include "device_ptx.h"
#endif

namespace smoothrot::cuda {

struct alignas(16) Words4 {
  uint32_t word[4];
};

struct alignas(8) Words2 {
  uint32_t word[2];
};

}  // namespace smoothrot::cuda
