# SPDX-License-Identifier: Apache-2.0
"""``smoothrot_manifest.json``: where a converted checkpoint came from, what was done, and what
every byte must be.

No times, no paths, no host: converting the same source twice gives the same manifest.
"""

import math
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from smoothrot_offline.config import ConvertConfig
from smoothrot_offline.source.checkpoint import DTYPES
from smoothrot_vllm.errors import CheckpointError
from smoothrot_vllm.foreign_files import read_json
from smoothrot_vllm.format import MANIFEST_NAME

PACKAGES = ("smoothrot-vllm", "torch", "transformers", "safetensors", "tokenizers", "numpy")


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SourceRecord(_Record):
    """The source: model type, whether head and embedding were one, SHA-256 of ``config.json``
    and each weight file."""

    model_type: str
    tied: bool
    files: dict[str, str]


class CalibrationRecord(_Record):
    """The calibration tokens: how many, and SHA-256 of them as little-endian int64."""

    samples: int
    seqlen: int
    tokens_sha256: str


class LearnedRecord(_Record):
    """Learned rotations and smoothing scales: optimizer steps, and ``KL(original || quantized)`` of
    held-out text, in nats, with 16-bit weights and quantized inputs, at the start and after. Where
    it is no less, there is nothing learned in the model."""

    steps: int
    before: float
    after: float


class RotationRecord(_Record):
    """Hadamard block of each rotation, and the seed that the signs follow from. R1 is folded, or
    else online in the readers' input; R2 is None if no layer has a place for it, and has a block of
    each width where heads differ by layer. ``sign_losses``
    are the held-out losses, in nats, of the seeds that were tried; empty if only one was.
    ``learned`` is None if the rotations are Hadamard transforms."""

    r1: int
    r2: int | list[int] | None
    r4: int
    seed: int
    sign_losses: dict[int, float] = {}
    learned: LearnedRecord | None = None


class DistillationRecord(_Record):
    """Distillation: optimizer steps, sequences that were trained on, and ``KL(original ||
    converted)`` of others, in nats, as rounding left the model and after; and the dtype of the
    products. Where the loss is no less, the model is as rounding left it."""

    steps: int
    sequences: int
    before: float
    after: float
    products: Literal["float32", "bfloat16"] = "float32"


class SmoothingRecord(_Record):
    """What a scale policy chose for one layer: the statistic of the input, its exponent alpha, the
    quantile if it is one.

    ``error`` is the layer error (round-to-nearest, sampled tokens) relative to that of the max
    policy with alpha 0.5.
    """

    policy: str
    statistic: str
    alpha: float
    quantile: float | None
    error: float
    activation_max: float
    scale_min: float
    scale_max: float
    scale_geometric_mean: float


class ScaleRange(_Record):
    """The smallest and the largest of a norm's smoothing scales, whose geometric mean is about
    one."""

    smallest: float
    largest: float


class LayerRecord(_Record):
    """One decoder layer: relative weight error ``|W - Q(W)| / |W|`` (Frobenius) by linear, its
    smoothing, that of its norms, and by the first linear of each group that reads one input: its
    clip, and the ``KL`` in nats that quantizing it alone costs the model. All experts of a layer
    are one group.

    Of a layer with experts, ``smoothing`` is that of a shared one, None without, and ``experts``
    has that of each other; None for those
    listed in ``unseen_experts``, which no calibration token was routed to and whose scales are 1.
    """

    weight_error: dict[str, float]
    smoothing: SmoothingRecord | None = None
    experts: list[SmoothingRecord | None] = []
    unseen_experts: list[int] = []
    norm_scales: dict[str, ScaleRange] = {}
    clips: dict[str, float] = {}
    sensitivity: dict[str, float] = {}


class TensorRecord(_Record):
    """One tensor of the output: its file, dtype and shape as in the safetensors header, SHA-256
    of its bytes."""

    file: str
    dtype: str
    shape: list[int]
    sha256: str

    @property
    def nbytes(self) -> int:
        """Size of the tensor's data."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class Manifest(_Record):
    """The whole file. ``device`` is what the conversion was computed on: ``cpu``, or ``cuda``
    and the GPU's name."""

    manifest_version: Literal[1] = 1
    config: ConvertConfig
    source: SourceRecord
    packages: dict[str, str]
    calibration: CalibrationRecord | None
    rotations: RotationRecord | None
    distillation: DistillationRecord | None = None
    device: str = "cpu"
    layers: list[LayerRecord]
    lm_head_weight_error: float | None
    tensors: dict[str, TensorRecord]
    files: dict[str, str]


def package_versions() -> dict[str, str]:
    """Installed version of each package that can change the output."""
    return {name: _version(name) for name in PACKAGES}


def read_manifest(directory: Path) -> Manifest:
    """Read and validate the manifest of a converted directory.

    Raises:
        CheckpointError: there is none, or it is not valid.
    """
    path = directory / MANIFEST_NAME
    content = read_json(path, "Copy the directory again, or convert the model again.")
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "manifest"
        raise CheckpointError(
            f"{path}: {where}: {first['msg']} (one of {error.error_count()} problems). Convert the"
            " model again."
        ) from None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
