# SPDX-License-Identifier: Apache-2.0
"""The CUTLASS epilogues' own functors, evaluated on the host, round as the reference does.

Their order in the kernel and their device code are not seen here: only what each node computes.
"""

import subprocess

import pytest
import torch
from cutlass_program import cutlass_program

from smoothrot_vllm import reference

TOKENS, OUTPUTS, INPUTS = 512, 512, 2048


@pytest.mark.parametrize(
    "definitions", [(), ("-DSMOOTHROT_EPILOGUE_SM90",)], ids=["sm_80", "sm_90a"]
)
def test_the_epilogue_equals_the_reference(definitions: tuple[str, ...]) -> None:
    # -fpermissive: headers name device intrinsics in templates that are never instantiated here.
    flags = ("-O1", "-fpermissive", "-ffp-contract=off", *definitions)
    program = cutlass_program("cutlass_epilogue.cpp", *flags)
    codes = torch.randint(-128, 128, (TOKENS, INPUTS), dtype=torch.int8)
    weight = torch.randint(-128, 128, (OUTPUTS, INPUTS), dtype=torch.int8)
    codes[:8], weight[:8] = -127, -128  # sums that float32 has to round
    codes[0, 0] = -126
    scale = torch.rand(TOKENS) * torch.logspace(-7, -3, TOKENS)
    weight_scale = torch.rand(OUTPUTS, 1) * torch.logspace(-4, 0, OUTPUTS)[:, None]
    sums = reference.accumulate(codes, weight, None, 8, 8)
    assert (sums.abs() > 1 << 24).any()
    shape = (TOKENS, OUTPUTS)
    per_token, per_output = scale[:, None].expand(shape), weight_scale.T.expand(shape)
    biases = [torch.randn(OUTPUTS).to(dtype) for dtype in (torch.float16, torch.bfloat16)]
    arrays = [
        torch.tensor(sums.numel()),
        sums,
        per_output,
        per_token,
        *(bias.expand(shape) for bias in biases),
    ]
    stdin = b"".join(
        bytes(a.contiguous().flatten().view(torch.uint8).numpy())
        for a in (x.reshape(-1) for x in arrays)
    )
    stdout = subprocess.run([program], input=stdin, capture_output=True, check=True).stdout
    results = torch.frombuffer(bytearray(stdout), dtype=torch.int16).reshape(2, *shape)
    for bits, bias in zip(results, biases, strict=True):
        expected = reference.gemm(codes, scale, weight, weight_scale, None, bias, bias.dtype, 8, 8)
        assert torch.equal(bits, expected.view(torch.int16))
