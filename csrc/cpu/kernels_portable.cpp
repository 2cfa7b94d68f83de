// SPDX-License-Identifier: Apache-2.0
#include "gemm.h"
#include "simd_portable.h"

namespace smoothrot {

const Kernels kPortableKernels = make_kernels<Portable>("portable");

}  // namespace smoothrot
