# SPDX-License-Identifier: Apache-2.0
"""Build of the compiled ops; everything else about the package is in pyproject.toml.

``smoothrot_vllm/_C.abi3.so`` holds no Python code: it registers its ops with torch through the stable ABI
when ``torch.ops.load_library`` opens it. Each instruction-set path is one source file built with its own
flags, and the library picks one at run time, so a build serves every CPU of its architecture.

The CUDA kernels are part of it if ``SMOOTHROT_CUDA`` is ``1``, not if it is ``0``, and otherwise if nvcc and a CUDA
build of torch are there. ``TORCH_CUDA_ARCH_LIST`` and ``MAX_JOBS`` are honoured, no GPU is needed.
"""

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "csrc" / "cuda"))
import nvcc  # noqa: E402

TORCH_TARGET_VERSION = "0x020b000000000000"
"""Oldest torch whose stable ABI is used: 2.11."""

COMPILE_FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",  # Python asks for debug information
    "-fvisibility=hidden",
    "-Wno-uninitialized",  # GCC 12 gives this and the next for its own AVX-512 intrinsics
    "-Wno-maybe-uninitialized",
    "-fwrapv",  # an int32 sum may wrap on its way to a result that fits
    "-ffp-contract=off",  # a fused multiply-add would break bit-exactness with the reference
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
]
LINK_FLAGS = ["-Wl,--no-undefined"]

PORTABLE_SOURCES = [
    "csrc/torch/ops.cpp",
    "csrc/torch/experts_ops.cpp",
    "csrc/cpu/dispatch.cpp",
    "csrc/cpu/prepack.cpp",
    "csrc/cpu/kernels_portable.cpp",
]
X86_SOURCES = {
    "csrc/cpu/kernels_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "csrc/cpu/kernels_avx512_vnni.cpp": [
        *("-mavx2", "-mfma", "-mf16c"),
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"),
    ],
}
CUDA_HOST_SOURCES = [
    "csrc/torch/cuda_ops.cpp",
    "csrc/torch/cuda_device.cpp",
    "csrc/torch/cuda_register.cpp",
    "csrc/cuda/dispatch.cpp",
]


def cuda_compiler() -> str | None:
    """The nvcc to build the CUDA kernels with, or None to leave them out."""
    setting = os.environ.get("SMOOTHROT_CUDA", "auto")
    if setting not in ("auto", "0", "1"):
        sys.exit(f"SMOOTHROT_CUDA: expected 0, 1 or auto, got {setting!r}")
    compiler = None if setting == "0" else nvcc.find_nvcc()
    if setting == "1" and compiler is None:
        sys.exit(
            "SMOOTHROT_CUDA=1: expected nvcc on PATH, in CUDA_HOME or named by CUDACXX, found none. Install the CUDA toolkit."
        )
    return compiler if setting == "1" or torch.version.cuda is not None else None


NVCC = cuda_compiler()


class BuildOps(build_ext):
    """Compiles each source with its own flags, and names the result for the stable ABI."""

    def get_ext_filename(self, fullname: str) -> str:
        """Path of the library: no Python version in its name, because it uses no Python API."""
        return str(Path(*fullname.split(".")).with_suffix(".abi3.so"))

    def build_extension(self, ext: Extension) -> None:
        """Compile the sources in parallel, then link them with the installed torch."""
        extra = X86_SOURCES if platform.machine() in ("x86_64", "AMD64") else {}
        flags: dict[str, list[str]] = {source: [] for source in ext.sources} | extra
        objects: list[str] = []
        libraries, library_dirs = ["torch_cpu", "c10"], [str(Path(torch.__file__).parent / "lib")]
        if NVCC is not None:
            toolkit = nvcc.toolkit(NVCC)
            archs = nvcc.architectures(NVCC, os.environ.get("TORCH_CUDA_ARCH_LIST") or None)
            host = [f"-I{toolkit / 'include'}", *nvcc.definitions(archs)]
            flags |= dict.fromkeys(CUDA_HOST_SOURCES, host)
            # Not in build_temp, which pip makes anew each time: these take minutes.
            objects += map(str, nvcc.compile_units(NVCC, nvcc.units(archs), ROOT / "build" / "cuda"))
            libraries += ["cudart_static", "dl", "rt", "pthread"]
            library_dirs.append(str(toolkit / "lib64"))

        def compile_one(source: str) -> list[str]:
            return self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                include_dirs=include_paths(),
                extra_postargs=[*COMPILE_FLAGS, *flags[source]],
            )

        with ThreadPoolExecutor(max_workers=self.parallel or 2) as pool:
            objects += [path for paths in pool.map(compile_one, flags) for path in paths]
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            libraries=libraries,
            library_dirs=library_dirs,
            extra_postargs=LINK_FLAGS,
            target_lang="c++",
        )


setup(
    packages=[
        *find_packages(include=["smoothrot_vllm", "smoothrot_vllm.*"]),
        "smoothrot_offline",
        *(f"smoothrot_offline.{name}" for name in find_packages("offline")),
    ],
    package_dir={"smoothrot_offline": "offline"},
    ext_modules=[Extension("smoothrot_vllm._C", PORTABLE_SOURCES, depends=sorted(str(p) for p in Path("csrc").rglob("*.*")))],
    cmdclass={"build_ext": BuildOps},
    # Unlike [build-system] requires, this can be left out of builds without CUDA.
    setup_requires=[nvcc.CUTLASS] if NVCC is not None else [],
)
