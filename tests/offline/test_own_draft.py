# SPDX-License-Identifier: Apache-2.0
"""A model's own head for multi-token prediction is converted with it: kept where hidden states stay
the source's, transformed where R1 is folded, so that it drafts what it drafts for the source."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from refusal import edit_config, edit_weights, refusal
from simulated_gpu import GPU, simulated_gpu
from stored import load_weights
from test_draft import drafts, learned, rotated
from tiny_composites import save_tiny_composite
from tiny_heads import MtpHead, add_own_head
from transformers import AutoModelForCausalLM, PreTrainedModel

from smoothrot_offline.check.admit import admit
from smoothrot_offline.check.inspect import inspect
from smoothrot_offline.check.miniature import InFloat64
from smoothrot_offline.check.verify import compare_with_source, verify
from smoothrot_offline.config import make_config
from smoothrot_offline.convert import convert
from smoothrot_offline.report.model import load_model
from smoothrot_offline.source.checkpoint import open_checkpoint
from smoothrot_offline.source.resolve import resolve
from smoothrot_offline.transform.draft import EMBEDDING_NORM, FUSION, transform_own_head
from smoothrot_offline.transform.record import read_transform
from smoothrot_offline.transform.rotation import Orthogonal, random_rotation
from smoothrot_offline.transform.sides import ModelTransform
from smoothrot_vllm.format import DRAFT_INPUT, DRAFT_OUTPUT, Online

INPUT, OUTPUT = f"{DRAFT_INPUT}.weight", f"{DRAFT_OUTPUT}.weight"
CHANGED = {FUSION, EMBEDDING_NORM}
MIXTURES = ["qwen3_5_moe", "qwen3_next"]


@pytest.mark.parametrize("rotation", [lambda size: random_rotation(size, 3), learned])
def test_a_models_own_head_drafts_what_it_drafts_for_the_source(
    build_model: Callable[..., PreTrainedModel], rotation: Callable[[int], Orthogonal]
) -> None:
    model = build_model("qwen3_5", dtype=torch.float64)
    spec = resolve(model.config.to_dict() | {"architectures": [type(model).__name__]})
    transform = ModelTransform(spec, 3, rotation(spec.hidden), Online())
    head = MtpHead(model).double()
    embedding, gamma = model.model.embed_tokens.weight.detach(), model.model.norm.weight.detach()
    with InFloat64(), torch.no_grad():
        expected = drafts(model, head, embedding)
        own = dict(head.named_parameters())
        changed = transform_own_head(transform, gamma, {name: own[name] for name in CHANGED})
        for name in CHANGED:
            own[name].copy_(changed[name])
        converted = rotated(model, transform)
        shared = converted.model.embed_tokens.weight
        found = drafts(converted, head, shared, changed[OUTPUT], changed[INPUT])
        without = [
            drafts(converted, head, shared, changed[OUTPUT]),
            drafts(converted, head, shared, None, changed[INPUT]),
        ]
    assert expected.dtype == found.dtype == torch.float64
    assert (found - expected).norm() <= 1e-10 * expected.norm()
    assert min((other - expected).norm() for other in without) > 0.1 * expected.norm()


@pytest.fixture
def make_drafting(make_model: Callable[..., Path]) -> Callable[..., Path]:
    """Saves a random model with a head of its own."""

    def make(family: str = "qwen3_5", **options: Any) -> Path:
        source = make_model(family, **options)
        torch.manual_seed(3)
        return add_own_head(MtpHead(AutoModelForCausalLM.from_pretrained(source)), source)

    return make


def own_head(directory: Path) -> dict[str, torch.Tensor]:
    """Its tensors, by names after the module, those of each expert by itself."""
    checkpoint = open_checkpoint(directory, unpack=False)
    names = [name for name in checkpoint.tensors if name.startswith("mtp.")]
    return checkpoint.load_relative("mtp.", [name.removeprefix("mtp.") for name in names])


def test_a_head_is_kept_as_it_is_where_hidden_states_are(
    make_drafting: Callable[..., Path], tmp_path: Path
) -> None:
    source, out = make_drafting(), tmp_path / "out"
    online = make_config(scales="none", residual="online")
    assert "mtp.*: the head that drafts tokens stays 16-bit, as it is" in notes(source, online)
    convert(source, out, online)
    before, after = own_head(source), own_head(out)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert "mtp." in inspect(out).quantization.ignore
    assert verify(out).ok


@pytest.mark.parametrize("family", ["qwen3_5", *MIXTURES])
def test_a_head_is_transformed_with_its_model(
    make_drafting: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    source, out = make_drafting(family), tmp_path / "out"
    config = make_config(scales="none", seed=3)
    (note,) = (note for note in notes(source, config) if note.startswith("mtp.*: "))
    assert ("--residual online" in note) == (family not in MIXTURES)
    convert(source, out, config)
    before, after = own_head(source), own_head(out)
    assert len(before) > 12
    assert after.keys() == before.keys() | {INPUT, OUTPUT}
    recorded = read_transform(out)
    gamma = recorded.norms["model.norm"].double()
    read = {name: before[name].double() for name in CHANGED}
    changed = transform_own_head(recorded.transform, gamma, read)
    for name, tensor in after.items():
        expected = changed[name].bfloat16() if name in changed else before[name]
        assert torch.equal(tensor, expected), name
    assert not torch.equal(after[FUSION], before[FUSION])
    assert "mtp." in inspect(out).quantization.ignore
    assert verify(out).ok
    assert compare_with_source(out, source).problems == []


def test_a_head_is_transformed_on_a_gpu_to_the_bits_of_the_cpus(
    make_drafting: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, config = make_drafting(), make_config(scales="none")
    convert(source, tmp_path / "cpu", config)
    # The small model of a proof runs on the CPU wherever the conversion does.
    monkeypatch.setattr("smoothrot_offline.check.admit.prove", lambda _: None)
    with simulated_gpu(monkeypatch):
        convert(source, tmp_path / "gpu", config, device=GPU)
    expected, found = own_head(tmp_path / "cpu"), own_head(tmp_path / "gpu")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_without_rotations_the_linears_that_are_added_change_nothing(
    make_drafting: Callable[..., Path], tmp_path: Path
) -> None:
    source, out = make_drafting(), tmp_path / "out"
    convert(source, out, make_config(scales="none", rotate=False))
    after = own_head(out)
    assert torch.equal(after.pop(INPUT), torch.eye(72).bfloat16())
    assert torch.equal(after.pop(OUTPUT), torch.eye(72).bfloat16())
    assert all(torch.equal(after[name], tensor) for name, tensor in own_head(source).items())


def notes(source: Path, config: Any) -> list[str]:
    return admit(open_checkpoint(source), config).notes


def test_a_models_numbers_do_not_depend_on_its_head(
    make_drafting: Callable[..., Path], tmp_path: Path
) -> None:
    calibrated = {"calib": "generated", "calib_samples": 4, "calib_seqlen": 16}
    source, config = make_drafting(), make_config(distill_steps=2, **calibrated)
    convert(source, tmp_path / "with", config)
    edit_weights(source, drop(""))
    convert(source, tmp_path / "without", config)
    stored, others = load_weights(tmp_path / "with"), load_weights(tmp_path / "without")
    assert {name for name in stored if not name.startswith("mtp.")} == others.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in others.items())
    assert inspect(tmp_path / "without").quantization.ignore == [
        name for name in inspect(tmp_path / "with").quantization.ignore if name != "mtp."
    ]
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        found, expected = (
            load_model(tmp_path / name, torch.float32)(tokens).logits
            for name in ("with", "without")
        )
    assert torch.equal(found, expected)


def drop(name: str) -> Callable[[dict[str, torch.Tensor]], object]:
    """Removes tensors of the head whose names after its module begin so."""
    return lambda tensors: [
        tensors.pop(found) for found in list(tensors) if found.startswith(f"mtp.{name}")
    ]


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_moe"])
def test_the_head_of_a_model_that_sees_images_is_converted(family: str, tmp_path: Path) -> None:
    source, out = save_tiny_composite(tmp_path / "source", family), tmp_path / "out"
    add_own_head(MtpHead(load_model(source, torch.float32)), source)
    convert(source, out, make_config(scales="none"))
    before, after = own_head(source), own_head(out)
    assert after.keys() == before.keys() | {INPUT, OUTPUT}
    assert inspect(out).quantization.ignore[-1] == "mtp."
    assert verify(out).ok


def test_a_converted_head_that_is_lost_is_missed(
    make_drafting: Callable[..., Path], tmp_path: Path
) -> None:
    convert(make_drafting(), tmp_path / "out", make_config(scales="none"))
    index = tmp_path / "out" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = {
        name: file for name, file in content["weight_map"].items() if not name.startswith("mtp.")
    }
    index.write_text(json.dumps(content))
    problems = verify(tmp_path / "out").problems
    assert {f"tensor mtp.{name}: missing" for name in (FUSION, INPUT, OUTPUT)} <= set(problems)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda source: edit_weights(source, drop("fc")), "tensor mtp.fc.weight is missing"),
        (
            lambda source: edit_weights(
                source,
                lambda tensors: tensors.update({"mtp.embed_tokens.weight": torch.ones(96, 72)}),
            ),
            "tensor mtp.embed_tokens.weight .* has no place in this architecture",
        ),
        (
            lambda source: edit_weights(
                source, lambda tensors: tensors.update({"mtp.fc.weight": torch.ones(72, 72)})
            ),
            r"tensor mtp.fc.weight: expected shape \(72, 144\) .*got \(72, 72\)",
        ),
        (
            lambda source: edit_config(source, mtp_num_hidden_layers=2),
            "tensor mtp.layers.1.* is missing",
        ),
        (
            lambda source: edit_config(source, mtp_num_hidden_layers=0),
            "mtp_num_hidden_layers: expected a whole number from 1",
        ),
        (
            lambda source: edit_weights(
                source, lambda tensors: tensors["model.norm.weight"][5].fill_(-1)
            ),
            r"model.norm.weight of the base: .*got 0 for 1: .*Remove mtp.\* .*--residual online",
        ),
    ],
)
def test_other_heads_are_refused(
    make_drafting: Callable[..., Path], damage: Callable[[Path], None], message: str
) -> None:
    source = make_drafting()
    damage(source)
    assert re.search(message, str(refusal(source)))
