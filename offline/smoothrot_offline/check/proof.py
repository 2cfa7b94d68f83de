# SPDX-License-Identifier: Apache-2.0
"""The proof that a family's table is right for a configuration, before a model of it is converted.

A small random model of that very configuration is folded, and must give the original's logits in
float64. So neither a wrong table nor a setting that a right one does not know makes a wrong model.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel

from smoothrot_offline.check.miniature import InFloat64, miniature, random_model
from smoothrot_offline.config import make_config
from smoothrot_offline.source.composite import Composite
from smoothrot_offline.source.family import ModelSpec
from smoothrot_offline.source.layers import embed
from smoothrot_offline.transform.rotation import hadamard
from smoothrot_offline.transform.sides import LayerScales, ModelTransform, Sides
from smoothrot_vllm.errors import UnsupportedModelError

TOLERANCE = 1e-10
"""Largest relative error of the logits, and of what each linear gives out."""
_FIRST_TOKEN = 8
"""Those before it may stand for an image."""
_TOKENS = (4, 12)
"""Sequences, and tokens of each: more than the small model's window."""

Outputs = dict[str, torch.Tensor]


def prove(spec: ModelSpec) -> None:
    """Fold a small model of a specification's configuration, and compare.

    Raises:
        UnsupportedModelError: it has other tensors than the table says, a linear is not run or
            gives out something else than before the folds, or the logits differ; the message names
            the first tensor or linear.
    """
    small = miniature(spec)
    with InFloat64(), torch.no_grad():
        original = random_model(small, small.tied)
        folded = random_model(small, tied=False)
        sides = _fold(small, original, folded)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(_FIRST_TOKEN, small.vocab, _TOKENS, generator=generator)
        wanted, before = _run(small, original, tokens)
        found, after = _run(small, folded, tokens)
        seen = [
            _see(small, small.composite, model, tokens[:1])
            for model in (original, folded)
            if small.composite is not None
        ]
    for name in before:
        layer, _, linear = name.removeprefix(f"{small.architecture.layers}.").partition(".")
        expected = before[name]
        for factor in sides[int(layer)][linear]:
            if factor.output:
                # As of a weight, whose columns are then tokens.
                expected = factor.of_weight(expected.T).T
        _check(small, name, expected, after[name])
    _check(small, small.architecture.lm_head, wanted, found)
    if seen:
        _check(small, f"{small.architecture.lm_head} behind an image", *seen)


def _fold(small: ModelSpec, original: PreTrainedModel, folded: PreTrainedModel) -> list[Sides]:
    """Give ``folded`` the transformed tensors of ``original``; the factors of each layer."""
    table = small.architecture
    modules = {_stored(small, name): name for name in original.state_dict()}
    tensors = {name: original.state_dict()[module].clone() for name, module in modules.items()}
    expected = small.source_tensors()
    if small.tied:
        head = tensors.pop(f"{table.lm_head}.weight", tensors[f"{table.embedding}.weight"])
    else:
        head = tensors[f"{table.lm_head}.weight"]
    for name in sorted(expected.keys() ^ tensors.keys()):
        raise _refused(
            small,
            f"tensor {name}: expected {'one' if name in expected else 'none'} by the table, and"
            f" {type(original).__name__} has {'one' if name in tensors else 'none'}",
        )
    transform = ModelTransform.of(small, make_config(seed=1))
    sides = []
    for index in range(small.layers):
        prefix = small.layer_prefix(index)
        layer = {name: tensors[prefix + name] for name in small.layer_tensors(index)}
        norms = small.layer_table(index).norms
        gammas = {norm: layer[f"{norm}.weight"] + table.norm_offset for norm in norms}
        scales = _random_scales(small, index)
        sides.append(transform.sides(index, gammas, scales))
        transform.layer(index, layer, scales)
        tensors |= {prefix + name: tensor for name, tensor in layer.items()}
    norm, embedding = f"{table.final_norm}.weight", f"{table.embedding}.weight"
    tensors[f"{table.lm_head}.weight"] = transform.head(head, tensors[norm])
    tensors[norm] = transform.final_norm(tensors[norm])
    tensors[embedding] = transform.embedding(tensors[embedding])
    tensors |= {name: transform.beside(name, tensors[name]) for name in small.kept}
    folded.load_state_dict({modules.get(name, name): tensors[name] for name in tensors})
    for linear, _, _ in small.output_linears(tied=True):
        if (rotation := transform.online.rotation(linear)) is not None:
            module = folded.get_submodule(linear)
            module.register_forward_pre_hook(_rotating(rotation.block))
    return sides


def _random_scales(small: ModelSpec, index: int) -> LayerScales:
    generator = torch.Generator().manual_seed(index)

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64) * 4 + 0.25

    norms = {norm: draw(small.hidden) for norm in small.layer_table(index).norms}
    smoothed = small.architecture.scales_products
    return LayerScales(draw(sum(small.down_widths(index))) if smoothed else None, norms)


def _run(
    small: ModelSpec, model: PreTrainedModel, tokens: torch.Tensor
) -> tuple[torch.Tensor, Outputs]:
    """Logits, and what each linear of the layers gives out, float64 ``(tokens, out)``, in the order
    in which they are run."""
    table = small.architecture
    outputs: Outputs = {}
    linears = [linear for linear, _, _ in small.output_linears(tied=True)]
    hooks = [
        model.get_submodule(linear).register_forward_hook(_recording(outputs, linear))
        for linear in linears
    ]
    read: list[torch.Tensor] = []
    first = model.get_submodule(f"{table.layers}.0")
    hooks.append(first.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0])))
    head = model.get_submodule(table.lm_head)
    hooks.append(head.register_forward_hook(_recording(outputs, table.lm_head)))
    logits = model(tokens, use_cache=False).logits.flatten(0, -2)
    for hook in hooks:
        hook.remove()
    _check(small, "logits", small.capped(outputs.pop(table.lm_head)), logits)
    rows = model.get_submodule(table.embedding).get_parameter("weight")
    _check(small, table.embedding, embed(tokens, rows, small.embedding_scale), read[0])
    for linear in linears:
        if linear not in outputs:
            raise _refused(small, f"{linear}: {type(model).__name__} never runs it")
    return logits, outputs


def _stored(small: ModelSpec, name: str) -> str:
    return name if small.composite is None else small.composite.stored_name(name)


def _see(
    small: ModelSpec, composite: Composite, model: PreTrainedModel, tokens: torch.Tensor
) -> torch.Tensor:
    """Logits of ``tokens (1, T)`` with a random image amid them."""
    assert small.outer is not None
    image = composite.image
    between = torch.full((1, image.tokens), small.outer.image_token_id)
    mixed = torch.cat([tokens[:, :4], between, tokens[:, 4:]], dim=1)
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(image.pixels, dtype=torch.float64, generator=generator)
    beside = {name: torch.tensor(value) for name, value in image.beside.items()}
    if image.types:
        beside[image.types] = (mixed == small.outer.image_token_id).int()
    logits: torch.Tensor = model(mixed, pixel_values=pixels, use_cache=False, **beside).logits
    return logits


def _recording(outputs: Outputs, name: str) -> Callable[..., None]:
    def hook(_module: nn.Module, _inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        outputs[name] = output.flatten(0, -2)

    return hook


def _rotating(block: int) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], torch.Tensor]:
    return lambda _module, inputs: hadamard(inputs[0], block)


def _check(small: ModelSpec, name: str, expected: torch.Tensor, found: torch.Tensor) -> None:
    error = float((found - expected).norm() / expected.norm())
    # A NaN is no small error.
    if not error <= TOLERANCE:
        raise _refused(
            small,
            f"{name}: expected what it gives out to be the same before and after the folds, to"
            f" {TOLERANCE:g} in float64, got {error:.2g}",
        )


def _refused(small: ModelSpec, what: str) -> UnsupportedModelError:
    table = small.architecture
    return UnsupportedModelError(
        f"a small random {table.class_name} of this configuration: {what}. The table of"
        f" {table.model_type} does not describe such a model, so it is not converted: report it"
        " with its config.json."
    )
