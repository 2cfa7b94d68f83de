# SPDX-License-Identifier: Apache-2.0
"""``verify --source``: codes derived again from the source, and what a forged checkpoint cannot
hide."""

from collections.abc import Callable
from pathlib import Path

import pytest
from stored import edit_file
from test_refusals import edit_config

from smoothrot_offline.check.verify import compare_with_source
from smoothrot_offline.config import make_config
from smoothrot_offline.convert import convert

MakeModel = Callable[..., Path]
CALIBRATION = {"calib_samples": 2, "calib_seqlen": 16}
QUERY = "model.layers.0.self_attn.q_proj"


def made(
    make_model: MakeModel, tmp_path: Path, family: str = "llama", **options: object
) -> tuple[Path, Path]:
    source = make_model(family)
    convert(source, tmp_path / "out", make_config(**CALIBRATION | options))
    return source, tmp_path / "out"


@pytest.mark.parametrize(
    ("family", "options", "codes", "errors"),
    [
        ("llama", {"scales": "none", "group_size": -1, "activation_bits": 8}, 21, 0),
        ("llama", {"scales": "l2", "keep_8bit": 0.3, "sign_seeds": 2}, 21, 0),
        ("llama", {"scales": "search", "rounding": "gptq", "seed": 3}, 0, 21),
        ("llama", {"scales": "l2", "rotations": "learned", "rotation_steps": 5}, 21, 0),
        ("phi3", {"scales": "l2"}, 12, 0),
        ("gemma3", {"scales": "l2"}, 21, 0),
    ],
    ids=["rtn", "smoothed", "gptq", "learned", "fused", "rotated online"],
)
def test_says_what_was_compared(
    make_model: MakeModel,
    tmp_path: Path,
    family: str,
    options: dict[str, object],
    codes: int,
    errors: int,
) -> None:
    source, out = made(make_model, tmp_path, family, **options)
    found = compare_with_source(out, source)
    assert found.problems == []
    assert (found.codes, found.errors) == (codes, errors)


@pytest.mark.parametrize(
    ("rounding", "words"), [("rtn", "1 bytes of codes"), ("gptq", "relative weight error")]
)
def test_one_changed_code_is_found(
    make_model: MakeModel, tmp_path: Path, rounding: str, words: str
) -> None:
    source, out = made(make_model, tmp_path, scales="none", rounding=rounding)
    name = f"{QUERY}.weight_packed"
    edit_file(out, name, lambda tensors: tensors[name][3, 5].bitwise_xor_(0b100))
    (problem,) = compare_with_source(out, source).problems
    assert QUERY in problem
    assert words in problem


def test_another_source_is_named_by_file(make_model: MakeModel, tmp_path: Path) -> None:
    source, out = made(make_model, tmp_path, scales="none")
    edit_config(source, rms_norm_eps=1e-3)
    (problem,) = compare_with_source(out, source).problems
    assert "config.json: not the file that was converted" in problem
