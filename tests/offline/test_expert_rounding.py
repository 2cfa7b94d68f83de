# SPDX-License-Identifier: Apache-2.0
"""Error-compensated rounding of experts: each for its own tokens, the same of both models, and
little of few."""

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stored import load_weights

import smoothrot_offline.decide.stages
import smoothrot_offline.rounding.sequential
from smoothrot_offline.config import make_config
from smoothrot_offline.convert import convert
from smoothrot_offline.rounding.gptq import quantize_gptq
from smoothrot_offline.rounding.rtn import QuantizedWeight
from smoothrot_offline.rounding.served import BuiltLayer
from smoothrot_offline.source.checkpoint import open_checkpoint
from smoothrot_offline.source.layers import LayerRunner, embed
from smoothrot_offline.source.resolve import resolve

MakeModel = Callable[..., Path]
TOKENS = torch.arange(40).reshape(2, 20) * 31 % 96
FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe", "deepseek_v3")


def options(**changes: Any) -> dict[str, Any]:
    return {"calib_samples": 2, "calib_seqlen": 20, "scales": "none"} | changes


def content(directory: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in directory.iterdir()
    }


def codes(directory: Path) -> dict[str, torch.Tensor]:
    tensors = load_weights(directory)
    return {name: tensor for name, tensor in tensors.items() if name.endswith("weight_packed")}


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_of_experts_follow_the_routing_that_is_given(
    make_model: MakeModel, family: str
) -> None:
    checkpoint = open_checkpoint(make_model(family, dtype=torch.float32))
    spec, name = resolve(checkpoint.config), "model.embed_tokens.weight"
    index = spec.layers - 1
    tensors = checkpoint.load_relative(spec.layer_prefix(index), spec.layer_tensors(index))
    middle, table = embed(TOKENS, checkpoint.load([name])[name]), spec.layer_table(index)
    model, layer = LayerRunner(spec).build(index, tensors)
    copy = BuiltLayer(model, layer, spec, table, {})
    gated, downs = table.expert_groups()
    linears = [group[0] for group in gated + downs]
    own, routing = copy.expert_inputs(middle, linears)
    router = f"{table.feed_forward}.gate"
    normed = copy.feed_forward_input(router, middle).flatten(0, -2)
    torch.testing.assert_close(routing, normed @ tensors[f"{router}.weight"].T)
    chooser = layer.get_submodule(router)
    _, chosen_of_own = chooser.choose(routing)
    # Another routing, which leaves the last expert out: a correction alone must not choose it.
    for correction in chooser.buffers():
        correction[-1] = -1.0
    other = routing.roll(1, dims=1).index_fill(1, torch.tensor([spec.experts - 1]), -torch.inf)
    forced, _ = copy.expert_inputs(middle, linears, other)
    _, chosen_of_other = chooser.choose(other)
    for found, chosen in ((own, chosen_of_own), (forced, chosen_of_other)):
        for expert, ((gate, up), (down,)) in enumerate(zip(gated, downs, strict=True)):
            x = normed[(chosen == expert).any(dim=-1)]
            assert (gate in found) == (down in found) == (len(x) > 0)
            if len(x):
                product = torch.nn.functional.silu(x @ tensors[f"{gate}.weight"].T) * (
                    x @ tensors[f"{up}.weight"].T
                )
                torch.testing.assert_close(found[gate], x)
                torch.testing.assert_close(found[down], product)
    assert gated[-1][0] not in forced


def test_experts_with_no_tokens_round_to_nearest_and_with_few_are_named(
    make_model: MakeModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(
        smoothrot_offline.decide.stages, "load_calibration", lambda *_: TOKENS[:1, :3]
    )
    source = make_model("qwen3_moe", num_hidden_layers=1)
    found = {}
    damped: dict[str, float] = {}

    def recording(weight: torch.Tensor, *arguments: Any, **options: Any) -> QuantizedWeight:
        damped[options["name"]] = options["damping"] / weight.shape[1]
        return quantize_gptq(weight, *arguments, **options)

    monkeypatch.setattr(smoothrot_offline.rounding.sequential, "quantize_gptq", recording)
    for rounding in ("rtn", "gptaq"):
        with caplog.at_level(logging.WARNING, "smoothrot_offline"):
            convert(source, tmp_path / rounding, make_config(**options(rounding=rounding)))
        found[rounding] = codes(tmp_path / rounding)
    (warning,) = [
        record.getMessage()
        for record in caplog.records
        if "routed to these experts" in record.getMessage()
    ]
    assert warning.startswith("decoder layer 0: ")
    named = {
        int(word.split()[0]): int(word.split("(")[1][:-1])
        for word in warning.split("(tokens): ")[1].split(". ")[0].split(", ")
    }
    # Three tokens of two experts each.
    assert list(named) == list(range(6))
    assert sum(named.values()) == 6
    assert 0 in named.values()
    for expert, tokens in named.items():
        names = [
            f"model.layers.0.mlp.experts.{expert}.{kind}_proj.weight"
            for kind in ("gate", "up", "down")
        ]
        as_nearest = [
            torch.equal(found["rtn"][f"{name}_packed"], found["gptaq"][f"{name}_packed"])
            for name in names
        ]
        assert all(as_nearest) == (tokens == 0), expert
        assert [damped[name] for name in names] == pytest.approx([0.01 / max(1, tokens)] * 3)
    assert damped["model.layers.0.self_attn.o_proj.weight"] == pytest.approx(0.01 / (9 * 12))


def test_experts_with_enough_tokens_are_not_named(
    make_model: MakeModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(
        smoothrot_offline.decide.stages,
        "load_calibration",
        lambda *_: torch.arange(1280).reshape(64, 20) * 31 % 96,
    )
    with caplog.at_level(logging.WARNING, "smoothrot_offline"):
        convert(
            make_model("mixtral", num_hidden_layers=1, num_experts_per_tok=4),
            tmp_path / "out",
            make_config(**options(rounding="gptq", calib_samples=64)),
        )
    assert [record.getMessage() for record in caplog.records] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_an_interrupted_conversion_ends_with_the_bytes_of_any_other_run(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    monkeypatch.setattr(smoothrot_offline.decide.stages, "load_calibration", lambda *_: TOKENS)
    source = make_model(family)
    config = make_config(
        **options(scales="l2", smooth_norms=True, rounding="gptaq", clip_search=True, keep_8bit=0.3)
    )

    def stop(message: str, _done: int, _total: int) -> None:
        if message == "layer 3 of 3":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", config, stop)
    assert convert(source, tmp_path / "out", config).resumed_layers == 2
    convert(source, tmp_path / "again", config)
    assert content(tmp_path / "out") == content(tmp_path / "again")
