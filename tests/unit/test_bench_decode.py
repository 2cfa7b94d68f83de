# SPDX-License-Identifier: Apache-2.0
"""The check that comes before benchmarks.kernels.decode times our models. Its rehearsal is a step
of ``make gpu-proof-dry-run``."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from benchmarks.kernels import decode
from benchmarks.kernels.cuda import Rehearsal
from benchmarks.kernels.decode_linears import OURS, StoredWeight, stored_weights
from benchmarks.kernels.decode_model import Pieces
from benchmarks.kernels.schemes import preset_schema
from smoothrot_offline.source.resolve import resolve

SPEC = resolve(decode.REHEARSAL)
PER_LAYER = 4


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """What is tiny is only held up by more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _agreement(
    preset: str, act_bits: int, spoilt: int | None = None, spoil: str = ""
) -> dict[str, float]:
    """Of ours with one weight spoilt, against the bfloat16 model of what the weights were
    before."""
    weights = list(stored_weights(SPEC, preset_schema(SPEC, preset, act_bits)))
    reference = [weight.dequantized() for weight in weights]
    if spoilt is not None:
        weights[spoilt] = _spoilt(weights[spoilt], spoil)
    return decode.agreement(SPEC, weights, reference, Pieces())


def _in_groups() -> list[int]:
    """The first linear of each kind that the preset does not keep at 8 bits."""
    weights = list(stored_weights(SPEC, preset_schema(SPEC, "balanced", 8)))
    found = [
        next(
            i
            for i in range(kind, len(weights) - 1, PER_LAYER)
            if weights[i].weight.group_scale is not None
        )
        for kind in range(PER_LAYER)
    ]
    return found


IN_GROUPS = _in_groups()


def _spoilt(stored: StoredWeight, spoil: str) -> StoredWeight:
    if spoil == "no rotation":
        return replace(stored, block=0)
    scale, group_scale = stored.weight.scale, stored.weight.group_scale
    if spoil == "scale of another output":
        scale = scale.roll(1, 0).contiguous()
    elif group_scale is not None:
        group_scale = group_scale.roll(1, 1).contiguous()
    else:
        pytest.fail("expected a linear in groups")
    return replace(stored, weight=replace(stored.weight, scale=scale, group_scale=group_scale))


@pytest.mark.parametrize(("preset", "act_bits"), OURS.values())
def test_ours_gives_what_the_dequantized_weights_give(preset: str, act_bits: int) -> None:
    assert decode.agrees(_agreement(preset, act_bits), act_bits)


@pytest.mark.parametrize("act_bits", [8, 4])
@pytest.mark.parametrize(
    ("spoilt", "spoil"),
    [
        *(
            (index, "scale of another output")
            for index in (*range(PER_LAYER), PER_LAYER * SPEC.layers)
        ),
        *((index, "scale of another group") for index in IN_GROUPS),
        (3, "no rotation"),
    ],
)
def test_the_check_fails_if_one_linear_is_wrong(act_bits: int, spoilt: int, spoil: str) -> None:
    assert not decode.agrees(_agreement("balanced", act_bits, spoilt, spoil), act_bits)


def test_the_logits_alone_fail_if_the_head_is_wrong() -> None:
    cosines = _agreement("balanced", 8, PER_LAYER * SPEC.layers, "scale of another output")
    assert cosines["logits"] < decode.LEAST_COSINES[8]["logits"]


def test_a_model_that_fails_its_check_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "LEAST_COSINES", {8: {"logits": 1.01}})
    args = decode.parse(["--dry-run", "--contenders", "bf16", "best_w4a8", "--batches", "1"])
    report = decode.run(args, Rehearsal())
    assert [r["contender"] for r in report["results"]] == ["bf16"]
    assert list(report["failed"]) == ["rehearsal, best_w4a8"]
