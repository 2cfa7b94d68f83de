// SPDX-License-Identifier: Apache-2.0
#include "gemm.h"
#include "simd_avx512.h"

namespace smoothrot {

const Kernels kAvx512VnniKernels = make_kernels<Avx512>("avx512_vnni");

}  // namespace smoothrot
