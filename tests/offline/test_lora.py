# SPDX-License-Identifier: Apache-2.0
"""An adapter transformed for a converted model adds to its weights what the original adds to the
original's."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from stored import load_weights
from transformers import PreTrainedModel

from smoothrot_offline.config import make_config
from smoothrot_offline.convert import convert
from smoothrot_offline.source.resolve import resolve
from smoothrot_offline.transform.lora import WEIGHTS_NAME, convert_adapter, transform_factors
from smoothrot_offline.transform.record import RecordedTransform, read_transform
from smoothrot_offline.transform.rotation import DenseRotation, hadamard
from smoothrot_offline.transform.sides import LayerScales, ModelTransform
from smoothrot_vllm.errors import (
    CheckpointError,
    ConfigError,
    SmoothRotError,
    UnsupportedModelError,
)
from smoothrot_vllm.format import ADAPTER_BASE, ADAPTER_CONFIG

RANK = 4
CALIBRATION = {"calib": "generated", "calib_samples": 2, "calib_seqlen": 16}


def orthogonal(*shape: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(*shape, dtype=torch.float64))[0]


@pytest.mark.parametrize("learned", [False, True], ids=["hadamard", "learned"])
@pytest.mark.parametrize("smoothed", [False, True], ids=["no scales", "scales"])
@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3", "gemma4", "qwen3_5"])
def test_transformed_factors_add_what_the_transformed_sum_adds(
    build_model: Callable[..., PreTrainedModel], family: str, smoothed: bool, learned: bool
) -> None:
    model = build_model(family, dtype=torch.float64)
    spec = resolve(model.config.to_dict() | {"architectures": [type(model).__name__]})
    transform = ModelTransform.of(spec, make_config(scales="none"))
    if learned:
        residual = (
            None
            if transform.residual is None
            else DenseRotation(orthogonal(1, spec.hidden, spec.hidden))
        )
        heads = [
            orthogonal(spec.kv_heads, spec.head_dim, spec.head_dim) for _ in range(spec.layers)
        ]
        transform = replace(transform, residual=residual, heads=heads)
    prefix, table = spec.layer_prefix(0), spec.layer_table(0)
    state = model.state_dict()
    layer = {name: state[prefix + name] for name in spec.layer_tensors(0)}
    norms = {prefix + norm: layer[f"{norm}.weight"] for norm in table.readers}
    scales = LayerScales()
    if smoothed:
        down, *of_norms = (
            torch.rand(size).double() + 0.5
            for size in (spec.intermediate, spec.hidden, spec.hidden)
        )
        scales = LayerScales(down, dict(zip(table.readers, of_norms, strict=True)))
    factors = {
        linear: (torch.randn(RANK, inputs).double(), torch.randn(outputs, RANK).double())
        for linear, (outputs, inputs) in (
            (linear, spec.linear_shape(linear)) for linear in table.linears
        )
    }
    adapted = {name: tensor.clone() for name, tensor in layer.items()}
    for linear, (a, b) in factors.items():
        adapted[f"{linear}.weight"] += b @ a
    for tensors in (layer, adapted):
        transform.layer(0, tensors, scales)
    recorded = RecordedTransform(transform, norms, [scales, LayerScales(), LayerScales()])
    for linear, (a, b) in factors.items():
        new_a, new_b = transform_factors(recorded, 0, linear, a, b)
        rotation = transform.online.rotation(linear)
        added = new_b @ (new_a if rotation is None else hadamard(new_a, rotation.block))
        expected = adapted[f"{linear}.weight"] - layer[f"{linear}.weight"]
        assert (added - expected).norm() <= 1e-10 * expected.norm(), linear


def test_an_adapter_of_keys_that_are_values_too_is_refused(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    convert(make_model("gemma4_large"), tmp_path / "base", make_config(scales="none"))
    shapes = {"model.layers.1.self_attn.k_proj": (20, 72)}
    adapter = save_adapter(tmp_path / "adapter", shapes)
    with pytest.raises(UnsupportedModelError, match=r"outputs are those of self_attn\.v_proj too"):
        convert_adapter(adapter, tmp_path / "out", tmp_path / "base")


def save_adapter(directory: Path, linears: dict[str, tuple[int, int]], **config: Any) -> Path:
    """A random PEFT adapter of the linears with these full names and ``(out, in)`` shapes."""
    directory.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for linear, (outputs, inputs) in linears.items():
        tensors[f"base_model.model.{linear}.lora_A.weight"] = torch.randn(
            RANK, inputs, generator=generator
        )
        tensors[f"base_model.model.{linear}.lora_B.weight"] = torch.randn(
            outputs, RANK, generator=generator
        )
    save_file(tensors, directory / WEIGHTS_NAME)
    modules = sorted({linear.rpartition(".")[2] for linear in linears})
    content = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 8,
        "target_modules": modules,
        "bias": "none",
    }
    (directory / ADAPTER_CONFIG).write_text(json.dumps(content | config))
    return directory


@pytest.fixture
def base(make_model: Callable[..., Path], tmp_path: Path) -> Path:
    convert(make_model(), tmp_path / "base", make_config(seed=3, sign_seeds=2, **CALIBRATION))
    return tmp_path / "base"


QUERY, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj"
SHAPES = {QUERY: (72, 72), DOWN: (72, 152)}


def test_an_adapter_is_transformed_as_the_base_was(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", SHAPES, use_rslora=True)
    done = convert_adapter(adapter, tmp_path / "out", base)
    assert (done.linears, done.layers) == (2, 2)
    before, after = load_file(adapter / WEIGHTS_NAME), load_file(tmp_path / "out" / WEIGHTS_NAME)
    assert before.keys() == after.keys()
    recorded = read_transform(base)
    for index, linear in ((0, "self_attn.q_proj"), (2, "mlp.down_proj")):
        names = [
            f"base_model.model.model.layers.{index}.{linear}.lora_{factor}.weight"
            for factor in "AB"
        ]
        expected = transform_factors(
            recorded, index, linear, *(before[name].double() for name in names)
        )
        for name, tensor in zip(names, expected, strict=True):
            assert torch.equal(after[name], tensor.float())
    config = json.loads((tmp_path / "out" / ADAPTER_CONFIG).read_text())
    quantization = json.loads((base / "config.json").read_text())["quantization_config"]
    assert config.pop(ADAPTER_BASE) == quantization["transform_sha256"] == done.base
    assert config == json.loads((adapter / ADAPTER_CONFIG).read_text())


def test_the_recorded_transform_is_the_one_that_was_folded(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Of a base at 8 bits, whose weights are near enough to tell: learned rotations, searched
    scales and a chosen seed."""
    options = {
        "rotations": "learned",
        "rotation_steps": 2,
        "scales": "search",
        "smooth_norms": True,
        "sign_seeds": 2,
    }
    source = make_model()
    convert(
        source,
        tmp_path / "base",
        make_config(weight_bits=8, activation_bits=8, **options, **CALIBRATION),
    )
    recorded = read_transform(tmp_path / "base")
    spec, stored = (
        recorded.transform.spec,
        load_weights(tmp_path / "base"),
    )
    original = load_file(source / "model.safetensors")
    prefix = spec.layer_prefix(1)
    layer = {name: original[prefix + name].double() for name in spec.layer_tensors(1)}
    recorded.transform.layer(1, layer, recorded.scales[1])
    for linear in spec.layer_table(1).linears:
        codes, scale = (
            stored[f"{prefix}{linear}.weight_packed"],
            stored[f"{prefix}{linear}.weight_scale"],
        )
        weight = layer[f"{linear}.weight"]
        assert (codes.double() * scale - weight).norm() < 0.02 * weight.norm(), linear
    assert torch.equal(
        recorded.norms[f"{prefix}input_layernorm"], original[f"{prefix}input_layernorm.weight"]
    )


def no_weights(adapter: Path) -> None:
    (adapter / WEIGHTS_NAME).unlink()


def edit(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def damage(adapter: Path) -> None:
        tensors = load_file(adapter / WEIGHTS_NAME)
        change(tensors)
        save_file(tensors, adapter / WEIGHTS_NAME)

    return damage


def configured(**options: Any) -> Callable[[Path], None]:
    def damage(adapter: Path) -> None:
        config = json.loads((adapter / ADAPTER_CONFIG).read_text())
        (adapter / ADAPTER_CONFIG).write_text(json.dumps(config | options))

    return damage


FACTOR = f"base_model.model.{QUERY}.lora_A.weight"


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (no_weights, CheckpointError, "pickles are never read"),
        (
            lambda adapter: (adapter / WEIGHTS_NAME).write_bytes(b"x" * 40),
            CheckpointError,
            "expected a whole safetensors file",
        ),
        (
            edit(lambda tensors: tensors.pop(FACTOR)),
            CheckpointError,
            f"{QUERY}: expected lora_A and lora_B, missing lora_A",
        ),
        (
            edit(lambda tensors: tensors[FACTOR].fill_(torch.inf)),
            CheckpointError,
            "expected finite floats",
        ),
        (
            edit(lambda tensors: tensors.update({FACTOR: torch.zeros(RANK, 70)})),
            CheckpointError,
            r"lora_A \(rank, 72\)",
        ),
        (
            edit(lambda tensors: tensors.update(x=torch.zeros(1))),
            UnsupportedModelError,
            "tensor x: expected base_model.model",
        ),
        (configured(use_dora=True), ConfigError, "use_dora: expected False, got True"),
        (configured(modules_to_save=["lm_head"]), ConfigError, "modules_to_save"),
        (
            configured(init_lora_weights="pissa_niter_4"),
            ConfigError,
            "changes the base model's weights",
        ),
        (configured(**{ADAPTER_BASE: "0" * 64}), ConfigError, "already transformed"),
    ],
)
def test_other_adapters_are_refused_and_nothing_is_written(
    base: Path,
    tmp_path: Path,
    damage: Callable[[Path], Any],
    kind: type[SmoothRotError],
    message: str,
) -> None:
    adapter = save_adapter(tmp_path / "adapter", SHAPES)
    damage(adapter)
    with pytest.raises(kind, match=message):
        convert_adapter(adapter, tmp_path / "out", base)
    assert not (tmp_path / "out").exists()


def test_a_head_or_another_models_linear_is_refused(base: Path, tmp_path: Path) -> None:
    for name, linear in (("head", "lm_head"), ("later", "model.layers.9.mlp.up_proj")):
        adapter = save_adapter(tmp_path / name, {linear: (96, 72)})
        with pytest.raises(
            UnsupportedModelError,
            match=f"adapter of {linear}: expected a linear of one of the 3 decoder layers",
        ):
            convert_adapter(adapter, tmp_path / "out", base)


def test_a_base_with_another_transform_is_refused(base: Path, tmp_path: Path) -> None:
    file = base / "smoothrot_transform.st"
    tensors = load_file(file)
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, file)
    with pytest.raises(CheckpointError, match=r"smoothrot_transform\.st: expected SHA-256"):
        convert_adapter(save_adapter(tmp_path / "adapter", SHAPES), tmp_path / "out", base)


def test_a_base_without_its_transform_is_refused(base: Path, tmp_path: Path) -> None:
    (base / "smoothrot_transform.st").unlink()
    with pytest.raises(CheckpointError, match="expected the transform of a converted model"):
        convert_adapter(save_adapter(tmp_path / "adapter", SHAPES), tmp_path / "out", base)
