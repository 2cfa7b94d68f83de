# SPDX-License-Identifier: Apache-2.0
"""Everything that can be refused, or should be said, before hours of work: ``plan`` asks for it,
and ``run`` begins with it."""

from dataclasses import dataclass

import torch

from smoothrot_offline import ranks
from smoothrot_offline.check.proof import prove
from smoothrot_offline.config import ConvertConfig, folds_residual, make_schema
from smoothrot_offline.decide.study import PROBE_SAMPLES
from smoothrot_offline.device import CPU
from smoothrot_offline.source.checkpoint import Checkpoint, check_source
from smoothrot_offline.source.family import ModelSpec
from smoothrot_offline.source.headers import SideFiles, side_files
from smoothrot_offline.source.layers import check_seqlen
from smoothrot_offline.source.parts import DraftHead
from smoothrot_offline.source.resolve import resolve
from smoothrot_offline.source.text import check_calibration
from smoothrot_offline.transform.draft import refuse_removed_channels
from smoothrot_vllm.errors import CheckpointError, ConfigError
from smoothrot_vllm.format import QuantizationSchema
from smoothrot_vllm.hadamard import HadamardFactors, choose_block

SMALL_BLOCK = 64
"""A rotation in blocks below this, where the width has more than one, spreads an outlier over
few channels."""


@dataclass(frozen=True)
class Admitted:
    """A conversion that nothing known beforehand forbids; ``notes`` are for people: what is not
    as they may expect."""

    spec: ModelSpec
    schema: QuantizationSchema
    side_files: SideFiles
    notes: list[str]


def admit_model(checkpoint: Checkpoint) -> ModelSpec:
    """Check a source from its configuration and headers, that its family's table is right for it,
    and that a head stored beside the embedding it is tied to equals it.

    The last, in a directory, is the one thing for which weights are read.

    Raises:
        UnsupportedModelError: the architecture or one of its sizes cannot be converted.
        CheckpointError: a tensor is missing, unexpected, of another shape or dtype, or the head
            differs.
    """
    spec = resolve(checkpoint.config, checkpoint.tensors)
    prove(spec)
    head, embedding = (
        f"{name}.weight" for name in (spec.architecture.lm_head, spec.architecture.embedding)
    )
    if not spec.tied and head not in checkpoint.tensors and checkpoint.renamed:
        raise CheckpointError(
            f"{checkpoint.path}: expected {head}, as config.json says no tie_word_embeddings, got"
            f" none: an embedding model, which has no head ({checkpoint.renamed}). Convert a causal"
            " language model."
        )
    unused = [
        *spec.behind(checkpoint.tensors),
        *spec.unread(checkpoint.tensors),
        *[head] * spec.tied,
    ]
    check_source(checkpoint, spec.source_tensors(), ignorable=unused)
    stored_twice = spec.tied and head in checkpoint.tensors and checkpoint.path.is_dir()
    if stored_twice and not torch.equal(*checkpoint.load([head, embedding]).values()):
        raise CheckpointError(
            f"{checkpoint.path}: config.json says tie_word_embeddings, but {head} differs from"
            f" {embedding}. Correct tie_word_embeddings, or remove the head from the checkpoint."
        )
    return spec


def admit_calibration(
    checkpoint: Checkpoint, spec: ModelSpec, calib: str, seqlen: int, held_out: bool = False
) -> None:
    """Check that the calibration text can be had.

    Raises:
        ConfigError, CheckpointError: as
            :func:`~smoothrot_offline.source.text.check_calibration`, or ``seqlen`` is too
            long.
    """
    check_seqlen(spec, seqlen)
    check_calibration(checkpoint, spec.config, calib, seqlen, held_out)


def admit(
    checkpoint: Checkpoint, config: ConvertConfig, workers: int = 1, device: torch.device = CPU
) -> Admitted:
    """Check a conversion; the arguments are those of :func:`~smoothrot_offline.convert.convert`.

    Raises:
        UnsupportedModelError, CheckpointError: as :func:`admit_model`, or a channel of hidden
            states is missing that the draft head reads.
        ConfigError: the options do not fit the model or each other, or the calibration text cannot
            be had.
    """
    return admit_options(checkpoint, admit_model(checkpoint), config, workers, device)


def admit_options(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    config: ConvertConfig,
    workers: int = 1,
    device: torch.device = CPU,
) -> Admitted:
    """:func:`admit` of a model that :func:`admit_model` has let pass."""
    schema = make_schema(spec, config)
    if config.scales != "none" and not spec.architecture.scales_products:
        raise ConfigError(
            f"--scales {config.scales}: expected none, as experts of"
            f" {spec.architecture.class_name} compute (up + 1) * glu of a clamped up, which no"
            " scale commutes with. Use --scales none."
        )
    if workers > 1 and config.rounding != "rtn":
        raise ConfigError(
            f"--workers {workers}: expected 1 with --rounding {config.rounding}, which rounds each"
            " layer for what the layers before it give out. Leave the option out, or use"
            " --rounding rtn."
        )
    if workers > 1 and device.type != "cpu":
        raise ConfigError(
            f"--workers {workers}: expected 1 with --device {device}, which one process keeps busy."
            " Leave the option out, or use --device cpu."
        )
    _admit_ranks(config)
    if config.distill_steps and checkpoint.packing is not None:
        raise ConfigError(
            f"--distill-steps {config.distill_steps}: expected 16-bit weights, as the original runs"
            f" as a whole, got {checkpoint.packing.title} ones such as {min(checkpoint.packed)}."
            " Leave the option out."
        )
    if config.needs_calibration:
        admit_calibration(
            checkpoint, spec, config.calib, config.calib_seqlen, config.holds_out_text
        )
    beside = side_files(checkpoint.path)
    notes = [checkpoint.renamed] if checkpoint.renamed else []
    if checkpoint.packing is not None:
        notes += [
            f"{len(checkpoint.packed)} weights are read from {checkpoint.packing.title} ones: the"
            " output is at best as good as they are. Convert the 16-bit original if there is one",
            *checkpoint.packing.notes,
        ]
    if config.rotate:
        notes += [
            f"{name}: {size} channels are rotated in {size // factors.size} blocks of"
            f" {factors.size}, each by itself: an outlier is spread over few channels"
            for name, (size, factors) in rotation_blocks(spec, config).items()
            if factors.size < min(size, SMALL_BLOCK)
        ]
    if spec.draft is not None:
        notes.append(_admit_draft(checkpoint, spec, spec.draft, config))
    if behind := spec.behind(checkpoint.tensors):
        stored = {checkpoint.tensors[name].stored for name in behind}
        notes.append(
            f"not copied: {len(stored)} tensors such as {min(stored)}, of layers behind the last"
            " one, a head that drafts tokens. Speculate with --speculative-config by ngram or a"
            " draft model"
        )
    if unread := spec.unread(checkpoint.tensors):
        notes.append(
            f"not copied: {len(unread)} tensors such as {min(unread)}, of layers that share"
            " another's keys and values and read none of their own"
        )
    if beside.left:
        notes.append(
            "not copied: " + ", ".join(f"{name} ({reason})" for name, reason in beside.left.items())
        )
    return Admitted(spec, schema, beside, notes)


def _admit_ranks(config: ConvertConfig) -> None:
    """Refuse ranks that would have nothing to do.

    Raises:
        ConfigError: there are more than sequences, or nothing is calibrated.
    """
    if ranks.count() > 1 and not config.needs_calibration:
        raise ConfigError(
            f"{ranks.count()} ranks: expected a conversion that calibrates, which is what they"
            f" share, got {config.described()}. Run it without torchrun."
        )
    most = min(config.calib_samples, PROBE_SAMPLES)
    if ranks.count() > most:
        raise ConfigError(
            f"{ranks.count()} ranks: expected at most {most}, a calibration sequence for each:"
            f" --calib-samples is {config.calib_samples}, and clips and 8-bit layers are measured"
            f" on {PROBE_SAMPLES}. Start fewer with torchrun's --nproc-per-node."
        )


def _admit_draft(
    checkpoint: Checkpoint, spec: ModelSpec, head: DraftHead, config: ConvertConfig
) -> str:
    """What is to be said of a model's own draft head.

    Raises:
        CheckpointError: R1 is to be folded behind a final norm that removes channels.
    """
    kept = f"{head.module}.*: the head that drafts tokens stays 16-bit"
    if config.rotate and not folds_residual(spec, config):
        return f"{kept}, as it is"
    norm = f"{spec.architecture.final_norm}.weight"
    online = "" if spec.experts else "--residual online keeps it as it is"
    if checkpoint.path.is_dir():
        advice = f"Remove {head.module}.* from the checkpoint{online and f', or {online}'}."
        refuse_removed_channels(spec, checkpoint.load([norm])[norm].double(), advice)
    return (
        f"{kept}, with two linears more for the hidden states of a converted model"
        f"{online and f'; {online}'}"
    )


def rotation_blocks(
    spec: ModelSpec, config: ConvertConfig
) -> dict[str, tuple[int, HadamardFactors]]:
    """Width and block of each rotation, by its name in the rotation papers."""
    r1 = "R1" if folds_residual(spec, config) else "R1 online"
    widths = {r1: (spec.hidden, 1)}
    for head_dim in spec.rotated_heads:
        several = len(spec.rotated_heads) > 1
        widths[f"R2 of heads of {head_dim}" if several else "R2"] = (head_dim, 1)
    widths["R4"] = (spec.intermediate, config.max_tp)
    for module, width in spec.other_widths().items():
        widths[f"R4 of {module}"] = (width, config.max_tp)
    return {name: (size, choose_block(size, shards)) for name, (size, shards) in widths.items()}
