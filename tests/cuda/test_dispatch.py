# SPDX-License-Identifier: Apache-2.0
"""Which kernel multiplies, for every scheme of the presets on every architecture."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from smoothrot_offline.presets import PAPER, PRESETS

TOKENS = (1, 4, 16, 17, 64, 512, 4096)
FAMILIES = {
    # Architectures, weights, bits of activations: to 16 tokens, to 255, from 256 on.
    ((80, 89), "channel", 4): ("small", "cutlass_sm80", "cutlass_sm80"),
    ((80, 89), "channel", 8): ("small", "s8", "s8"),
    ((80, 89), "groups", 4): ("small", "s8", "s8"),
    ((80, 89), "groups", 8): ("small", "s8", "s8"),
    ((80, 89), "8 bits", 4): ("small", "s8", "s8"),
    ((80, 89), "8 bits", 8): ("small", "s8", "s8"),
    ((90,), "channel", 4): ("small", "cutlass_sm90", "cutlass_sm90"),
    ((90,), "channel", 8): ("small", "cutlass_sm90", "cutlass_sm90"),
    ((90,), "groups", 4): ("small", "s8", "cutlass_sm90_s8"),
    ((90,), "groups", 8): ("small", "s8", "cutlass_sm90_s8"),
    ((90,), "8 bits", 4): ("small", "cutlass_sm90_s8", "cutlass_sm90_s8"),
    ((90,), "8 bits", 8): ("small", "cutlass_sm90_s8", "cutlass_sm90_s8"),
    ((100, 120), "channel", 4): ("small", "s8", "s8"),
    ((100, 120), "channel", 8): ("small", "s8", "s8"),
    ((100, 120), "groups", 4): ("small", "s8", "s8"),
    ((100, 120), "groups", 8): ("small", "s8", "s8"),
    ((100, 120), "8 bits", 4): ("small", "s8", "s8"),
    ((100, 120), "8 bits", 8): ("small", "s8", "s8"),
}


def schemes() -> Iterator[tuple[str, int, int]]:
    """Preset, bits of weights and inputs of a group."""
    for name, preset in (PRESETS | {"paper-compat": PAPER}).items():
        for group_size in preset.group_sizes:
            yield name, 4, group_size
        if preset.options.get("lm_head_bits") == 8 or preset.options.get("keep_8bit"):
            yield name, 8, -1


@pytest.mark.parametrize("capability", [80, 89, 90, 100, 120])
@pytest.mark.parametrize("act_bits", [4, 8])
@pytest.mark.parametrize(("preset", "weight_bits", "group_size"), list(schemes()))
def test_every_scheme_of_the_presets_reaches_its_kernel(
    gpu: Any, preset: str, weight_bits: int, group_size: int, act_bits: int, capability: int
) -> None:
    weights = "8 bits" if weight_bits == 8 else "channel" if group_size == -1 else "groups"
    few, some, many = next(
        families
        for (capabilities, *scheme), families in FAMILIES.items()
        if capability in capabilities and scheme == [weights, act_bits]
    )
    gpu.pretend(capability, 108, 99 * 1024)
    for tokens in TOKENS:
        for outputs, inputs in ((4096, 4096), (28672, 8192)):
            kernel = gpu.choose(
                *(tokens, outputs, inputs, group_size, act_bits, weight_bits),
                *(torch.bfloat16, None),
            )
            family = few if tokens <= 16 else some if tokens < 256 else many
            tile = kernel.removeprefix(family)
            assert tile == "" or tile[1:].replace("x", "").isdigit(), (tokens, kernel)
            assert kernel.startswith(family), (tokens, kernel)


def test_the_tile_suits_the_part_that_is_expanded_at_a_time(gpu: Any) -> None:
    """4096 of 28672 outputs, which 132 multiprocessors share."""
    gpu.pretend(90, 132, 227 * 1024)
    for tokens, tile in ((512, "128x64"), (600, "128x128"), (4096, "128x256")):
        kernel = gpu.choose(tokens, 28672, 8192, 64, 8, 4, torch.bfloat16, None)
        assert kernel == f"cutlass_sm90_s8_{tile}"


def test_the_presets_have_groups_and_layers_of_8_bits() -> None:
    """Otherwise the test above would be about less than it says."""
    assert {(bits, group) for _, bits, group in schemes()} == {
        *((4, group) for group in (-1, 32, 64, 128)),
        (8, -1),
    }


@pytest.mark.parametrize(
    ("capability", "tokens", "outputs", "act_bits", "weight_bits", "kernel"),
    [
        (80, 1, 4096, 4, 4, "small"),
        (80, 16, 4096, 8, 4, "small"),
        (80, 17, 4096, 4, 4, "cutlass_sm80_32x64"),
        (80, 128, 4096, 4, 4, "cutlass_sm80_32x64"),
        (80, 128, 28672, 4, 4, "cutlass_sm80_128x256"),
        (80, 128, 14336, 4, 4, "cutlass_sm80_128x128"),
        (80, 512, 4096, 4, 4, "cutlass_sm80_128x128"),
        (86, 2048, 4096, 4, 4, "cutlass_sm80_128x256"),
        (89, 64, 4096, 8, 4, "s8"),
        (90, 1, 4096, 4, 4, "small"),
        (90, 17, 4096, 4, 4, "cutlass_sm90_128x32"),
        (90, 4096, 4096, 8, 4, "cutlass_sm90_128x128"),
        (100, 4096, 4096, 4, 4, "s8"),
        (121, 4096, 4096, 8, 4, "s8"),
        (90, 16, 128256, 8, 8, "small"),
        (80, 512, 4096, 8, 8, "s8"),
        (90, 17, 128256, 8, 8, "cutlass_sm90_s8_128x64"),
        (90, 100, 28672, 8, 8, "cutlass_sm90_s8_128x128"),
        (90, 4096, 4096, 8, 8, "cutlass_sm90_s8_128x256"),
    ],
)
def test_the_kernel_suits_the_device_and_the_size(
    gpu: Any,
    capability: int,
    tokens: int,
    outputs: int,
    act_bits: int,
    weight_bits: int,
    kernel: str,
) -> None:
    gpu.pretend(capability, 108, 99 * 1024)
    chosen = gpu.choose(tokens, outputs, 4096, -1, act_bits, weight_bits, torch.bfloat16, None)
    assert chosen == kernel


@pytest.mark.parametrize(
    ("outputs", "group", "out_dtype", "bias_dtype"),
    [
        (4096, 128, torch.float16, None),  # group scales
        (4092, -1, torch.float16, None),  # outputs that 16-byte stores do not divide
        (4096, -1, torch.float32, None),
        (4096, -1, torch.float16, torch.float32),  # a bias of another dtype
    ],
)
def test_cutlass_is_not_asked_for_what_it_cannot_do(
    gpu: Any, outputs: int, group: int, out_dtype: torch.dtype, bias_dtype: torch.dtype | None
) -> None:
    assert gpu.choose(512, outputs, 4096, group, 4, 4, out_dtype, bias_dtype) == "s8"


@pytest.mark.parametrize(
    ("capability", "runs"),
    [
        (75, False),
        (80, True),
        (86, True),
        (89, True),
        (90, True),
        (91, False),
        (100, True),
        (103, True),
        (110, False),
        (121, True),
    ],
)
def test_machine_code_runs_within_its_family(gpu: Any, capability: int, runs: bool) -> None:
    assert gpu.runs_on("80 90a 100 120", capability) is runs
