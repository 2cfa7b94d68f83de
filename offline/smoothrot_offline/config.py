# SPDX-License-Identifier: Apache-2.0
"""Every option of the commands in one validated place, with its help and its default, and the
checkpoint schema that those of a conversion lead to.

The command line is made from these classes, so importing them must be quick: what needs torch is
imported by the functions that do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from smoothrot_vllm.errors import ConfigError

if TYPE_CHECKING:
    from smoothrot_offline.source.family import ModelSpec
    from smoothrot_vllm.format import Online, QuantizationSchema

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


Policy = Literal["max", "quantile", "l2", "search", "learned"]


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Calibration(_Options):
    calib: str = Field(
        "generated",
        description="Calibration text: a file, 'generated' by the model itself, or a hub data set.",
    )
    calib_samples: int = Field(64, ge=1, le=MOST, description="Calibration sequences.")
    calib_seqlen: int = Field(512, ge=2, le=MOST, description="Tokens of a calibration sequence.")
    seed: int = Field(
        0, ge=0, lt=2**63, description="Seed of the random signs and of the calibration text."
    )


class ConvertConfig(_Calibration):
    """Options of ``smoothrot-convert run``, which the manifest records. Every one of them
    changes the output but ``preset``, the recipe that the others come from where the user did
    not choose."""

    preset: Literal["none", "fast", "balanced", "best", "paper-compat"] = "none"
    weight_bits: Literal[4, 8] = Field(4, description="Bits of a weight.")
    activation_bits: Literal[4, 8] = Field(4, description="Bits of an activation.")
    group_size: Literal[-1, 32, 64, 128] = Field(
        -1, description="Inputs that share a scale of 4-bit weights; -1: a whole row."
    )
    scales: Literal["none", "max", "quantile", "l2", "search", "learned"] = Field(
        "l2",
        description="Smoothing of down_proj's input: by a statistic, by trying them out, or by"
        " gradient from there.",
    )
    smooth_norms: bool = Field(
        False, description="Smooth what the norms give out as well, after R1."
    )
    alpha: float = Field(
        0.5,
        ge=0.0,
        le=1.0,
        description="Share of the difficulty that smoothing moves to the weight.",
    )
    quantile: float = Field(
        0.999, gt=0.0, le=1.0, description="quantile: of the input's magnitudes in each channel."
    )
    rounding: Literal["rtn", "gptq", "gptaq", "qronos"] = Field(
        "rtn",
        description="Weight rounding: to nearest, error-compensated, or towards the full-precision"
        " model as well, by a share of the error (gptaq) or all of it (qronos).",
    )
    hessian: Literal["layer", "tokens", "model"] = Field(
        "layer",
        description="gptq, gptaq, qronos: tokens count alike, or by what an error there costs the"
        " whole model; or output channels as well.",
    )
    act_order: bool = Field(
        True, description="gptq, gptaq, qronos: channels of large inputs first."
    )
    damping: float = Field(
        0.01,
        gt=0.0,
        allow_inf_nan=False,
        description="gptq, gptaq, qronos: added to the Hessian's diagonal, as a fraction of its"
        " mean.",
    )
    propagation: float = Field(
        0.5,
        ge=0.0,
        le=1.0,
        description="gptaq: share of earlier layers' error to make up for.",
    )
    clip_search: bool = Field(
        False, description="Search the clip of each 4-bit input instead of 0.9 for all."
    )
    keep_8bit: float = Field(
        0.0,
        ge=0.0,
        le=1.0,
        description="Share of the weights that stay at 8 bits, with 8-bit inputs: those whose"
        " error costs most.",
    )
    sign_seeds: int = Field(
        1,
        ge=1,
        le=MOST,
        description="Random-sign seeds to try; the best on held-out text is kept.",
    )
    lm_head_bits: Literal[4, 8, 16] = Field(
        16,
        description="Bits of the head (4: in groups of --group-size); the embedding stays 16-bit.",
    )
    max_tp: int = Field(
        1, ge=1, le=MOST, description="Largest tensor-parallel size the output must serve."
    )
    rotate: bool = Field(True, description="Rotate at all, online and offline.")
    residual: Literal["folded", "online"] = Field(
        "folded",
        description="R1 folded into the weights, or left to the server: then hidden states,"
        " embedding, norms and head stay those of the source.",
    )
    rotations: Literal["hadamard", "learned"] = Field(
        "hadamard",
        description="R1 and R2: Hadamard transforms, or learned from there, and smoothing scales"
        " with them, by the loss of the whole model.",
    )
    rotation_steps: int = Field(
        48,
        ge=1,
        le=MOST,
        description="learned rotations: optimizer steps, the budget of learning.",
    )

    distill_steps: int = Field(
        0,
        ge=0,
        le=MOST,
        description="After rounding: optimizer steps that train scales, norms and biases together"
        " towards the original's predictions, both models in memory.",
    )

    def described(self) -> str:
        """The recipe in a line of the field's own terms."""
        groups = "per channel" if self.group_size == -1 else f"groups of {self.group_size}"
        parts = [
            f"W{self.weight_bits}A{self.activation_bits} {groups}",
            f"{self.rounding}"
            + " by the model's loss" * self.weighs_tokens
            + ", output channels together" * self.relates_outputs,
            f"scales {self.scales}",
        ]
        parts += ["smoothed norms"] * self.smooths_norms
        parts += ["searched clips"] * self.clip_search + [
            f"{self.keep_8bit:.0%} of the weights at 8 bits"
        ] * (self.keep_8bit > 0)
        parts += [f"best of {self.sign_seeds} sign seeds"] * (self.sign_seeds > 1) + [
            "no rotation"
        ] * (not self.rotate)
        parts += ["R1 online"] * (self.rotate and self.residual == "online")
        parts += [f"rotations learned in {self.rotation_steps} steps"] * self.learns_rotations
        parts += [f"distilled in {self.distill_steps} steps"] * (self.distill_steps > 0)
        parts.append(f"{self.lm_head_bits}-bit head")
        return ", ".join(parts)

    @property
    def asymmetric(self) -> bool:
        """Whether rounding aims at the full-precision model's outputs."""
        return self.rounding in ("gptaq", "qronos")

    @property
    def weighs_tokens(self) -> bool:
        """Whether tokens count in rounding by what an error there costs the whole model."""
        return self.hessian != "layer" and self.rounding != "rtn"

    @property
    def relates_outputs(self) -> bool:
        """Whether output channels make up for each other by what that gains the whole model."""
        return self.hessian == "model" and self.rounding != "rtn"

    @property
    def needs_calibration(self) -> bool:
        """Whether the model must be run at all."""
        measured = self.needs_probe or self.holds_out_text
        return self.scales != "none" or self.rounding != "rtn" or measured

    @property
    def holds_out_text(self) -> bool:
        """Whether something is judged by text that nothing was fitted to."""
        return self.sign_seeds > 1 or self.learns_rotations or self.distill_steps > 0

    @property
    def smooths_norms(self) -> bool:
        """Whether what the norms give out is smoothed: only with some scales for down_proj, so
        that ``none`` is plain QuaRot."""
        return self.smooth_norms and self.scales != "none"

    @property
    def learns_rotations(self) -> bool:
        """Whether R1, where it is folded, R2 and smoothing scales are learned."""
        return self.rotate and self.rotations == "learned"

    @property
    def needs_probe(self) -> bool:
        """Whether the study must measure more of a layer than its smoothing scales."""
        return self.clip_search or self.keep_8bit > 0


class AnalysisConfig(_Calibration):
    """Options of ``smoothrot-convert analyze``."""

    calib_samples: int = Field(
        8,
        ge=1,
        le=MOST,
        description="Sequences that scales are chosen from; as many others measure.",
    )
    policies: tuple[Policy, ...] = Field(
        get_args(Policy),
        min_length=1,
        description="Smoothing policies to compare with max, by commas; all of them if absent.",
    )
    layers: tuple[int, ...] | None = Field(None, description="Only these layers: 0,5,10-12.")


class ReportConfig(_Options):
    """Options of ``smoothrot-convert report``; what is not asked for is not measured."""

    texts: tuple[str, ...] = ()
    seqlen: int = Field(2048, ge=2, le=MOST, description="Tokens of a window.")
    limit_chunks: int | None = Field(
        None, ge=1, le=MOST, description="Only the first windows of each text."
    )
    tasks: tuple[str, ...] = Field((), description="lm-eval tasks, by commas.")
    include_path: str | None = Field(None, description="Folder of further lm-eval task files.")
    limit: int | None = Field(
        None, ge=1, le=MOST, description="Only the first documents of each task."
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = Field(
        "float32",
        description="Arithmetic of everything but the quantized linears' integers; auto: the dtype"
        " of config.json.",
    )
    speed: bool = Field(True, description="Measure tokens a second; all models at once in memory.")
    prompt_tokens: int = Field(128, ge=1, le=MOST, description="Tokens of the prefill.")
    new_tokens: int = Field(16, ge=1, le=MOST, description="Tokens decoded after it.")
    rounds: int = Field(5, ge=1, le=MOST, description="Rounds of which the median counts.")


def make_config(**options: Any) -> ConvertConfig:
    """Validate options.

    Raises:
        ConfigError: an unknown option or a value out of range; the message names each.
    """
    return make_options(ConvertConfig, "conversion", options)


def folds_residual(spec: ModelSpec, config: ConvertConfig) -> bool:
    """Whether R1 is folded."""
    wanted = config.rotate and config.residual == "folded"
    return wanted and spec.architecture.rotates_residual


def stays_tied(spec: ModelSpec, config: ConvertConfig) -> bool:
    """Whether the output shares the embedding with the head, which no fold into them and no
    quantized head allows."""
    return spec.tied and not folds_residual(spec, config) and config.lm_head_bits == 16


def online_rotations(spec: ModelSpec, config: ConvertConfig) -> Online:
    """What the server rotates: R4 in blocks that are whole on each of ``config.max_tp`` shards, and
    R1 where it is not folded.

    Raises:
        ConfigError: R1 is to be left to a server that cannot rotate what a linear reads.
        UnsupportedModelError: a size cannot be split so.
    """
    from smoothrot_vllm.format import Online, OnlineHadamard
    from smoothrot_vllm.hadamard import choose_block

    if not config.rotate:
        return Online()

    def rotated(width: int, shards: int = 1) -> OnlineHadamard:
        return OnlineHadamard(size=width, block=choose_block(width, shards).size)

    online = Online(
        down_proj=rotated(spec.intermediate, config.max_tp),
        within={
            module: rotated(width, config.max_tp) for module, width in spec.other_widths().items()
        },
        readers=None if folds_residual(spec, config) else rotated(spec.hidden),
    )
    if online.readers is None:
        return online
    for reader in (reader for table in spec.tables for reader in table.quantized_readers):
        if spec.experts or online.rotation(reader) is None:
            raise ConfigError(
                "--residual online: expected linears whose input the server can rotate, those of a"
                f" dense model; {reader} reads the residual stream as well. Use --residual folded."
            )
    return online


def make_schema(spec: ModelSpec, config: ConvertConfig) -> QuantizationSchema:
    """The output's ``quantization_config``.

    Raises:
        ConfigError: a linear of the model does not fit the group size or ``max_tp``, 8-bit weights
            are to have groups, or there is no head to quantize or no norm to smooth.
        UnsupportedModelError: a size has no Hadamard block.
    """
    from smoothrot_vllm.format import (
        ActivationScheme,
        LinearScheme,
        QuantizationSchema,
        WeightScheme,
    )

    if config.lm_head_bits < 16 and not spec.architecture.quantizes_head:
        weights = "embedding" if spec.architecture.head_is_embedding else "head"
        raise ConfigError(
            f"--lm-head-bits {config.lm_head_bits}: expected 16, as the server computes the logits"
            f" of {spec.architecture.class_name} from the 16-bit {weights}. Leave the option out."
        )
    if config.smooth_norms and not spec.architecture.norms:
        raise ConfigError(
            f"--smooth-norms: expected norms in front of the linears, which"
            f" {spec.architecture.class_name} does not have. Leave the option out."
        )
    if config.weight_bits == 8 and config.group_size != -1:
        raise ConfigError(
            f"--group-size {config.group_size} with --weight-bits 8: expected -1, as 8-bit weights"
            " have one scale for each output channel. Leave --group-size out."
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
        ignore=spec.unquantized(),
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
    split = {
        (linear, spec.linear_shape(linear, table)[1]): shards if linear in table.writers else 1
        for table in spec.tables
        for linear in table.linears
    }
    for (linear, inputs), ranks in split.items():
        if inputs % (unit * ranks):
            raise ConfigError(
                f"{linear}: {inputs} inputs over {ranks} shard(s): expected a whole number of runs"
                f" of {unit} inputs on each (group size {schema.weights.group_size}). Choose"
                " another --group-size or a lower --max-tp."
            )
