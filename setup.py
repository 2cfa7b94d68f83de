# SPDX-License-Identifier: Apache-2.0
"""Build of the compiled ops; everything else about the package is in pyproject.toml.

``smoothrot_vllm/_C.abi3.so`` holds no Python code: it registers its ops with torch through the stable ABI
when ``torch.ops.load_library`` opens it. Each instruction-set path is one source file built with its own
flags, and the library picks one at run time, so a build serves every CPU of its architecture.
"""

import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from torch.utils.cpp_extension import include_paths

TORCH_TARGET_VERSION = "0x020d000000000000"
"""Oldest torch whose stable ABI is used: 2.13."""

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


class BuildOps(build_ext):
    """Compiles each source with its own flags, and names the result for the stable ABI."""

    def get_ext_filename(self, fullname: str) -> str:
        """Path of the library: no Python version in its name, because it uses no Python API."""
        return str(Path(*fullname.split(".")).with_suffix(".abi3.so"))

    def build_extension(self, ext: Extension) -> None:
        """Compile the sources in parallel, then link them with the installed torch."""
        extra = X86_SOURCES if platform.machine() in ("x86_64", "AMD64") else {}
        flags: dict[str, list[str]] = {source: [] for source in ext.sources} | extra

        def compile_one(source: str) -> list[str]:
            return self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                include_dirs=include_paths(),
                extra_postargs=[*COMPILE_FLAGS, *flags[source]],
            )

        with ThreadPoolExecutor(max_workers=self.parallel or 2) as pool:
            objects = [path for paths in pool.map(compile_one, flags) for path in paths]
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            libraries=["torch_cpu", "c10"],
            library_dirs=[str(Path(torch.__file__).parent / "lib")],
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
    ext_modules=[Extension("smoothrot_vllm._C", PORTABLE_SOURCES, depends=sorted(map(str, Path("csrc").rglob("*.h"))))],
    cmdclass={"build_ext": BuildOps},
)
