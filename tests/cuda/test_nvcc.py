# SPDX-License-Identifier: Apache-2.0
"""What the CUDA sources are compiled for, and what the check of their machine code objects to."""

from dataclasses import replace
from pathlib import Path

import check_sass
import nvcc
import pytest


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> str:
    """A make-believe nvcc that knows the architectures of CUDA 12.4."""
    monkeypatch.setattr(nvcc, "known_architectures", lambda _: frozenset({75, 80, 86, 89, 90}))
    return "nvcc"


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (None, ("80", "90a")),  # of the default, what this nvcc can build
        ("8.0;8.6 9.0a", ("80", "86", "90a")),
        ("7.5 8.9+PTX", ("89",)),
        ("9.0", ("90a",)),
    ],
)
def test_the_list_is_read_as_torch_reads_it(
    compiler: str, setting: str | None, expected: tuple[str, ...]
) -> None:
    assert nvcc.architectures(compiler, setting) == expected


@pytest.mark.parametrize("setting", ["12.0", "7.5", "Ampere", "8.0 sm_90"])
def test_a_list_that_cannot_be_built_is_refused(compiler: str, setting: str) -> None:
    with pytest.raises(nvcc.NvccError, match="TORCH_CUDA_ARCH_LIST"):
        nvcc.architectures(compiler, setting)


def compiler_that_says(text: str, folder: Path) -> str:
    path = folder / "nvcc"
    path.write_text(f"#!/bin/sh\necho '{text}'\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("release", "compresses"), [("12.0", False), ("12.7", False), ("12.8", True), ("13.5", True)]
)
def test_only_an_nvcc_that_can_compress_is_asked_to(
    release: str, compresses: bool, tmp_path: Path
) -> None:
    found = compiler_that_says(
        f"Cuda compilation tools, release {release}, V{release}.37", tmp_path
    )
    call = nvcc.command(found, nvcc.Unit(nvcc.FOLDER / "quant.cu", ("80",)), tmp_path)
    assert ("--compress-mode=size" in call) == compresses


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (
            "Cuda compilation tools, release 11.8, V11.8.89",
            r"expected CUDA 12\.0 or newer, got 11\.8",
        ),
        ("clang version 19", "expected a CUDA compiler, got: clang version 19"),
    ],
)
def test_an_nvcc_that_cannot_build_the_kernels_is_refused(
    said: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(nvcc.NvccError, match=message):
        nvcc.version(compiler_that_says(said, tmp_path))


def test_an_nvcc_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(nvcc.NvccError, match=r"expected a CUDA compiler, got: .*No such file"):
        nvcc.version(str(tmp_path / "absent"))


@pytest.mark.parametrize("folder", ["lib64", "lib"])
def test_the_static_runtime_is_found_in_either_layout(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvcc, "toolkit", lambda _: tmp_path)
    with pytest.raises(nvcc.NvccError, match="libcudart_static"):
        nvcc.static_runtime("nvcc")
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "libcudart_static.a").touch()
    assert nvcc.static_runtime("nvcc").parent.name == folder


def test_each_source_is_compiled_for_its_architectures() -> None:
    units = {unit.source.name: unit.architectures for unit in nvcc.units(("80", "90a", "120"))}
    assert units["cutlass_sm80_128x128.cu"] == ("80",)
    assert units["cutlass_sm90_128x128.cu"] == ("90a",)
    assert units["quant.cu"] == ("80", "90a", "120")
    assert not any(
        name.startswith("cutlass") for name in (u.source.name for u in nvcc.units(("120",)))
    )


def kernel(
    source: str, architecture: str, registers: int = 200, stack: int = 0, **counts: int
) -> check_sass.Kernel:
    named = {label.replace(" ", "_"): label for label in check_sass.INSTRUCTIONS}
    all_counts = dict.fromkeys(check_sass.INSTRUCTIONS, 0) | {
        named[key]: n for key, n in counts.items()
    }
    return check_sass.Kernel(source, architecture, "k", registers, stack, all_counts, loops=1)


PACKED = "_ZN9smoothrot4cuda14gemm_s8_kernelILNS0_5CodesE0ELS2_0ELi32ELi64EEEvNS0_8GemmArgsE"


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        (kernel("cutlass_sm80_a.cu", "80"), "no s4 MMA"),
        (kernel("cutlass_sm90_a.cu", "90a"), "no wgmma"),
        (kernel("gemm_s8.cu", "100", s8_MMA=8, calls=2), "2 calls, expected none"),
        (kernel("gemm_experts.cu", "80"), "no s8 MMA"),
        (replace(kernel("gemm_s8.cu", "80", s8_MMA=8), name=PACKED), "no s4 MMA"),
        (replace(kernel("gemm_s8.cu", "90a"), name=PACKED), "no s8 MMA"),
        (replace(kernel("gemm_small.cu", "80"), loops=0), "no main loop"),
        (
            replace(kernel("cutlass_sm80_a.cu", "80", s4_MMA=64), loop_floats=3),
            "3 instructions on floats in main loops",
        ),
        (kernel("gemm_small.cu", "120", s4_MMA=1), "an s4 MMA, which is emulated here"),
        (kernel("quant.cu", "80", spills=3), "3 spills"),
        (kernel("quant.cu", "80", stack=16), "16 bytes of stack"),
    ],
)
def test_wrong_machine_code_is_objected_to(found: check_sass.Kernel, problem: str) -> None:
    assert any(problem in text for text in found.problems())


@pytest.mark.slow
def test_gemm_s8_compiles_without_spills_or_calls(tmp_path: Path) -> None:
    """The cheapest of what `make check-cuda` compiles, for one architecture without the int4
    MMA."""
    found = nvcc.find_nvcc()
    if found is None:
        pytest.skip("nvcc is not here")
    try:
        check_sass.find_cuobjdump()
    except nvcc.NvccError as error:
        pytest.skip(str(error))
    kernels, problems = check_sass.inspect(
        [nvcc.Unit(nvcc.FOLDER / "gemm_s8.cu", ("90a",))], found, tmp_path
    )
    assert not problems
    # Narrow or wide: two forms of codes by packed weights per channel or in one of three groups,
    # or by weights of 8 bits.
    assert len(kernels) == 2 * 2 * (1 + 3 + 1)
    assert all(kernel.counts["s8 MMA"] and kernel.loops for kernel in kernels)


def test_right_machine_code_is_accepted() -> None:
    assert not kernel("cutlass_sm80_a.cu", "80", s4_MMA=64).problems()
    assert not kernel("cutlass_sm90_a.cu", "90a", wgmma=12).problems()
    assert not kernel("quant.cu", "120", calls=1).problems()
    assert not replace(kernel("gemm_experts.cu", "120"), name="combine_rows", loops=0).problems()
    assert not replace(kernel("gemm_s8.cu", "80", s4_MMA=8), name=PACKED).problems()
