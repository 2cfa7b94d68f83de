// SPDX-License-Identifier: Apache-2.0
#include "gemm.h"
#include "simd_avx2.h"

namespace smoothrot {

const Kernels kAvx2Kernels = make_kernels<Avx2>("avx2");

}  // namespace smoothrot
