// SPDX-License-Identifier: Apache-2.0
// The few names of the CUDA runtime that launchers use, for builds without a CUDA toolkit.
#pragma once

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorLaunchFailure = 719,
};

using cudaStream_t = void*;
