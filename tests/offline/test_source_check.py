# SPDX-License-Identifier: Apache-2.0
"""``verify --source``: codes derived again from the source, and what a forged checkpoint cannot
hide."""

from collections.abc import Callable
from pathlib import Path

import pytest
from refusal import edit_config
from stored import edit_file

from smoothrot_offline.check.verify import compare_with_source, verify
from smoothrot_offline.config import make_config
from smoothrot_offline.convert import convert

MakeModel = Callable[..., Path]
CALIBRATION = {"calib_samples": 2, "calib_seqlen": 16}
QUERY = "model.layers.0.self_attn.q_proj"


def made(
    make_model: MakeModel, tmp_path: Path, family: str = "llama", **options: object
) -> tuple[Path, Path]:
    # Nine groups of 32 beside ten: the widths of the tests' own model fit no group.
    sizes = {"hidden_size": 288, "intermediate_size": 320} if "group_size" in options else {}
    source = make_model(family, **sizes)
    convert(source, tmp_path / "out", make_config(**CALIBRATION | options))
    return source, tmp_path / "out"


@pytest.mark.parametrize(
    ("family", "options", "codes", "errors"),
    [
        ("llama", {"scales": "none", "activation_bits": 8}, 21, 0),
        ("llama", {"scales": "none", "group_size": 32}, 21, 0),
        ("llama", {"scales": "none", "rounding": "gptq", "group_size": 32}, 0, 21),
        ("llama", {"scales": "l2", "keep_8bit": 0.3, "sign_seeds": 2}, 21, 0),
        ("llama", {"scales": "search", "rounding": "gptq", "seed": 3}, 0, 21),
        ("llama", {"scales": "l2", "rotations": "learned", "rotation_steps": 5}, 21, 0),
        ("phi3", {"scales": "l2"}, 12, 0),
        ("gemma3", {"scales": "l2"}, 21, 0),
        ("gemma4", {"scales": "l2"}, 17, 0),
    ],
    ids=[
        "rtn",
        "groups",
        "gptq in groups",
        "smoothed",
        "gptq",
        "learned",
        "fused",
        "rotated online",
        "keys and values shared",
    ],
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


def test_one_changed_group_scale_is_found(make_model: MakeModel, tmp_path: Path) -> None:
    source, out = made(make_model, tmp_path, scales="none", group_size=32)
    name = f"{QUERY}.weight_group_scale"
    edit_file(out, name, lambda tensors: tensors[name].view(-1)[:1].bitwise_xor_(1))
    (problem,) = compare_with_source(out, source).problems
    assert problem.startswith(f"tensor {QUERY}: 1 bytes of codes or scales")


@pytest.mark.parametrize(
    ("byte", "words"),
    [(0x10, "expected group scales from 1 to 15, got 0 at [4, 8]"), (0x21, "got 2 in row 4")],
)
def test_unusable_group_scales_are_found_by_name(
    make_model: MakeModel, tmp_path: Path, byte: int, words: str
) -> None:
    _, out = made(make_model, tmp_path, scales="none", group_size=32)
    name = f"{QUERY}.weight_group_scale"
    file = edit_file(out, name, lambda tensors: tensors[name][4, 4].fill_(byte))
    unusable, changed = verify(out).problems
    assert unusable.startswith(f"tensor {name} in {file.name}: ")
    assert words in unusable
    assert "SHA-256" in changed
