# SPDX-License-Identifier: Apache-2.0
"""A draft head transformed for a converted model drafts what the original head drafts for the
original model."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_heads import EagleHead, MtpHead, save_head
from transformers import LlamaConfig, PreTrainedModel

from smoothrot_offline.check.miniature import InFloat64
from smoothrot_offline.config import make_config
from smoothrot_offline.convert import convert
from smoothrot_offline.source.family import ModelSpec
from smoothrot_offline.source.resolve import resolve
from smoothrot_offline.transform.draft import (
    EMBEDDING,
    FUSION,
    WEIGHTS_NAME,
    convert_head,
    transform_head,
)
from smoothrot_offline.transform.record import RecordedTransform, read_transform
from smoothrot_offline.transform.rotation import DenseRotation, Orthogonal, random_rotation
from smoothrot_offline.transform.sides import LayerScales, ModelTransform
from smoothrot_vllm.errors import (
    CheckpointError,
    ConfigError,
    SmoothRotError,
    UnsupportedModelError,
)
from smoothrot_vllm.format import ADAPTER_BASE, DRAFT_ARCHITECTURE, DRAFT_OUTPUT, Online

CALIBRATION = {"calib": "generated", "calib_samples": 2, "calib_seqlen": 16}
STEPS = 3
HEADS: dict[str, Any] = {"num_attention_heads": 9, "num_key_value_heads": 3}
OUTPUT = f"{DRAFT_OUTPUT}.weight"


def random_head(hidden: int, vocab: int) -> tuple[EagleHead, LlamaConfig]:
    torch.manual_seed(2)
    config = LlamaConfig(vocab_size=vocab, hidden_size=hidden, intermediate_size=152, **HEADS)
    head = EagleHead(config)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 2.0)
            else:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return head, config


def learned(size: int) -> Orthogonal:
    return DenseRotation(torch.linalg.qr(torch.randn(1, size, size, dtype=torch.float64))[0])


def rotated(model: PreTrainedModel, transform: ModelTransform) -> PreTrainedModel:
    """The model with norms and R1 folded, nothing left to a server."""
    spec, state = transform.spec, {name: t.clone() for name, t in model.state_dict().items()}
    for index in range(spec.layers):
        prefix = spec.layer_prefix(index)
        layer = {name: state[prefix + name] for name in spec.layer_tensors(index)}
        transform.layer(index, layer, LayerScales())
        state |= {prefix + name: tensor for name, tensor in layer.items()}
    gamma = state["model.norm.weight"]
    state["lm_head.weight"] = transform.head(state["lm_head.weight"], gamma)
    state["model.norm.weight"] = transform.final_norm(gamma)
    state["model.embed_tokens.weight"] = transform.embedding(state["model.embed_tokens.weight"])
    found = copy.deepcopy(model)
    found.load_state_dict(state)
    return found


def drafts(
    model: PreTrainedModel,
    head: EagleHead | MtpHead,
    embedding: torch.Tensor,
    output: torch.Tensor | None = None,
    read: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits of several steps of a head, each reading the tokens and hidden states of the last
    one; ``read`` and ``output`` are linears before and behind it."""
    tokens = torch.arange(40).reshape(2, 20) * 31 % embedding.shape[0]
    hidden, tokens = model.model(tokens).last_hidden_state[:, :-1], tokens[:, 1:]
    logits = []
    for _ in range(STEPS):
        if read is not None:
            hidden = hidden @ read.T
        hidden = head(embedding[tokens], hidden)
        if output is not None:
            hidden = hidden @ output.T
        logits.append(model.lm_head(hidden))
        tokens = logits[-1].argmax(-1)
    return torch.stack(logits)


@pytest.mark.parametrize("own", [False, True], ids=["shared embedding", "own embedding"])
@pytest.mark.parametrize("rotation", [lambda size: random_rotation(size, 3), learned])
@pytest.mark.parametrize("family", ["llama", "qwen3_5"])
def test_a_transformed_head_drafts_what_the_original_drafts(
    build_model: Callable[..., PreTrainedModel],
    family: str,
    rotation: Callable[[int], Orthogonal],
    own: bool,
) -> None:
    model = build_model(family, dtype=torch.float64)
    spec = resolve(model.config.to_dict() | {"architectures": [type(model).__name__]})
    transform = ModelTransform(spec, 3, rotation(spec.hidden), Online())
    head = random_head(spec.hidden, spec.vocab)[0].double()
    embedding = model.model.embed_tokens.weight.detach()
    if own:
        embedding = torch.randn(embedding.shape, dtype=torch.float64)
    with InFloat64(), torch.no_grad():
        expected = drafts(model, head, embedding)
        recorded = RecordedTransform(transform, {"model.norm": model.model.norm.weight}, [])
        changed = transform_head(recorded, head.fc.weight, embedding if own else None)
        head.fc.weight.copy_(changed[FUSION])
        converted = rotated(model, transform)
        shared = changed[EMBEDDING] if own else converted.model.embed_tokens.weight
        found = drafts(converted, head, shared, changed[OUTPUT])
        without = drafts(converted, head, shared)
    assert expected.dtype == found.dtype == torch.float64
    assert (found - expected).norm() <= 1e-10 * expected.norm()
    assert (without - expected).norm() > 0.1 * expected.norm()


def save_random_head(directory: Path, spec: ModelSpec, **config: Any) -> Path:
    head, own = random_head(spec.hidden, spec.vocab)
    save_head(head, own, directory)
    content = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(content | config))
    return directory


@pytest.fixture
def base(make_model: Callable[..., Path], tmp_path: Path) -> Path:
    convert(make_model(), tmp_path / "base", make_config(seed=3, **CALIBRATION))
    return tmp_path / "base"


def test_a_head_is_transformed_as_the_base_was(base: Path, tmp_path: Path) -> None:
    recorded = read_transform(base)
    source = load_file(tmp_path / "model" / "model.safetensors")
    assert torch.equal(recorded.norms["model.norm"], source["model.norm.weight"])
    head = save_random_head(tmp_path / "head", recorded.transform.spec)
    before = load_file(head / WEIGHTS_NAME)
    before[EMBEDDING] = source["model.embed_tokens.weight"]
    save_file(before, head / WEIGHTS_NAME)
    done = convert_head(head, tmp_path / "out", base)
    assert (done.layers, done.embedding) == (1, True)
    after = load_file(tmp_path / "out" / WEIGHTS_NAME)
    assert after.keys() == before.keys() | {OUTPUT}
    changed = transform_head(recorded, before[FUSION].double(), before[EMBEDDING].double())
    for name, tensor in after.items():
        assert torch.equal(tensor, changed.get(name, before.get(name)).bfloat16()), name
    # The same bits as the base's, which vLLM then keeps but once.
    embedded = load_file(base / "model-00001-of-00005.safetensors")
    assert torch.equal(after[EMBEDDING], embedded["model.embed_tokens.weight"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    quantization = json.loads((base / "config.json").read_text())["quantization_config"]
    assert config.pop(ADAPTER_BASE) == quantization["transform_sha256"] == done.base
    assert config.pop("architectures") == [DRAFT_ARCHITECTURE]
    original = json.loads((head / "config.json").read_text())
    assert config == {key: original[key] for key in original if key != "architectures"}


def edit(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def damage(head: Path) -> None:
        tensors = load_file(head / WEIGHTS_NAME)
        change(tensors)
        save_file(tensors, head / WEIGHTS_NAME)

    return damage


def configured(**options: Any) -> Callable[[Path], None]:
    def damage(head: Path) -> None:
        config = json.loads((head / "config.json").read_text())
        (head / "config.json").write_text(json.dumps(config | options))

    return damage


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (
            lambda head: (head / WEIGHTS_NAME).unlink(),
            CheckpointError,
            "pickles are never read",
        ),
        (edit(lambda tensors: tensors.pop(FUSION)), CheckpointError, "expected fc.weight, got lay"),
        (
            edit(lambda tensors: tensors.update({FUSION: torch.ones(72, 72)})),
            CheckpointError,
            r"tensor fc.weight: expected \(72, 144\), got \(72, 72\)",
        ),
        (
            edit(lambda tensors: tensors[FUSION].fill_(torch.nan)),
            CheckpointError,
            "fc.weight: expected finite floats",
        ),
        (
            edit(lambda tensors: tensors.update({"lm_head.weight": torch.ones(96, 72)})),
            UnsupportedModelError,
            "tensor lm_head.weight: expected fc.weight, embed_tokens.weight and tensors of layers",
        ),
        (
            configured(architectures=["LlamaForCausalLMEagle3"]),
            ConfigError,
            r"architectures: expected \['LlamaForCausalLM'\], got \['LlamaForCausalLMEagle3'\]",
        ),
        (configured(model_type="medusa"), ConfigError, "model_type: expected 'llama', got 'medusa"),
        (configured(hidden_size=64), ConfigError, "hidden_size: expected 72, got 64"),
        (configured(quantization_config={}), ConfigError, "quantization_config: expected None"),
        (configured(**{ADAPTER_BASE: "0" * 64}), ConfigError, "already transformed"),
    ],
)
def test_other_heads_are_refused_and_nothing_is_written(
    base: Path,
    tmp_path: Path,
    damage: Callable[[Path], Any],
    kind: type[SmoothRotError],
    message: str,
) -> None:
    head = save_random_head(tmp_path / "head", read_transform(base).transform.spec)
    damage(head)
    with pytest.raises(kind, match=message):
        convert_head(head, tmp_path / "out", base)
    assert not (tmp_path / "out").exists()


def test_a_base_with_the_sources_hidden_states_needs_no_other_head(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    config = make_config(residual="online", **CALIBRATION)
    convert(make_model(), tmp_path / "base", config)
    spec = read_transform(tmp_path / "base").transform.spec
    head = save_random_head(tmp_path / "head", spec)
    with pytest.raises(ConfigError, match="those of the original model"):
        convert_head(head, tmp_path / "out", tmp_path / "base")


def test_a_channel_that_the_final_norm_removed_is_refused(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    source = make_model()
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][5] = 0
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    convert(source, tmp_path / "base", make_config(**CALIBRATION))
    spec = read_transform(tmp_path / "base").transform.spec
    head = save_random_head(tmp_path / "head", spec)
    with pytest.raises(CheckpointError, match=r"model.norm.weight of the base: .*got 0 for 1: "):
        convert_head(head, tmp_path / "out", tmp_path / "base")
