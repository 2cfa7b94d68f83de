# SPDX-License-Identifier: Apache-2.0
"""The checkpoint format: one schema, used by the converter that writes it and the plugin that loads
it.

``config.json["quantization_config"]`` holds a :class:`QuantizationSchema`; each quantized linear
``P`` stores ``P.weight_packed``, ``P.weight_scale``, in groups ``P.weight_group_scale``, and, if it
has one, ``P.bias``.
``docs/format.md`` is the byte-level description.
"""

from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from smoothrot_vllm.errors import ConfigError
from smoothrot_vllm.hadamard import factorize

QUANT_METHOD: Literal["smoothrot"] = "smoothrot"
FORMAT_VERSION: Literal[2] = 2
MANIFEST_NAME = "smoothrot_manifest.json"
TRANSFORMERS_WEIGHTS = (
    "none: these are the codes of a SmoothRot model. Serve it with vLLM and the smoothrot-vllm"
    " plugin, or load it with smoothrot_offline.report.model.load_model"
)
"""``transformers_weights`` of config.json, which vLLM does not read.

transformers takes it for a file's name and ends with a ValueError that quotes it. Of a method that
it does not know it would only warn, and go on with random linears.
"""
TRANSFORM_NAME = "smoothrot_transform.st"
"""What LoRA adapters and draft heads are transformed by; in safetensors format, under a suffix that
no loader takes for weights."""
ADAPTER_CONFIG = "adapter_config.json"
"""PEFT's, beside the weights of a LoRA adapter."""
ADAPTER_BASE = "smoothrot_transform_sha256"
"""Key of ``adapter_config.json``, or of a draft head's ``config.json``: digest of the transform
that the adapter or the head was given."""
DRAFT_ARCHITECTURE = "EagleSmoothRotLlamaForCausalLM"
"""``architectures`` of a transformed draft head, which the plugin has the class of. vLLM puts
``Eagle`` before names that do not begin with it."""
DRAFT_INPUT = "from_base"
"""The linear that a model's own draft head has got by its transform: from what the final norm gives
out to what that of the original would."""
DRAFT_OUTPUT = "to_base"
"""The linear that a draft head has got by its transform: from its own hidden states to those of the
base's output head."""
READERS = (
    *("q_proj", "k_proj", "v_proj", "qkv_proj"),
    *("in_proj_qkv", "in_proj_z", "in_proj_qkvz"),
    *("gate_proj", "up_proj", "gate_up_proj"),
)
"""Names of the quantized linears that read the residual stream through a norm, and of the fusions
of them."""
DOWN = ("down_proj", "w2")
"""Names of the linear that reads the gated product; the second is that of Mixtral's experts."""
WEIGHT_PACKED = "weight_packed"
WEIGHT_SCALE = "weight_scale"
WEIGHT_GROUP_SCALE = "weight_group_scale"
GROUP_SCALE_MAX = 15
"""Largest group scale, an integer from 1 on: its product with any 4-bit code fits int8."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class WeightScheme(_Model):
    """Symmetric weight quantization with a float scale for each output channel; with a
    ``group_size`` of consecutive inputs also an integer one for each group of 4-bit weights, as in
    QServe (arXiv 2405.04532)."""

    bits: Literal[4, 8] = 4
    group_size: Literal[-1, 32, 64, 128] = -1
    symmetric: Literal[True] = True

    @model_validator(mode="after")
    def _groups_are_of_4_bits(self) -> Self:
        if self.bits == 8 and self.group_size != -1:
            raise ValueError(f"group_size of 8-bit weights must be -1, got {self.group_size}")
        return self


class ActivationScheme(_Model):
    """Dynamic symmetric per-token activation quantization with ``scale = clip * max|x| /
    quant_max``."""

    bits: Literal[4, 8] = 4
    dynamic: Literal[True] = True
    granularity: Literal["token"] = "token"
    clip: float = Field(default=1.0, gt=0.0, le=1.0)


class LinearScheme(_Model):
    """How one linear layer is quantized."""

    weights: WeightScheme = WeightScheme()
    activations: ActivationScheme = ActivationScheme()


class OnlineHadamard(_Model):
    """Rotation of a linear's input at run time by ``I (x) H_block``; ``size`` is the whole
    (unsharded) input width.

    Random signs need no place here: they are folded into the layer that produces the input.
    """

    size: int = Field(gt=0)
    block: int = Field(gt=0)

    @model_validator(mode="after")
    def _block_is_usable(self) -> Self:
        if self.size % self.block or factorize(self.block) is None:
            raise ValueError(
                f"block {self.block} must divide size {self.size} and be a Hadamard order"
            )
        return self


class Online(_Model):
    """The rotations a server applies to what linears read.

    ``down_proj`` is that of its input; ``within`` has those of down_projs of another width, by the
    name of the module that each is in (``shared_expert``). ``readers`` are the linears that read
    the residual stream, through a norm or as it is, whose rotation could not be folded.
    """

    down_proj: OnlineHadamard | None = None
    within: dict[str, OnlineHadamard] = {}
    readers: OnlineHadamard | None = None

    def rotation(self, name: str) -> OnlineHadamard | None:
        """Rotation of the input of the linear with this module name, stored or fused by a
        server, or None."""
        module, _, leaf = name.rpartition(".")
        if leaf in DOWN:
            return self.within.get(module.rpartition(".")[2], self.down_proj)
        return self.readers if leaf in READERS else None

    def of_downs(self) -> dict[str, OnlineHadamard]:
        """Those of all down_projs, by the name of the field."""
        first = {} if self.down_proj is None else {"down_proj": self.down_proj}
        return first | {f"within.{module}": rotation for module, rotation in self.within.items()}


class QuantizationSchema(_Model):
    """The whole of ``config.json["quantization_config"]``.

    ``overrides`` maps a full module name (``model.layers.3.mlp.down_proj``) to the scheme it uses
    instead of the default; ``ignore`` lists full module names of linears that stay 16-bit; a name
    that ends with a dot is that of a module whose linears all do. ``lm_head`` is None for a 16-bit
    head. ``transform_sha256`` is the digest of ``smoothrot_transform.st``, which names the
    transform that an adapter must have been given too; None where the checkpoint does not hold one.
    """

    quant_method: Literal["smoothrot"] = QUANT_METHOD
    format_version: Literal[2] = FORMAT_VERSION
    weights: WeightScheme = WeightScheme()
    activations: ActivationScheme = ActivationScheme()
    online: Online = Online()
    lm_head: LinearScheme | None = None
    overrides: dict[str, LinearScheme] = {}
    ignore: list[str] = []
    max_tensor_parallel: int = Field(default=1, ge=1)
    transform_sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")

    @model_validator(mode="after")
    def _blocks_fit_tensor_parallel(self) -> Self:
        for field, rotation in self.online.of_downs().items():
            if rotation.size % (rotation.block * self.max_tensor_parallel):
                raise ValueError(
                    f"online.{field} block {rotation.block} must divide size / max_tensor_parallel"
                    f" = {rotation.size} / {self.max_tensor_parallel}"
                )
        return self

    def scheme(self, name: str) -> LinearScheme | None:
        """Scheme of the linear with this full module name (``lm_head`` included), or None if it
        stays 16-bit."""
        if any(
            name == left or (left.endswith(".") and name.startswith(left)) for left in self.ignore
        ):
            return None
        if name in self.overrides:
            return self.overrides[name]
        if name.rpartition(".")[2] == "lm_head":
            return self.lm_head
        return LinearScheme(weights=self.weights, activations=self.activations)


def parse_schema(config: dict[str, Any]) -> QuantizationSchema:
    """Validate ``quantization_config``.

    Raises:
        ConfigError: an unknown version, an unknown or missing field, or a value out of range; the
            message names each.
    """
    version = config.get("format_version")
    if version != FORMAT_VERSION:
        raise ConfigError(
            f"quantization_config.format_version: expected {FORMAT_VERSION}, got {version!r}."
            " Convert the model again with this version of smoothrot, or install the version that"
            " wrote it."
        )
    try:
        return QuantizationSchema.model_validate(config)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'config'}: {e['msg']}" for e in error.errors()
        )
        raise ConfigError(
            f"quantization_config of quant_method {QUANT_METHOD!r} is not valid: {problems}"
        ) from None


def check_tensor_parallel(schema: QuantizationSchema, size: int) -> None:
    """Refuse a tensor-parallel size that the checkpoint's Hadamard blocks were not made for.

    Raises:
        ConfigError: ``size`` does not divide the rotated width into whole blocks.
    """
    for rotation in schema.online.of_downs().values():
        if rotation.size % (rotation.block * size):
            raise ConfigError(
                f"tensor parallel size {size}: each rank would hold {rotation.size}/{size}"
                f" down_proj inputs, not a whole number of Hadamard blocks of {rotation.block}"
                f" (this checkpoint serves up to {schema.max_tensor_parallel}). Serve with"
                f" --tensor-parallel-size {schema.max_tensor_parallel} or less, or convert again"
                f" with --max-tp {size}."
            )


def weight_tensors(
    out_features: int, in_features: int, scheme: WeightScheme
) -> dict[str, tuple[tuple[int, int], torch.dtype]]:
    """Shape and dtype of each stored tensor of a quantized linear, by the suffix of its name.

    Args:
        out_features: N.
        in_features: K.
        scheme: bits and group size.

    Returns:
        ``weight_packed``: ``(N, K/2)`` uint8 or ``(N, K)`` int8; ``weight_scale``: ``(N, 1)``
        float32; with G groups ``weight_group_scale``: ``(N, ceil(G/2))`` uint8.

    Raises:
        ConfigError: ``in_features`` is odd, or is no multiple of the group size.
    """
    groups = group_count(in_features, scheme)
    packed = (
        ((out_features, in_features // 2), torch.uint8)
        if scheme.bits == 4
        else ((out_features, in_features), torch.int8)
    )
    tensors = {WEIGHT_PACKED: packed, WEIGHT_SCALE: ((out_features, 1), torch.float32)}
    if groups:
        tensors[WEIGHT_GROUP_SCALE] = ((out_features, (groups + 1) // 2), torch.uint8)
    return tensors


def group_count(in_features: int, scheme: WeightScheme) -> int:
    """Groups of a linear with ``in_features`` inputs; 0 for a scale per channel alone.

    Raises:
        ConfigError: ``in_features`` is odd, or is no multiple of the group size.
    """
    if in_features % 2 or (scheme.group_size != -1 and in_features % scheme.group_size):
        raise ConfigError(
            f"linear with {in_features} inputs: expected an even number and a multiple of group"
            f" size {scheme.group_size}. Choose another --group-size."
        )
    return 0 if scheme.group_size == -1 else in_features // scheme.group_size
