# SPDX-License-Identifier: Apache-2.0
"""What is done to weights with group scales before a product: the layout that the GEMMs read, and
int8 weights for those that know no groups."""

import pytest
import torch
from emulator import Emulator, packed_groups

from smoothrot_vllm import reference


def weights(
    experts: int, outputs: int, inputs: int, group: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random codes, and group scales with every value that a nibble holds."""
    codes = torch.randint(0, 256, (experts, outputs, inputs // 2), dtype=torch.uint8)
    scales = torch.randint(0, 16, (experts, outputs, inputs // group), dtype=torch.uint8)
    return codes, scales


@pytest.mark.parametrize("reverse", [0, 1])
@pytest.mark.parametrize(
    ("experts", "outputs", "inputs", "group"),
    [(1, 1, 32, 32), (1, 33, 288, 32), (3, 5, 1088, 64), (2, 40, 128, 128), (0, 8, 64, 32)],
)
def test_a_weight_with_groups_is_packed_as_the_kernels_read_it(
    emulator_int4: Emulator, reverse: int, experts: int, outputs: int, inputs: int, group: int
) -> None:
    weight, group_scale = weights(experts, outputs, inputs, group)
    with emulator_int4.options(reverse_order=reverse):
        packed = emulator_int4.prepack_groups(weight, group_scale)
    assert torch.equal(packed, packed_groups(weight, group_scale))


def test_a_group_scale_is_where_launch_h_says(emulator_int4: Emulator) -> None:
    """Group 8 w + i of row n in bits 4 i of the word at N K / 2 + 4 (n ceil(G / 8) + w)."""
    outputs, inputs, group = 3, 1056, 32
    weight, group_scale = weights(1, outputs, inputs, group)
    packed = emulator_int4.prepack_groups(weight, group_scale)[0]
    words = packed[outputs * inputs // 2 :].view(torch.int32)
    for n in range(outputs):
        for g in range(inputs // group):
            word = int(words[n * 5 + g // 8])
            assert word >> 4 * (g % 8) & 15 == group_scale[0, n, g]


@pytest.mark.parametrize("reverse", [0, 1])
@pytest.mark.parametrize(
    ("outputs", "inputs", "group"), [(1, 32, 32), (33, 288, 32), (5, 1088, 64), (40, 128, 128)]
)
def test_a_weight_is_expanded_to_codes_times_scales(
    emulator_int4: Emulator, reverse: int, outputs: int, inputs: int, group: int
) -> None:
    weight, group_scale = (stack[0] for stack in weights(1, outputs, inputs, group))
    expected = reference.scaled_codes(weight, group_scale, 4)
    for first, count in ((0, outputs), (outputs // 2, outputs - outputs // 2), (outputs - 1, 1)):
        with emulator_int4.options(reverse_order=reverse):
            got = emulator_int4.expand_weight(weight, group_scale, first, count)
        assert torch.equal(got[:-1], expected[first : first + count])
        assert (got[-1] == 99).all()


def test_outputs_that_are_not_there_are_refused(emulator_int4: Emulator) -> None:
    weight, group_scale = (stack[0] for stack in weights(1, 8, 64, 32))
    for first, count in ((-1, 2), (0, 0), (4, 5)):
        with pytest.raises(RuntimeError, match="cudaError 1"):
            emulator_int4.expand_weight(weight, group_scale, first, count)
