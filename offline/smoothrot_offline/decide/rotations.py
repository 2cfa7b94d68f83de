# SPDX-License-Identifier: Apache-2.0
"""Which rotations to fold: the random signs whose converted model predicts held-out text best, and
R1 and R2 learned from there on samples of what they rotate."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from smoothrot_offline.config import ConvertConfig
from smoothrot_offline.decide.learned_rotations import (
    BATCH,
    Learned,
    ReaderSample,
    learn_head_rotations,
    learn_residual_rotation,
)
from smoothrot_offline.decide.study import LayerStudy
from smoothrot_offline.output.manifest import HeldOutError, LearnedRecord
from smoothrot_offline.rounding.rtn import quantize_rtn
from smoothrot_offline.rounding.served import inputs_through, output_of, quantizers, rotations
from smoothrot_offline.source.family import ModelSpec
from smoothrot_offline.source.layers import Observer, SourceModel
from smoothrot_offline.transform.rotation import DenseRotation, head_matrices
from smoothrot_offline.transform.sides import LayerScales, ModelTransform
from smoothrot_vllm.format import Online, QuantizationSchema

_LOGIT_ROWS = 512


@torch.no_grad()
def trial_loss(
    source: SourceModel,
    schema: QuantizationSchema,
    transform: ModelTransform,
    studies: Sequence[LayerStudy],
    tokens: torch.Tensor,
) -> float:
    """Mean negative log-likelihood in nats of ``tokens (samples, seqlen)`` under the model as a
    conversion would quantize it.

    Weights are rounded to nearest whatever the conversion's own rounding, which would take as long
    as a conversion; the head stays in full precision. One decoder layer is held at a time.

    Args:
        source: the original model.
        schema: bits, groups and clips of every linear.
        transform: with the signs on trial.
        studies: the smoothing scales of each layer.
        tokens: held-out calibration text, int64.
    """
    spec = source.spec
    hidden = transform.embedding(source.embed(tokens).double()).float()
    for index, loaded in source.layers():
        prefix, table = spec.layer_prefix(index), spec.layer_table(index)
        layer = {name: tensor.double() for name, tensor in loaded.items()}
        transform.layer(index, layer, studies[index].scales)
        schemes = {linear: schema.scheme(prefix + linear) for linear in table.linears}
        for linear, scheme in schemes.items():
            if scheme is not None:
                name = f"{linear}.weight"
                layer[name] = quantize_rtn(layer[name], scheme.weights, prefix + name).dequantize()
        model, module = source.build(index, layer)
        with inputs_through(
            module, rotations(table, schema.online) | quantizers(schemes, schema.online)
        ):
            hidden = torch.cat([output_of(model, part) for part in hidden.split(1)])
    return _loss(source, transform, hidden, tokens)


def _loss(
    source: SourceModel, transform: ModelTransform, hidden: torch.Tensor, tokens: torch.Tensor
) -> float:
    gamma = source.tensor(source.norm_name).double()
    head = torch.cat(
        [
            transform.head(rows.double(), gamma).float()
            for rows in source.tensor(source.head_name).split(4096)
        ]
    )
    states = source.final_norm(transform.final_norm(gamma).float())(hidden)[:, :-1].flatten(0, 1)
    total = 0.0
    following = tokens[:, 1:].flatten().to(states.device)
    for rows, targets in zip(states.split(_LOGIT_ROWS), following.split(_LOGIT_ROWS), strict=True):
        total += nn.functional.cross_entropy(
            source.spec.capped(rows @ head.T), targets, reduction="sum"
        ).item()
    return total / len(states)


SAMPLE_SEQUENCES = 16
"""Calibration sequences that the samples come from."""
SAMPLE_TOKENS = 256
"""Tokens of a sample, give or take one for each chunk that a layer runs in."""
SAMPLE_ROWS = 256
"""Rows of the weights behind a norm, and of o_proj, that the layer error is measured on."""


@dataclass(frozen=True)
class LayerSample:
    """Of one decoder layer of the original model: ``readers`` behind each norm, and what o_proj
    reads, float32, or None in a layer without a place for R2."""

    readers: list[ReaderSample]
    output_input: torch.Tensor | None


def learning_steps(spec: ModelSpec) -> int:
    """How often :func:`learn_rotations` reports progress."""
    return spec.layers + len(_rotated_heads(spec)) + int(spec.architecture.rotates_residual)


def learning_samples(samples: int) -> int:
    """How many of the calibration's sequences :func:`learn_rotations` runs."""
    return min(samples, SAMPLE_SEQUENCES)


def learning_flop(spec: ModelSpec, steps: int) -> float:
    """Floating-point operations of the descents: a forward and a backward pass, twice as long,
    of each step's products."""
    rows, query, order = SAMPLE_TOKENS + SAMPLE_ROWS, spec.heads * spec.head_dim, spec.hidden
    values = spec.kv_heads * spec.head_dim * spec.hidden
    product = 2 * SAMPLE_TOKENS * SAMPLE_ROWS
    heads = len(_rotated_heads(spec)) * (
        2 * (rows * query + values) * spec.head_dim + product * query
    )
    residual = (
        BATCH * (2 * rows * order**2 + product * order) + 3 * order**3
        if spec.architecture.rotates_residual
        else 0
    )
    return 3.0 * steps * (heads + residual)


def learning_bytes(spec: ModelSpec) -> int:
    """Memory of all the samples, and of their rotated copies."""
    readers = (
        2 * (SAMPLE_TOKENS + SAMPLE_ROWS) * spec.hidden if spec.architecture.rotates_residual else 0
    )
    return 4 * spec.layers * (2 * readers + SAMPLE_TOKENS * spec.heads * spec.head_dim)


def learn_rotations(
    source: SourceModel,
    config: ConvertConfig,
    schema: QuantizationSchema,
    transform: ModelTransform,
    tokens: torch.Tensor,
    step: Callable[[str], None],
) -> tuple[ModelTransform, LearnedRecord]:
    """The transform with learned matrices in place of the Hadamard ones that they start from: R1
    where it is folded, then R2.

    Smoothing is left out: it scales channels of up_proj's output, which R1's error sees as the
    weight of a row.

    Args:
        source, config: of the conversion.
        schema: its weights' and activations' bits, groups and clip are those that the error is
            measured with.
        transform: with the chosen signs.
        tokens: calibration tokens, int64 ``(samples, seqlen)``.
        step: told what begins, ``learning_steps`` times.

    Raises:
        CheckpointError: the model's activations are not finite.
    """
    spec = source.spec
    samples = _samples(source, config.seed, tokens[: learning_samples(len(tokens))], step)
    residual = None
    if transform.residual is not None:
        step("learning R1")
        residual = learn_residual_rotation(
            [reader for sample in samples for reader in sample.readers],
            transform.residual.rotate(
                torch.eye(spec.hidden, dtype=torch.float64, device=source.device)
            ),
            activations=schema.activations,
            weights=schema.weights,
            steps=config.rotation_steps,
            seed=config.seed,
        )
        transform = replace(transform, residual=DenseRotation(residual.matrices[None]))
    heads: dict[int, Learned] = {}
    for index, sample in enumerate(samples):
        if sample.output_input is not None:
            step(f"learning R2 of layer {index + 1} of {spec.layers}")
            heads[index] = _learn_heads(
                source, config, schema, transform, index, sample.output_input
            )
    r1 = (
        None if residual is None else HeldOutError(hadamard=residual.before, learned=residual.after)
    )
    if not heads:
        return transform, LearnedRecord(steps=config.rotation_steps, r1=r1, r2=None)
    mean = HeldOutError(
        hadamard=sum(learned.before for learned in heads.values()) / len(heads),
        learned=sum(learned.after for learned in heads.values()) / len(heads),
    )
    matrices = [heads[i].matrices if i in heads else None for i in range(spec.layers)]
    return (
        replace(transform, heads=matrices),
        LearnedRecord(steps=config.rotation_steps, r1=r1, r2=mean),
    )


def _rotated_heads(spec: ModelSpec) -> list[int]:
    """The layers with a place for R2."""
    return [index for index in range(spec.layers) if spec.rotates_heads(index)]


def _samples(
    source: SourceModel, seed: int, tokens: torch.Tensor, step: Callable[[str], None]
) -> list[LayerSample]:
    """Run the original model on ``tokens``, layer by layer, and keep some of what the rotated
    linears read."""
    spec = source.spec
    hidden, generator = source.embed(tokens), torch.Generator().manual_seed(seed)
    # Odd, so that it does not keep to one position of the sequences.
    stride = max(1, tokens.numel() // SAMPLE_TOKENS) | 1
    found = []
    for index, layer in source.layers():
        step(f"sampling layer {index + 1} of {spec.layers}")
        table = spec.layer_table(index)
        norms = table.readers if table.rotates_residual else {}
        output = [table.output] if table.value else []
        seen: dict[str, list[torch.Tensor]] = {module: [] for module in (*norms, *output)}
        source.run(
            index,
            layer,
            hidden,
            {module: _keeping(parts, stride) for module, parts in seen.items()},
        )
        inputs = {module: torch.cat(parts) for module, parts in seen.items()}
        readers = []
        for norm, linears in norms.items():
            weight = torch.cat([layer[f"{linear}.weight"] for linear in linears])
            rows = _some_rows(weight, generator).float() * (
                layer[f"{norm}.weight"].float() + table.norm_offset
            )
            variance = inputs[norm].square().mean(dim=1, keepdim=True)
            readers.append(
                ReaderSample(inputs[norm] * (variance + spec.config.rms_norm_eps).rsqrt(), rows)
            )
        found.append(LayerSample(readers, inputs.get(table.output)))
    return found


def _learn_heads(
    source: SourceModel,
    config: ConvertConfig,
    schema: QuantizationSchema,
    transform: ModelTransform,
    index: int,
    output_input: torch.Tensor,
) -> Learned:
    """R2 of decoder layer ``index``, from what its o_proj reads before R2."""
    spec, table = source.spec, source.spec.layer_table(index)
    layer = {name: tensor.double() for name, tensor in source.layer(index).items()}
    # All but R2 and R4: the weights that R2 will be folded into.
    replace(transform, online=Online(readers=transform.online.readers)).layer(
        index, layer, LayerScales()
    )
    output = _some_rows(layer[f"{table.output}.weight"], torch.Generator().manual_seed(config.seed))
    return learn_head_rotations(
        output_input,
        output.float(),
        layer[f"{table.value}.weight"][-spec.values :].float(),
        head_matrices(spec.kv_heads, spec.head_dim).to(source.device),
        activations=schema.activations,
        weights=schema.weights,
        steps=config.rotation_steps,
    )


def _keeping(parts: list[torch.Tensor], stride: int) -> Observer:
    """Appends every ``stride``-th token that it is given."""
    return lambda x: parts.append(x[::stride].clone())


def _some_rows(weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return weight[torch.randperm(len(weight), generator=generator)[:SAMPLE_ROWS].to(weight.device)]
