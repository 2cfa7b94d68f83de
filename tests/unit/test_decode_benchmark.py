# SPDX-License-Identifier: Apache-2.0
"""benchmarks/decode.py on the CPU: its rehearsal, and the check that comes before our models are
timed."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import decode
import pytest
import torch
from decode_linears import StoredWeight, stored_weights
from decode_model import Pieces
from schemes import preset_schema

from smoothrot_offline.source.resolve import resolve

SPEC = resolve(decode.REHEARSAL)
PER_LAYER = 4


def test_the_dry_run_times_every_contender_and_checks_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "decode.json"
    monkeypatch.setattr(
        sys,
        "argv",
        ["decode.py", "--device", "cuda", "--minutes", "1.5", "--json", str(output), "--dry-run"],
    )
    threads = torch.get_num_threads()
    try:
        assert decode.main() == 0
    finally:
        torch.set_num_threads(threads)
    report = json.loads(output.read_text())
    timed = [(r["contender"], r["batch"]) for r in report["results"]]
    assert timed == [(name, batch) for name in decode.CONTENDERS for batch in (1, 16, 64)]
    assert (report["failed"], report["missing_peers"], report["left_out"]) == ({}, {}, [])
    assert {case.removeprefix("rehearsal, ") for case in report["checks"]} == set(decode.OURS)
    for r in report["results"]:
        assert r["ms_per_step"] > 0
        assert r["tokens_per_s"] == pytest.approx(1e3 * r["batch"] / r["ms_per_step"], rel=0.01)
        assert (r["bf16_ratio"] == 1.0) or r["contender"] != "bf16"
    weights = {r["contender"]: r["weight_bytes"] for r in report["results"]}
    assert weights["balanced_w4a8"] < weights["fp8"] < weights["bf16"]


def _agreement(
    preset: str, act_bits: int, spoilt: int | None = None, spoil: str = ""
) -> dict[str, float]:
    """Of ours with one weight spoilt, against the bfloat16 model of what the weights were
    before."""
    weights = list(stored_weights(SPEC, preset_schema(SPEC, preset, act_bits)))
    reference = [weight.dequantized() for weight in weights]
    if spoilt is not None:
        found = weights[spoilt]
        changes: dict[str, StoredWeight] = {
            "scale of another output": replace(
                found, scale=found.scale.roll(1, dims=0).contiguous()
            ),
            "scale of another group": replace(
                found, scale=found.scale.roll(1, dims=1).contiguous()
            ),
            "no rotation": replace(found, block=0),
        }
        weights[spoilt] = changes[spoil]
    return decode.agreement(SPEC, weights, reference, Pieces())


@pytest.mark.parametrize(("preset", "act_bits"), decode.OURS.values())
def test_ours_gives_what_the_dequantised_weights_give(preset: str, act_bits: int) -> None:
    assert decode.agrees(_agreement(preset, act_bits), act_bits)


@pytest.mark.parametrize("act_bits", [8, 4])
@pytest.mark.parametrize(
    ("spoilt", "spoil"),
    [
        *((index, "scale of another output") for index in range(PER_LAYER * SPEC.layers + 1)),
        *((index, "scale of another group") for index in range(PER_LAYER)),
        (3, "no rotation"),
    ],
)
def test_the_check_fails_if_one_linear_is_wrong(act_bits: int, spoilt: int, spoil: str) -> None:
    assert not decode.agrees(_agreement("balanced", act_bits, spoilt, spoil), act_bits)


def test_the_logits_alone_fail_if_the_head_is_wrong() -> None:
    cosines = _agreement("balanced", 8, PER_LAYER * SPEC.layers, "scale of another output")
    assert cosines["logits"] < decode.LEAST_COSINES[8]["logits"]


def test_a_model_that_fails_its_check_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "LEAST_COSINES", {8: {"logits": 1.01}})
    args = decode.parse(["--dry-run", "--contenders", "bf16", "best_w4a8", "--batches", "1"])
    report = decode.run(args, decode.Rehearsal())
    assert [r["contender"] for r in report["results"]] == ["bf16"]
    assert list(report["failed"]) == ["rehearsal, best_w4a8"]
