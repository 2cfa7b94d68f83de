# SPDX-License-Identifier: Apache-2.0
"""Check a converted directory: against its schema and manifest, and against its source, from which
some of its codes are derived again."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from smoothrot_offline.check.inspect import (
    TensorTable,
    group_scale_problem,
    model_dtype,
    open_converted,
    structure_problems,
)
from smoothrot_offline.console import ProgressCallback, no_progress
from smoothrot_offline.output.manifest import Manifest, read_manifest
from smoothrot_offline.rounding.rtn import quantize_rtn, relative_error, store
from smoothrot_offline.source.checkpoint import (
    Checkpoint,
    file_digest,
    open_checkpoint,
    tensor_digest,
)
from smoothrot_offline.source.family import ModelSpec
from smoothrot_offline.source.headers import CONFIG_NAME
from smoothrot_offline.transform.record import read_transform
from smoothrot_vllm.errors import CheckpointError
from smoothrot_vllm.format import (
    WEIGHT_GROUP_SCALE,
    WEIGHT_PACKED,
    WEIGHT_SCALE,
    LinearScheme,
    group_count,
    weight_tensors,
)
from smoothrot_vllm.reference import dequantize_weight, unpack_group_scale


class Verification(BaseModel):
    """What was checked and every problem found; ``ok`` if there is none."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ok: bool
    tensors: int
    files: int
    bytes: int
    problems: list[str]


def verify(directory: Path, progress: ProgressCallback = no_progress) -> Verification:
    """Read everything: structure against the schema, every tensor and file against the manifest's
    digests.

    Raises:
        SmoothRotError: the directory cannot be opened as a converted checkpoint at all.
    """
    checkpoint, spec, schema = open_converted(directory)
    manifest = read_manifest(directory)
    expected = spec.output_tensors(schema, spec.tied, model_dtype(checkpoint.config))
    groups = {
        f"{linear}.{WEIGHT_GROUP_SCALE}": group_count(inputs, scheme.weights)
        for linear, _, inputs in spec.output_linears(spec.tied)
        if (scheme := schema.scheme(linear)) is not None
    }
    problems = [*structure_problems(checkpoint, expected, manifest)]
    names = [name for name in manifest.tensors if name in checkpoint.tensors]
    total = len(names) + len(manifest.files)
    for done, name in enumerate(names):
        progress("tensors", done, total)
        problems += _tensor_problems(checkpoint, manifest, name, expected, groups)
    for done, (name, digest) in enumerate(manifest.files.items(), start=len(names)):
        progress("files", done, total)
        path = directory / name
        if not path.is_file():
            problems.append(f"{path}: the file is missing")
        elif file_digest(path) != digest:
            problems.append(f"{path}: the file is not the one that was written (SHA-256 differs)")
    progress("done", total, total)
    return Verification(
        ok=not problems,
        tensors=len(names),
        files=len(manifest.files),
        bytes=sum((directory / file).stat().st_size for file in checkpoint.files),
        problems=problems,
    )


def _tensor_problems(
    checkpoint: Checkpoint,
    manifest: Manifest,
    name: str,
    expected: TensorTable,
    groups: Mapping[str, int],
) -> Iterator[str]:
    """Problems of one tensor's bytes; ``groups`` has how many scales a row of each tensor of group
    scales holds."""
    where = f"tensor {name} in {checkpoint.tensors[name].file}"
    try:
        tensor = checkpoint.load([name])[name]
    except CheckpointError as error:
        yield str(error)
        return
    # Another shape, or another dtype, which may have no order, is a problem of the structure.
    if (tuple(tensor.shape), tensor.dtype) == expected.get(name):
        if name.endswith(f".{WEIGHT_SCALE}") and not (tensor > 0).all():
            yield f"{where}: expected positive scales, got {int((tensor <= 0).sum())} others"
        if name in groups and (problem := group_scale_problem(tensor, groups[name])):
            yield f"{where}: {problem}"
    if tensor_digest(tensor) != manifest.tensors[name].sha256:
        yield f"{where}: its bytes are not the ones that were written (SHA-256 differs)"


ERROR_TOLERANCE = 1e-9
"""Relative; the recorded weight errors are sums in double precision, which another machine may
add in another order."""


class SourceComparison(BaseModel):
    """What was compared with the source, and every difference.

    ``layers`` were sampled. ``codes`` linears have been rounded again and compared code by code;
    ``errors`` linears have had their relative weight error computed again and compared with the
    manifest's, where the rounding depends on the calibration.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    layers: list[int]
    codes: int
    errors: int
    problems: list[str]


def compare_with_source(directory: Path, source: Path) -> SourceComparison:
    """Compare a converted directory with the model it says it was made from: first, middle and last
    decoder layer.

    Raises:
        SmoothRotError: one of them cannot be opened.
    """
    converted, spec, schema = open_converted(directory)
    manifest = read_manifest(directory)
    original = open_checkpoint(source)
    problems = _file_problems(original, manifest)
    if problems:
        return SourceComparison(layers=[], codes=0, errors=0, problems=problems)
    recorded = read_transform(directory)
    layers = sorted({0, spec.layers // 2, spec.layers - 1})
    exact = manifest.config.rounding == "rtn"
    compared = 0
    for index in layers:
        tensors = original.load_relative(spec.layer_prefix(index), spec.layer_tensors(index))
        tensors = {name: tensor.double() for name, tensor in tensors.items()}
        recorded.transform.layer(index, tensors, recorded.scales[index])
        for linear in spec.layer_table(index).linears:
            scheme = schema.scheme(spec.layer_prefix(index) + linear)
            if scheme is None:
                continue
            compared += 1
            weight = tensors[f"{linear}.weight"]
            problems += _linear_problems(
                converted, spec, manifest, (index, linear), weight, scheme, exact
            )
    return SourceComparison(
        layers=layers,
        codes=compared if exact else 0,
        errors=0 if exact else compared,
        problems=problems,
    )


def _file_problems(original: Checkpoint, manifest: Manifest) -> list[str]:
    found = {name: file_digest(original.path / name) for name in [CONFIG_NAME, *original.files]}
    return [
        f"{original.path / name}: not the file that was converted: expected SHA-256"
        f" {manifest.source.files.get(name)}, got {found.get(name)}"
        for name in sorted({*found, *manifest.source.files})
        if found.get(name) != manifest.source.files.get(name)
    ]


def _linear_problems(
    converted: Checkpoint,
    spec: ModelSpec,
    manifest: Manifest,
    where: tuple[int, str],
    weight: torch.Tensor,
    scheme: LinearScheme,
    exact: bool,
) -> list[str]:
    index, linear = where
    name = spec.layer_prefix(index) + linear
    out, inputs = weight.shape
    found = converted.load(
        [f"{name}.{suffix}" for suffix in weight_tensors(out, inputs, scheme.weights)]
    )
    if exact:
        rounded = quantize_rtn(weight, scheme.weights, name)
        again, _ = store([(weight, rounded)], weight.shape, scheme.weights, name)
        differ = sum(int((again[tensor] != found[tensor]).sum()) for tensor in again)
        return (
            [
                f"tensor {name}: {differ} bytes of codes or scales are not those that the source"
                " leads to"
            ]
            if differ
            else []
        )
    groups = group_count(inputs, scheme.weights)
    stored = dequantize_weight(
        found[f"{name}.{WEIGHT_PACKED}"],
        found[f"{name}.{WEIGHT_SCALE}"],
        unpack_group_scale(found[f"{name}.{WEIGHT_GROUP_SCALE}"], groups) if groups else None,
        scheme.weights.bits,
    )
    error = relative_error(float((weight - stored).square().sum()), float(weight.square().sum()))
    recorded = manifest.layers[index].weight_error[linear]
    if abs(error - recorded) <= ERROR_TOLERANCE * recorded:
        return []
    return [
        f"tensor {name}: relative weight error: expected {recorded} from the manifest, got {error}"
        " against the source"
    ]
