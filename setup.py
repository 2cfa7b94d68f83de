# SPDX-License-Identifier: Apache-2.0
"""Build of the compiled ops; everything else about the package is in pyproject.toml.

``smoothrot_vllm/_C.abi3.so`` holds no Python code: it registers its ops with torch through the
stable ABI when ``torch.ops.load_library`` opens it. Each instruction-set path is one source file
built with its own flags, and the library picks one at run time, so a build serves every CPU of its
architecture.

``csrc/build_plan.py`` decides what it is built with. The CUDA kernels are part of it if
``SMOOTHROT_CUDA`` is ``1``, not if it is ``0``, and otherwise if torch is a CUDA build and the
machine has nvcc or a GPU. A build without them has ``+cpu`` in its version, which pip shows.
``TORCH_CUDA_ARCH_LIST`` and ``MAX_JOBS`` are honored, no GPU is needed.
"""

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "csrc"))
import build_plan  # noqa: E402
import glibc  # noqa: E402
import nvcc  # noqa: E402

VERSION = "0.1.0"

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
    "csrc/common/single_threaded.cpp",
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
    "csrc/torch/cuda_prepack.cpp",
    "csrc/torch/cuda_device.cpp",
    "csrc/torch/cuda_register.cpp",
    "csrc/cuda/dispatch.cpp",
]


try:
    PLAN = build_plan.plan(os.environ, build_plan.search_path())
except (build_plan.BuildError, nvcc.NvccError) as error:
    sys.exit(str(error))


class BuildOps(build_ext):
    """Compiles each source with its own flags, and names the result for the stable ABI."""

    def get_ext_filename(self, fullname: str) -> str:
        """Path of the library: no Python version in its name, because it uses no Python API."""
        return str(Path(*fullname.split(".")).with_suffix(".abi3.so"))

    def build_extension(self, ext: Extension) -> None:
        """Compile the sources in parallel, then link them with the installed torch."""
        if PLAN.requirements:
            sys.exit(
                f"expected these in {sys.prefix}, found none: {' '.join(PLAN.requirements)}."
                " Install them, or let pip do it for the build alone, without"
                " --no-build-isolation."
            )
        assert PLAN.torch is not None
        print(
            f"building with torch {PLAN.torch.version} of {PLAN.torch.folder}, nvcc {PLAN.nvcc}",
            flush=True,
        )
        if PLAN.without_cuda:
            print(
                f"WARNING: no CUDA kernels, because {PLAN.without_cuda}: this build cannot serve on"
                " a GPU",
                file=sys.stderr,
            )
        extra = X86_SOURCES if platform.machine() in ("x86_64", "AMD64") else {}
        flags: dict[str, list[str]] = {source: [] for source in ext.sources} | extra
        objects: list[str] = []
        link_flags = LINK_FLAGS.copy()
        if PLAN.nvcc is not None:
            archs = nvcc.architectures(PLAN.nvcc, os.environ.get("TORCH_CUDA_ARCH_LIST") or None)
            host = [f"-I{nvcc.toolkit(PLAN.nvcc) / 'include'}", *nvcc.definitions(archs)]
            flags |= dict.fromkeys(CUDA_HOST_SOURCES, host)
            # Not in build_temp, which pip makes anew each time: these take minutes.
            objects += map(
                str, nvcc.compile_units(PLAN.nvcc, nvcc.units(archs), ROOT / "build" / "cuda")
            )
            objects.append(
                str(glibc.bind_to_old(nvcc.static_runtime(PLAN.nvcc), Path(self.build_temp)))
            )
            link_flags += glibc.LIBRARIES
        include_dirs = [str(PLAN.torch.include)]

        def compile_one(source: str) -> list[str]:
            return self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                include_dirs=include_dirs,
                extra_postargs=[*COMPILE_FLAGS, *flags[source]],
            )

        with ThreadPoolExecutor(max_workers=self.parallel or 2) as pool:
            objects += [path for paths in pool.map(compile_one, flags) for path in paths]
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            libraries=["torch_cpu", "c10"],
            library_dirs=[str(PLAN.torch.lib)],
            extra_postargs=link_flags,
            target_lang="c++",
        )


class WheelOfOps(bdist_wheel):
    """Tags the wheel for every Python 3: the library in it uses no Python API."""

    def get_tag(self) -> tuple[str, str, str]:
        """``py3-none`` and the platform."""
        return "py3", "none", super().get_tag()[2]


setup(
    version=f"{VERSION}+cpu" if PLAN.without_cuda else VERSION,
    packages=[
        *find_packages(include=["smoothrot_vllm", "smoothrot_vllm.*"]),
        *find_packages("offline"),
    ],
    package_dir={"smoothrot_offline": "offline/smoothrot_offline"},
    ext_modules=[
        Extension(
            "smoothrot_vllm._C",
            PORTABLE_SOURCES,
            depends=sorted(str(p) for p in Path("csrc").rglob("*.*")),
        )
    ],
    cmdclass={"build_ext": BuildOps, "bdist_wheel": WheelOfOps},
    # Unlike [build-system] requires, these can be left out where they are not needed.
    setup_requires=list(PLAN.requirements),
)
