# SPDX-License-Identifier: Apache-2.0
"""The emulated MMA spreads its matrices over a warp as CuTe's traits of the same instruction
say."""

import subprocess

from cutlass_program import cutlass_program


def test_fragments_lie_as_cute_says() -> None:
    program = cutlass_program("fragment_layout.cpp")
    assert (
        subprocess.run([program], capture_output=True, text=True, check=True).stdout
        == "int4 0 0 int8 0\n"
    )
