# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face or SmoothRot directory as a runnable ``transformers`` model, for evaluation,
generation and tests.

A SmoothRot directory goes through transformers' own extension point for quantized checkpoints, so
importing this module is enough for ``AutoModelForCausalLM.from_pretrained(DIR)``, and whatever is
built on it, to load one.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging as transformers_logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from smoothrot_offline.check.inspect import group_scale_problem
from smoothrot_offline.device import CPU
from smoothrot_offline.source.architecture import Architecture
from smoothrot_offline.source.checkpoint import DTYPES, open_checkpoint
from smoothrot_offline.source.composites import COMPOSITES
from smoothrot_offline.source.experts import separate_experts
from smoothrot_offline.source.headers import INDEX_NAME, SINGLE_NAME
from smoothrot_offline.source.models import load_causal_lm, load_config
from smoothrot_offline.source.resolve import SUPPORTED
from smoothrot_vllm import reference
from smoothrot_vllm.errors import CheckpointError
from smoothrot_vllm.foreign_files import read_header
from smoothrot_vllm.format import (
    QUANT_METHOD,
    WEIGHT_GROUP_SCALE,
    WEIGHT_SCALE,
    LinearScheme,
    group_count,
    parse_schema,
    weight_tensors,
)
from smoothrot_vllm.reference import unpack_group_scale

Kernels = Literal["compiled", "reference"]

_QUANTIZED_DTYPES = (torch.uint8, torch.int8)


class QuantizedLinear(nn.Module):
    """A linear layer on stored codes: per-token quantized input, rotated first where the checkpoint
    says so.

    Args:
        in_features, out_features, bias: those of the linear it replaces.
        scheme: how weight and input are quantized.
        block: Hadamard block of the input, 0 for none.
        kernels: ``compiled`` runs ``smoothrot_vllm.ops``, ``reference`` the plain-torch definition
            of the same ops.
    """

    weight_packed: torch.Tensor
    weight_scale: torch.Tensor
    weight_group_scale: torch.Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        scheme: LinearScheme,
        block: int,
        kernels: Kernels,
    ) -> None:
        super().__init__()
        self.scheme = scheme
        self.block = block
        self.kernels = kernels
        self.groups = group_count(in_features, scheme.weights)
        self.register_buffer(WEIGHT_GROUP_SCALE, None)
        for suffix, (shape, dtype) in weight_tensors(
            out_features, in_features, scheme.weights
        ).items():
            self.register_buffer(suffix, torch.empty(shape, dtype=dtype))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features)) if bias else None)

    def prepack(self) -> None:
        """Put what was loaded into the form that the kernels take: group scales one to a byte, and
        for ``compiled`` the codes in their layout."""
        if self.weight_group_scale is not None:
            self.weight_group_scale = unpack_group_scale(self.weight_group_scale, self.groups)
        if self.kernels == "compiled":
            from smoothrot_vllm import ops

            self.weight_packed = ops.prepack_weight(
                self.weight_packed,
                self.weight_scale,
                self.weight_group_scale,
                self.scheme.weights.bits,
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x (..., in_features)`` to ``(..., out_features)`` in the dtype of ``x``."""
        acts, weights = self.scheme.activations, self.scheme.weights
        if self.kernels == "compiled":
            from smoothrot_vllm import ops

            return ops.linear(
                x,
                self.weight_packed,
                self.weight_scale,
                self.bias,
                self.block,
                acts.clip,
                acts.bits,
                weights.bits,
                weights.group_size,
            )
        tokens = x.reshape(-1, x.shape[-1])
        if self.block:
            codes, scale = reference.hadamard_quant(tokens, self.block, acts.clip, acts.bits)
        else:
            codes, scale = reference.quant(tokens, acts.clip, acts.bits)
        y = reference.gemm(
            codes,
            scale,
            self.weight_packed,
            self.weight_scale,
            self.weight_group_scale,
            self.bias,
            x.dtype,
            acts.bits,
            weights.bits,
        )
        return y.reshape(*x.shape[:-1], -1)


@register_quantization_config(QUANT_METHOD)
class SmoothRotHfConfig(QuantizationConfigMixin):
    """``quantization_config`` of a SmoothRot directory as transformers hands it around;
    ``kernels`` is not stored in one."""

    def __init__(self, kernels: Kernels = "compiled", **config: Any) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # transformers types it as an enum of its own methods
        self.kernels = kernels
        self.schema = parse_schema(config)

    def to_dict(self) -> dict[str, Any]:
        """The stored form."""
        return self.schema.model_dump()


@register_quantizer(QUANT_METHOD)
class SmoothRotHfQuantizer(HfQuantizer):
    """Replaces linears by :class:`QuantizedLinear` and checks every tensor of the checkpoint
    against the model."""

    quantization_config: SmoothRotHfConfig
    _stored_names = False

    def update_tp_plan(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Lift the refusal that the directory holds for a transformers without this class.

        Of the steps that are given the configuration this is the first, and all come before the
        files are looked for.
        """
        config.transformers_weights = None
        return super().update_tp_plan(config)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if attention := _attention(model.config):
            model.set_attn_implementation(attention)
        self._stored_names = _separate_experts(model)
        _replace_linears(model, self.quantization_config)
        _check_tensors(model, kwargs["checkpoint_files"])

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **_: Any
    ) -> PreTrainedModel:
        _check_values(model)
        # transformers leaves tensors that it renames in their stored dtype.
        for parameter in model.parameters():
            parameter.data = parameter.data.to(model.config.dtype)
        for module in model.modules():
            if isinstance(module, QuantizedLinear):
                module.prepack()
        return model

    def update_weight_conversions(self, weight_conversions: list[Any]) -> list[Any]:
        """How stored tensors become the model's: as they are, where :func:`separate_experts` has
        named modules like them."""
        return [] if self._stored_names else weight_conversions

    def is_serializable(self) -> bool:
        """False: only the converter writes checkpoints."""
        return False

    @property
    def is_trainable(self) -> bool:
        """False: codes have no gradient."""
        return False


def load_model(
    directory: str | Path,
    dtype: torch.dtype | None = None,
    kernels: Kernels = "compiled",
    device: torch.device = CPU,
) -> PreTrainedModel:
    """Load a causal language model for inference.

    Args:
        directory: a plain Hugging Face directory, or one written by ``smoothrot-convert run``.
        dtype: of activations and 16-bit weights; None takes the one in config.json.
        kernels: what runs the quantized linears on the CPU (ignored for a plain directory);
            elsewhere it is ``reference``.
        device: where the model is to run.

    Raises:
        CheckpointError: config.json or a tensor is missing, unexpected, of the wrong shape or
            dtype, or holds unusable values.
        ConfigError: ``quantization_config`` is not valid, or names a method whose package is not
            installed.
    """
    directory = Path(directory)
    if not (directory / "config.json").is_file():
        raise CheckpointError(
            f"{directory}: expected a model directory, which holds a config.json; there is none."
        )
    transformers_logging.disable_progress_bar()  # this command has its own
    config = load_config(directory)
    quantization = getattr(config, "quantization_config", None)
    if isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD:
        config.quantization_config = {
            **quantization,
            "kernels": kernels if device.type == "cpu" else "reference",
        }
    tensors = None if quantization else _tensors_under_other_names(directory, config)
    model, info = load_causal_lm(
        directory, config, tensors, dtype=dtype or "auto", attn_implementation=_attention(config)
    )
    if info["missing_keys"]:
        raise CheckpointError(
            f"{directory}: expected a tensor for each parameter of {type(model).__name__}, "
            f"missing {sorted(info['missing_keys'])}. Fetch or convert the model again."
        )
    # Old checkpoints carry the rotary tables, which every loader recomputes.
    if unused := sorted(
        name for name in info["unexpected_keys"] if not name.endswith(".rotary_emb.inv_freq")
    ):
        raise CheckpointError(
            f"{directory}: tensor {unused[0]} (one of {len(unused)}) has no place in"
            f" {type(model).__name__} as config.json describes it: it would be another model"
            " without. Fetch configuration and weights of the same model."
        )
    return model.to(device).eval()


def _tensors_under_other_names(
    directory: Path, config: PreTrainedConfig
) -> dict[str, torch.Tensor] | None:
    """All tensors of a plain directory of a supported family whose files or names are not those
    that transformers looks for."""
    if config.model_type not in SUPPORTED:
        return None
    found = open_checkpoint(directory)
    if found.renamed is None and any(
        (directory / name).is_file() for name in (SINGLE_NAME, INDEX_NAME)
    ):
        return None
    return found.load(found.tensors)


def _attention(config: PreTrainedConfig) -> str | None:
    """The implementation of attention that computes all settings of a family: its default leaves
    Gemma 2's cap out."""
    table = _table(config)
    return None if table is None else table.attention


def _table(config: PreTrainedConfig) -> Architecture | None:
    """The table of a model's family, or that of its text tower's where it is within the model."""
    composite = COMPOSITES.get(config.model_type)
    if composite is None:
        return SUPPORTED.get(config.model_type)
    return composite.place(composite.text[0])


def _separate_experts(model: PreTrainedModel) -> bool:
    """Give a model with experts a module for each stored linear; False for any other."""
    table, config = _table(model.config), model.config.get_text_config()
    if table is None or table.experts is None:
        return False
    separate_experts(model.get_submodule(table.layers), table, config)
    # transformers would look for what its own routers return.
    config.output_router_logits = False
    return True


def _replace_linears(model: PreTrainedModel, config: SmoothRotHfConfig) -> None:
    for name, linear in list(model.named_modules()):
        if not isinstance(linear, nn.Linear) or (scheme := config.schema.scheme(name)) is None:
            continue
        rotation = config.schema.online.rotation(name)
        block = 0 if rotation is None else rotation.block
        quantized = QuantizedLinear(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            scheme,
            block,
            config.kernels,
        )
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, quantized)


def _check_tensors(model: PreTrainedModel, files: list[str]) -> None:
    """Compare the files' headers with the model: names, shapes, and the dtypes of codes and
    scales."""
    found: dict[str, tuple[tuple[int, ...], torch.dtype | None]] = {}
    for file in files:
        for name, stored in read_header(Path(file), "Convert the model again.").items():
            found[name] = (stored.shape, DTYPES.get(stored.dtype))
    composite = COMPOSITES.get(model.config.model_type)
    table = SUPPORTED[model.config.model_type] if composite is None else composite.text[0]
    expected = {
        name if composite is None else composite.stored_name(name): tensor
        for name, tensor in model.state_dict().items()
        if name not in model.all_tied_weights_keys
    }
    if table.draft is not None:  # which transformers has no class for
        found = {name: tensor for name, tensor in found.items() if not table.draft.has(name)}
    missing, unexpected = (
        sorted(expected.keys() - found.keys()),
        sorted(found.keys() - expected.keys()),
    )
    if missing or unexpected:
        raise CheckpointError(
            f"{Path(files[0]).parent}: tensors do not match {type(model).__name__} and its"
            f" quantization_config: missing {missing or 'none'}, unexpected {unexpected or 'none'}."
            " Convert the model again."
        )
    for name, tensor in expected.items():
        shape, dtype = found[name]
        exact = tensor.dtype in _QUANTIZED_DTYPES or name.endswith(f".{WEIGHT_SCALE}")
        if shape != tuple(tensor.shape) or (
            dtype != tensor.dtype if exact else dtype is None or not dtype.is_floating_point
        ):
            raise CheckpointError(
                f"{Path(files[0]).parent}: tensor {name}: expected {tuple(tensor.shape)}"
                f" {tensor.dtype if exact else 'of a float dtype'}, got {shape} {dtype}. Convert"
                " the model again."
            )


def _check_values(model: PreTrainedModel) -> None:
    for name, module in model.named_modules():
        if not isinstance(module, QuantizedLinear) or module.weight_group_scale is None:
            continue
        if problem := group_scale_problem(module.weight_group_scale, module.groups):
            raise CheckpointError(
                f"tensor {name}.{WEIGHT_GROUP_SCALE}: {problem}. Convert the model again."
            )
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        usable = (
            tensor.isfinite() & (tensor > 0)
            if name.endswith(f".{WEIGHT_SCALE}")
            else tensor.isfinite()
        )
        if not usable.all():
            where = (~usable).nonzero()[0].tolist()
            raise CheckpointError(
                f"tensor {name}: expected finite"
                f" values{' above zero' if name.endswith(WEIGHT_SCALE) else ''}, got"
                f" {tensor[tuple(where)].item()} at {where}. Convert the model again."
            )
