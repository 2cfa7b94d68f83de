# SPDX-License-Identifier: Apache-2.0
"""Every fold leaves the logits as they were, in float64, for each family and its odd shapes."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from family_models import FOLDED, MODELS, NORMED, SMOOTHED, TABLES
from moe_models import with_separate_experts
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from smoothrot_offline.check.miniature import InFloat64
from smoothrot_offline.config import make_config, online_rotations
from smoothrot_offline.source.experts import separate_experts
from smoothrot_offline.source.family import ModelSpec
from smoothrot_offline.source.resolve import resolve
from smoothrot_offline.transform.rotation import (
    DenseRotation,
    hadamard,
    head_matrices,
    random_rotation,
    random_signs,
)
from smoothrot_offline.transform.sides import (
    LayerScales,
    ModelTransform,
    down_rotation,
    fold,
    head_rotation,
    online_residual_rotation,
    smoothing,
)
from smoothrot_vllm.errors import CheckpointError
from smoothrot_vllm.format import Online
from smoothrot_vllm.hadamard import choose_block
from smoothrot_vllm.reference import hadamard_transform

Tensors = dict[str, torch.Tensor]


class Subject:
    """A float64 model, what it computes, and a copy of its tensors to transform."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.spec = resolve(model.config.to_dict())
        self.tokens = torch.arange(40).reshape(2, 20) * 31 % self.spec.vocab
        weights = with_separate_experts(model, self.spec).state_dict()
        self._original = self._model(model.config, weights)
        self.tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        # Whatever was tied is two tensors from here on.
        self.tensors["lm_head.weight"] = self.tensors["lm_head.weight"].clone()

    def each_layer(self, fold: Callable[[Tensors, int], None]) -> None:
        for index in range(self.spec.layers):
            prefix = self.spec.layer_prefix(index)
            layer = {
                name.removeprefix(prefix): self.tensors[name]
                for name in self.tensors
                if name.startswith(prefix)
            }
            fold(layer, index)
            self.tensors |= {prefix + name: tensor for name, tensor in layer.items()}

    def error(self, online: Mapping[str, int] | None = None) -> float:
        """Relative error of the logits that the transformed tensors give, with inputs rotated
        online by linear and block."""
        config = copy.deepcopy(self._original.config)
        config.tie_word_embeddings = False
        model = self._model(config, self.tensors)
        for linear, block in (online or {}).items():
            for index, layer in enumerate(model.model.layers):
                if linear in self.spec.layer_table(index).linears:
                    layer.get_submodule(linear).register_forward_pre_hook(_rotating(block))
        with InFloat64(), torch.no_grad():
            expected, got = self._original(self.tokens).logits, model(self.tokens).logits
        assert expected.dtype == got.dtype == torch.float64
        return float((got - expected).norm() / expected.norm())

    def _model(self, config: PreTrainedConfig, weights: Tensors) -> PreTrainedModel:
        table = self.spec.architecture
        with InFloat64():
            model = AutoModelForCausalLM.from_config(
                config, attn_implementation=table.attention, dtype=torch.float64
            )
            separate_experts(model.model.layers, table, config)
            model.load_state_dict(weights)
        return model.eval()


def _rotating(block: int) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], torch.Tensor]:
    return lambda _module, inputs: hadamard_transform(inputs[0], block) / block**0.5


@pytest.fixture(params=MODELS, ids=lambda name: name.replace(", ", "-").replace(" ", "_"))
def subject(request: pytest.FixtureRequest, build_model: Callable[..., PreTrainedModel]) -> Subject:
    return Subject(build_model(**MODELS[request.param], dtype=torch.float64))


def random_scales(spec: ModelSpec, index: int) -> torch.Tensor:
    return (
        torch.rand(
            sum(spec.down_widths(index)),
            generator=torch.Generator().manual_seed(index),
            dtype=torch.float64,
        )
        * 20
        + 0.05
    )


def random_layer_scales(spec: ModelSpec, seed: int) -> LayerScales:
    generator = torch.Generator().manual_seed(100 + seed)
    norms = {
        norm: torch.rand(spec.hidden, dtype=torch.float64, generator=generator) + 0.5
        for norm in spec.architecture.norms
    }
    down = random_scales(spec, seed) if spec.architecture.scales_products else None
    return LayerScales(down, norms)


def random_orthogonal(*shape: int) -> torch.Tensor:
    return torch.linalg.qr(
        torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(11))
    ).Q


def random_heads(spec: ModelSpec, index: int) -> torch.Tensor:
    """R2 of the heads of layer ``index``, as different from kind to kind."""
    kv_heads, head_dim = spec.head_sizes(spec.layer_table(index))
    return random_orthogonal(kv_heads, head_dim, head_dim)


def with_random_rotations(transform: ModelTransform) -> ModelTransform:
    """With orthogonal matrices of no structure where learned ones go, as different from layer to
    layer."""
    spec = transform.spec
    heads = [random_heads(spec, index) for index in range(spec.layers)]
    dense = DenseRotation(random_orthogonal(1, spec.hidden, spec.hidden))
    return replace(transform, residual=None if transform.residual is None else dense, heads=heads)


@pytest.mark.parametrize("subject", NORMED, indirect=True)
def test_norm_fold_keeps_the_logits(subject: Subject) -> None:
    table = subject.spec.architecture
    transform = ModelTransform.of_norms(subject.spec)
    subject.each_layer(lambda layer, index: transform.layer(index, layer, LayerScales()))
    folded = [
        t
        for name, t in subject.tensors.items()
        if name.endswith(tuple(f".{norm}.weight" for norm in table.norms))
    ]
    assert len(folded) == 2 * subject.spec.layers
    assert all((t + table.norm_offset == 1).all() for t in folded)
    assert subject.error() <= 1e-10


@pytest.mark.parametrize("subject", FOLDED, indirect=True)
def test_r1_keeps_the_logits(subject: Subject) -> None:
    rotation = random_rotation(subject.spec.hidden, seed=5)
    transform = ModelTransform(subject.spec, 5, rotation, Online())
    subject.each_layer(lambda layer, index: transform.layer(index, layer, LayerScales()))
    tensors = subject.tensors
    tensors["model.embed_tokens.weight"] = transform.embedding(tensors["model.embed_tokens.weight"])
    tensors["lm_head.weight"] = transform.head(
        tensors["lm_head.weight"], tensors["model.norm.weight"]
    )
    tensors["model.norm.weight"] = transform.final_norm(tensors["model.norm.weight"])
    assert subject.error() <= 1e-10


def test_r1_online_keeps_the_logits_and_the_norms(subject: Subject) -> None:
    spec, block = subject.spec, choose_block(subject.spec.hidden).size
    before = dict(subject.tensors)
    subject.each_layer(
        lambda layer, i: fold(layer, online_residual_rotation(spec.layer_table(i), block))
    )
    readers = {reader for table in spec.tables for reader in table.quantized_readers}
    changed = {
        name for name, tensor in subject.tensors.items() if not torch.equal(tensor, before[name])
    }
    assert changed == {
        f"{linear}.weight"
        for linear, _, _ in spec.output_linears(tied=True)
        if linear.split(".", 3)[-1] in readers
    }
    assert subject.error(dict.fromkeys(readers, block)) <= 1e-10
    assert subject.error() > 1e-2, "the offline half alone must not be the identity"


def test_r2_keeps_the_logits(subject: Subject) -> None:
    subject.each_layer(lambda layer, index: fold(layer, head_rotation(subject.spec, index)))
    assert subject.error() <= 1e-10


@pytest.mark.parametrize("subject", FOLDED, indirect=True)
def test_any_orthogonal_matrix_will_do_for_r1(subject: Subject) -> None:
    hidden, offset = subject.spec.hidden, subject.spec.architecture.norm_offset
    rotation = DenseRotation(random_orthogonal(1, hidden, hidden))
    transform = ModelTransform(subject.spec, 0, rotation, Online())
    subject.each_layer(lambda layer, index: transform.layer(index, layer, LayerScales()))
    tensors = subject.tensors
    tensors["model.embed_tokens.weight"] = rotation.rotate(tensors["model.embed_tokens.weight"])
    tensors["lm_head.weight"] = rotation.rotate(
        tensors["lm_head.weight"] * (tensors["model.norm.weight"] + offset)
    )
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], 1 - offset)
    assert subject.error() <= 1e-10


def test_any_orthogonal_matrix_of_each_value_head_will_do_for_r2(subject: Subject) -> None:
    spec = subject.spec
    subject.each_layer(
        lambda layer, index: fold(layer, head_rotation(spec, index, random_heads(spec, index)))
    )
    assert subject.error() <= 1e-10


@pytest.mark.parametrize(
    "subject", [name for name, table in TABLES.items() if table.value], indirect=True
)
def test_r2_by_its_own_matrices_is_the_default(subject: Subject) -> None:
    table, spec = subject.spec.architecture, subject.spec
    layer = {
        f"{n}.weight": torch.randn(spec.linear_shape(n), dtype=torch.float64)
        for n in (table.value, table.output)
    }
    dense = dict(layer)
    fold(layer, head_rotation(spec, 0))
    fold(dense, head_rotation(spec, 0, head_matrices(spec.kv_heads, spec.head_dim)))
    torch.testing.assert_close(dense, layer)


@pytest.mark.parametrize("subject", SMOOTHED, indirect=True)
def test_smoothing_keeps_the_logits(subject: Subject) -> None:
    subject.each_layer(
        lambda layer, i: fold(layer, smoothing(subject.spec, i, random_scales(subject.spec, i)))
    )
    assert subject.error() <= 1e-10


@pytest.mark.parametrize("subject", NORMED, indirect=True)
def test_smoothing_the_norms_keeps_the_logits(subject: Subject) -> None:
    before = dict(subject.tensors)
    transform = ModelTransform(subject.spec, 0, None, Online())
    subject.each_layer(
        lambda layer, i: transform.layer(
            i, layer, LayerScales(norms=random_layer_scales(subject.spec, i).norms)
        )
    )
    changed = {
        name.split(".", 3)[-1].removesuffix(".weight")
        for name in before
        if not before[name].equal(subject.tensors[name])
    }
    assert changed == {
        name
        for table in subject.spec.tables
        for norm, readers in table.readers.items()
        for name in (norm, *readers)
    }
    assert subject.error() <= 1e-10


@pytest.mark.parametrize("shards", [1, 2])
def test_r4_with_its_online_half_keeps_the_logits(subject: Subject, shards: int) -> None:
    online = online_rotations(subject.spec, make_config(max_tp=shards))

    def rotate_down(layer: Tensors, index: int) -> None:
        fold(layer, down_rotation(subject.spec, index, 7, online))

    subject.each_layer(rotate_down)
    blocks = {
        down: choose_block(subject.spec.linear_shape(down)[1], shards).size
        for table in subject.spec.tables
        for _, down in table.products
    }
    assert subject.error(blocks) <= 1e-10
    assert subject.error() > 1e-2, "the offline half alone must not be the identity"


@pytest.mark.parametrize("learned", [False, True], ids=["hadamard", "learned"])
@pytest.mark.parametrize("shards", [1, 2])
def test_all_transforms_together_keep_the_logits(
    subject: Subject, shards: int, learned: bool
) -> None:
    config = make_config(max_tp=shards, seed=3)
    transform = ModelTransform.of(subject.spec, config)
    if learned:
        transform = with_random_rotations(transform)
    subject.each_layer(
        lambda layer, index: transform.layer(index, layer, random_layer_scales(subject.spec, index))
    )
    tensors = subject.tensors
    tensors["model.embed_tokens.weight"] = transform.embedding(tensors["model.embed_tokens.weight"])
    tensors["lm_head.weight"] = transform.head(
        tensors["lm_head.weight"], tensors["model.norm.weight"]
    )
    tensors["model.norm.weight"] = transform.final_norm(tensors["model.norm.weight"])
    online = online_rotations(subject.spec, config)
    assert online.down_proj is not None
    assert online.down_proj.block == choose_block(subject.spec.intermediate, shards).size
    rotations = {
        linear: online.rotation(linear) for table in subject.spec.tables for linear in table.linears
    }
    assert (
        subject.error({linear: r.block for linear, r in rotations.items() if r is not None})
        <= 1e-10
    )


@pytest.mark.parametrize("subject", SMOOTHED, indirect=True)
def test_without_rotation_only_smoothing_is_folded(subject: Subject) -> None:
    transform = ModelTransform.of(subject.spec, make_config(rotate=False))
    before = dict(subject.tensors)
    subject.each_layer(
        lambda layer, i: transform.layer(i, layer, LayerScales(random_scales(subject.spec, i)))
    )
    changed = {
        name.split(".", 3)[-1]
        for name in before
        if not torch.equal(before[name], subject.tensors[name])
    }
    linears = {
        linear for table in subject.spec.tables for pair in table.products for linear in pair
    }
    bias = f"{subject.spec.architecture.up}.bias"
    assert changed - {bias} == {f"{linear}.weight" for linear in linears}
    assert subject.error() <= 1e-10


@pytest.mark.parametrize(
    ("size", "block"), [(64, 64), (4096, 4096), (152, 152), (152, 76), (688, 344), (144, 2)]
)
def test_offline_hadamard_is_the_one_the_server_applies(size: int, block: int) -> None:
    x = torch.randn(5, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        hadamard(x, block), hadamard_transform(x, block) / block**0.5, rtol=1e-12, atol=1e-12
    )


def test_random_signs_depend_on_seed_and_purpose_only() -> None:
    signs = random_signs(256, 0, "R1")
    assert signs.unique().tolist() == [-1.0, 1.0]
    assert torch.equal(signs, random_signs(256, 0, "R1"))
    assert not torch.equal(signs, random_signs(256, 1, "R1"))
    assert not torch.equal(signs, random_signs(256, 0, "R4/0"))


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_unusable_scales_are_refused(bad: float) -> None:
    with pytest.raises(CheckpointError, match="down_proj"):
        LayerScales(torch.tensor([1.0, bad]))
