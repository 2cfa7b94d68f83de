# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters for a converted model: their factors are given the transforms that its weights were
given.

An adapter adds ``B A`` to a weight W. Where the conversion turned W to ``L W R``, the adapter has
to become ``(L B)(A R)``. What
the server rotates at run time is no part of R: vLLM hands an adapter the input of the linear before
that.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from smoothrot_offline.transform.companions import (
    cast_back,
    check_floats,
    read_base,
    read_untransformed,
    read_weights,
    refuse_value,
    write_companion,
)
from smoothrot_offline.transform.record import RecordedTransform
from smoothrot_vllm.errors import CheckpointError, ConfigError, UnsupportedModelError
from smoothrot_vllm.format import ADAPTER_CONFIG

WEIGHTS_NAME = "adapter_model.safetensors"
_MERGE = "Merge the adapter into the original model, and convert that."
_FACTOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, []),
    "use_qalora": (False, None),
    "use_bdlora": (None,),
    "alora_invocation_tokens": (None, []),
}
"""Values of ``adapter_config.json`` with which an adapter is no more than a product of two
factors added to weights."""
_OWN_BASE = ("pissa", "olora", "corda", "loftq")
"""Initializations that change the base model's weights."""


@dataclass(frozen=True)
class AdapterConversion:
    """What a finished conversion of an adapter did: how many linears it adapts, in how many
    layers."""

    linears: int
    layers: int
    base: str

    def summary(self) -> dict[str, Any]:
        """The facts in one JSON-able object."""
        return {"linears": self.linears, "layers": self.layers, "base_transform_sha256": self.base}


def convert_adapter(adapter: Path, out: Path, base: Path) -> AdapterConversion:
    """Transform a PEFT LoRA adapter of the original model into one of the converted model.

    Args:
        adapter: directory with ``adapter_config.json`` and ``adapter_model.safetensors``.
        out: directory to make, complete or not at all; tensors keep their names and dtypes.
        base: the converted model that will be served.

    Raises:
        ConfigError: the adapter is more than low-rank factors, has been transformed already, or
            ``out`` is taken.
        CheckpointError: a file is missing or damaged, or a factor has the wrong shape or is not
            finite.
        UnsupportedModelError: a factor belongs to no decoder linear of the base.
    """
    config = _plain_config(adapter)
    recorded = read_base(base, "adapter", _MERGE)
    spec = recorded.transform.spec
    if spec.experts:
        raise UnsupportedModelError(
            f"{base}: {spec.architecture.class_name} has experts; adapters are"
            f" transformed for dense models only. {_MERGE}"
        )
    tensors = read_weights(adapter / WEIGHTS_NAME, "adapter")
    transformed: dict[str, torch.Tensor] = {}
    adapted: set[tuple[int, str]] = set()
    for module, names in sorted(_modules(tensors).items()):
        index, linear = _place(module, recorded)
        if values := spec.layer_table(index).repeated.get(linear):
            raise UnsupportedModelError(
                f"adapter of {module}: expected none, as its outputs are those of {values} too, and"
                " the server would adapt only one of the two. Merge the adapter into the original"
                " model, and convert that."
            )
        a, b = (tensors[names[factor]] for factor in "AB")
        _check(module, a, b, spec.linear_shape(linear, spec.layer_table(index)))
        new = transform_factors(recorded, index, linear, a.double(), b.double())
        for factor, old, result in zip("AB", (a, b), new, strict=True):
            transformed[names[factor]] = cast_back(result, old.dtype, names[factor])
        adapted.add((index, linear))
    digest = write_companion(out, base, (ADAPTER_CONFIG, config), (WEIGHTS_NAME, transformed))
    return AdapterConversion(len(adapted), len({index for index, _ in adapted}), digest)


def transform_factors(
    recorded: RecordedTransform, index: int, linear: str, a: torch.Tensor, b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors of decoder layer ``index``'s ``linear`` for the converted model.

    Args:
        a, b: float64 ``(rank, in)`` and ``(out, rank)`` of the original model's adapter; its
            product is added to the weight.
    """
    transform = recorded.transform
    table, prefix = transform.spec.layer_table(index), transform.spec.layer_prefix(index)
    gammas = {}
    if transform.residual is not None:
        gammas = {
            norm: recorded.norms[prefix + norm].double() + table.norm_offset for norm in table.norms
        }
    for factor in transform.sides(index, gammas, recorded.scales[index])[linear]:
        if factor.output:
            b = factor.of_weight(b)
        elif not factor.online:
            a = factor.of_weight(a)
    return a, b


def _plain_config(adapter: Path) -> dict[str, Any]:
    path = adapter / ADAPTER_CONFIG
    config = read_untransformed(path, "adapter")
    for key, plain in _PLAIN.items():
        refuse_value(
            path,
            key,
            plain,
            config.get(key, plain[0]),
            "Only plain LoRA adapters can be transformed: train without it, or merge the adapter"
            " into the 16-bit model and convert that.",
        )
    initial = config.get("init_lora_weights", True)
    if isinstance(initial, str) and initial.lower().startswith(_OWN_BASE):
        raise ConfigError(
            f"{path}: init_lora_weights {initial!r} changes the base model's"
            " weights. Save the adapter as a plain one with PEFT's"
            " path_initial_model_for_weight_conversion."
        )
    return config


def _modules(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, str]]:
    """Names of the two factors by module."""
    modules: dict[str, dict[str, str]] = {}
    for name in tensors:
        match = _FACTOR.fullmatch(name)
        if match is None:
            raise UnsupportedModelError(
                f"tensor {name}: expected base_model.model.LINEAR.lora_A.weight or lora_B.weight. "
                "Only LoRA factors of decoder linears can be transformed."
            )
        modules.setdefault(match["module"], {})[match["factor"]] = name
    for module, names in modules.items():
        if missing := {"A", "B"} - names.keys():
            raise CheckpointError(
                f"{module}: expected lora_A and lora_B, missing lora_{missing.pop()}. Save the"
                " adapter again."
            )
    if not modules:
        raise CheckpointError(
            f"{WEIGHTS_NAME}: expected LoRA factors, found none. Save the adapter again."
        )
    return modules


def _place(module: str, recorded: RecordedTransform) -> tuple[int, str]:
    """Layer and relative name of a decoder linear."""
    spec = recorded.transform.spec
    for index in range(spec.layers):
        linear = module.removeprefix(spec.layer_prefix(index))
        if linear != module and linear in spec.layer_table(index).linears:
            return index, linear
    linears = {linear: None for table in spec.tables for linear in table.linears}
    raise UnsupportedModelError(
        f"adapter of {module}: expected a linear of one of the {spec.layers} decoder layers:"
        f" {', '.join(linears)}. Train the adapter on those, or give the base it"
        " belongs to."
    )


def _check(module: str, a: torch.Tensor, b: torch.Tensor, shape: tuple[int, int]) -> None:
    if a.ndim != 2 or b.ndim != 2 or (b.shape[0], a.shape[1]) != shape or a.shape[0] != b.shape[1]:
        raise CheckpointError(
            f"adapter of {module}: expected lora_A (rank, {shape[1]}) and lora_B ({shape[0]},"
            f" rank), got {tuple(a.shape)} and {tuple(b.shape)}. The adapter belongs to another"
            " model."
        )
    for factor, tensor in (("A", a), ("B", b)):
        check_floats(tensor, f"{module}.lora_{factor}")
