// SPDX-License-Identifier: Apache-2.0
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace smoothrot {
namespace {

struct Path {
  const Kernels* kernels;
  bool runs_here;
};

// Best first.
struct Paths {
  Path list[3];
  int count = 0;
  void add(const Kernels& kernels, bool runs_here) { list[count++] = {&kernels, runs_here}; }
};

Paths paths() {
  Paths p;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
  p.add(kAvx512VnniKernels, avx512);
  p.add(kAvx2Kernels, avx2);
#endif
  p.add(kPortableKernels, true);
  return p;
}

}  // namespace

const Kernels& select_kernels(const char* name) {
  const Paths p = paths();
  const std::string wanted = name;
  std::string known;
  for (int i = 0; i < p.count; ++i) {
    const Path& path = p.list[i];
    if (wanted.empty() ? path.runs_here : wanted == path.kernels->name) {
      if (path.runs_here) return *path.kernels;
      throw std::runtime_error(
          "SMOOTHROT_CPU_ISA: expected an instruction set that this CPU has, got " + wanted +
          ". Unset the variable to use the best one.");
    }
    known += (i ? ", " : "") + std::string(path.kernels->name);
  }
  throw std::runtime_error("SMOOTHROT_CPU_ISA: expected one of " + known + ", got '" + wanted +
                           "'.");
}

}  // namespace smoothrot
