# SPDX-License-Identifier: Apache-2.0
"""Every option of a conversion in one validated place, and the checkpoint schema they lead to."""

from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from smoothrot_offline.source.family import ModelSpec
from smoothrot_vllm.errors import ConfigError
from smoothrot_vllm.format import (
    ActivationScheme,
    LinearScheme,
    Online,
    OnlineHadamard,
    QuantizationSchema,
    WeightScheme,
)
from smoothrot_vllm.hadamard import choose_block

MOST = (1 << 31) - 1
"""Of any count that is an option: torch's own sizes end not far above."""

Options = TypeVar("Options", bound=BaseModel)


def make_options(kind: type[Options], command: str, options: dict[str, Any]) -> Options:
    """The validated options of ``command``.

    Raises:
        ConfigError: an unknown option or a value out of range; the message names each.
    """
    try:
        return kind(**options)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, e['loc']))}: {e['msg']}, got {e['input']!r}"
            for e in error.errors()
        )
        raise ConfigError(f"{command} options: {problems}") from None


ACTIVATION_CLIP = {4: 0.9, 8: 1.0}
"""Per-token clip by activation bits: 0.9 is the best of QuaRot's ablation at 4 bits (arXiv
2404.00456, table 11)."""

MEBIBYTE = 1 << 20


class ConvertConfig(BaseModel):
    """Options of ``smoothrot-convert run``, which the manifest records. Every one of them
    changes the output but ``preset``, the recipe that the others come from where the user did
    not choose."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    preset: Literal["none", "fast", "balanced", "best", "paper-compat"] = "none"
    weight_bits: Literal[4, 8] = 4
    activation_bits: Literal[4, 8] = 4
    group_size: Literal[-1, 32, 64, 128] = -1
    scales: Literal["none", "max", "quantile", "l2", "search", "learned"] = "l2"
    smooth_norms: bool = False
    alpha: float = Field(default=0.5, ge=0.0, le=1.0)
    quantile: float = Field(default=0.999, gt=0.0, le=1.0)
    rounding: Literal["rtn", "gptq", "gptaq"] = "rtn"
    act_order: bool = True
    damping: float = Field(default=0.01, gt=0.0, allow_inf_nan=False)
    propagation: float = Field(default=0.5, ge=0.0, le=1.0)
    clip_search: bool = False
    keep_8bit: float = Field(default=0.0, ge=0.0, le=1.0)
    sign_seeds: int = Field(default=1, ge=1, le=MOST)
    lm_head_bits: Literal[4, 8, 16] = 16
    max_tp: int = Field(default=1, ge=1, le=MOST)
    calib: str = "generated"
    calib_samples: int = Field(default=64, ge=1, le=MOST)
    calib_seqlen: int = Field(default=512, ge=2, le=MOST)
    seed: int = Field(default=0, ge=0, lt=2**63)
    rotate: bool = True
    rotations: Literal["hadamard", "learned"] = "hadamard"
    rotation_steps: int = Field(default=150, ge=1, le=MOST)
    shard_mib: int = Field(default=1024, ge=1, le=MOST)

    def described(self) -> str:
        """The recipe in a line of the field's own terms."""
        groups = "per channel" if self.group_size == -1 else f"groups of {self.group_size}"
        parts = [
            f"W{self.weight_bits}A{self.activation_bits} {groups}",
            f"{self.rounding}",
            f"scales {self.scales}",
        ]
        parts += ["smoothed norms"] * self.smooths_norms
        parts += ["searched clips"] * self.clip_search + [
            f"{self.keep_8bit:.0%} of the weights at 8 bits"
        ] * (self.keep_8bit > 0)
        parts += [f"best of {self.sign_seeds} sign seeds"] * (self.sign_seeds > 1) + [
            "no rotation"
        ] * (not self.rotate)
        parts += [f"rotations learned in {self.rotation_steps} steps"] * self.learns_rotations
        parts.append(f"{self.lm_head_bits}-bit head")
        return ", ".join(parts)

    @property
    def needs_calibration(self) -> bool:
        """Whether the model must be run at all."""
        measured = self.needs_probe or self.sign_seeds > 1 or self.learns_rotations
        return self.scales != "none" or self.rounding != "rtn" or measured

    @property
    def smooths_norms(self) -> bool:
        """Whether what the norms give out is smoothed: only with some scales for down_proj, so
        that ``none`` is plain QuaRot."""
        return self.smooth_norms and self.scales != "none"

    @property
    def learns_rotations(self) -> bool:
        """Whether R1, where it is folded, and R2 are learned."""
        return self.rotate and self.rotations == "learned"

    @property
    def needs_probe(self) -> bool:
        """Whether the study must measure more of a layer than its smoothing scales."""
        return self.clip_search or self.keep_8bit > 0


def make_config(**options: Any) -> ConvertConfig:
    """Validate options.

    Raises:
        ConfigError: an unknown option or a value out of range; the message names each.
    """
    return make_options(ConvertConfig, "conversion", options)


def stays_tied(spec: ModelSpec, config: ConvertConfig) -> bool:
    """Whether the output shares the embedding with the head, which no fold into them and no
    quantised head allows."""
    folded = config.rotate and spec.architecture.rotates_residual
    return spec.tied and not folded and config.lm_head_bits == 16


def online_rotations(spec: ModelSpec, config: ConvertConfig) -> Online:
    """What the server rotates: R4 in blocks that are whole on each of ``config.max_tp`` shards, and
    R1 where no fold can.

    Raises:
        UnsupportedModelError: a size cannot be split so.
    """
    if not config.rotate:
        return Online()
    down = OnlineHadamard(
        size=spec.intermediate, block=choose_block(spec.intermediate, config.max_tp).size
    )
    if spec.architecture.rotates_residual:
        return Online(down_proj=down)
    return Online(
        down_proj=down,
        readers=OnlineHadamard(size=spec.hidden, block=choose_block(spec.hidden).size),
    )


def make_schema(spec: ModelSpec, config: ConvertConfig) -> QuantizationSchema:
    """The output's ``quantization_config``.

    Raises:
        ConfigError: a linear of the model does not fit the group size or ``max_tp``, or there is no
            head to quantise.
        UnsupportedModelError: a size has no Hadamard block.
    """
    if config.lm_head_bits < 16 and spec.architecture.head_is_embedding:
        raise ConfigError(
            f"--lm-head-bits {config.lm_head_bits}: expected 16, as the server computes the logits"
            f" of {spec.architecture.class_name} from the 16-bit embedding. Leave the option out."
        )
    clip = ACTIVATION_CLIP[config.activation_bits]
    head_weights = (
        WeightScheme(bits=4, group_size=config.group_size)
        if config.lm_head_bits == 4
        else WeightScheme(bits=8)
    )
    head = LinearScheme(
        weights=head_weights, activations=ActivationScheme(bits=8, clip=ACTIVATION_CLIP[8])
    )
    schema = QuantizationSchema(
        weights=WeightScheme(bits=config.weight_bits, group_size=config.group_size),
        activations=ActivationScheme(bits=config.activation_bits, clip=clip),
        online=online_rotations(spec, config),
        ignore=spec.routers(),
        lm_head=head if config.lm_head_bits < 16 else None,
        max_tensor_parallel=config.max_tp,
    )
    check_shards(spec, schema, config.max_tp)
    return schema


def check_shards(spec: ModelSpec, schema: QuantizationSchema, shards: int) -> None:
    """Refuse what the format cannot shard: the writers are split along their inputs, in whole pairs
    of codes and whole groups.

    Raises:
        ConfigError: a linear has no whole number of pairs or groups of inputs on each of ``shards``
            shards.
    """
    unit = max(2, schema.weights.group_size)
    for linear in spec.architecture.linears:
        inputs = spec.linear_shape(linear)[1]
        split = shards if linear in spec.architecture.writers else 1
        if inputs % (unit * split):
            raise ConfigError(
                f"{linear}: {inputs} inputs over {split} shard(s): expected a whole number of runs"
                f" of {unit} inputs on each (group size {schema.weights.group_size}). Choose"
                " another --group-size or a lower --max-tp."
            )
