# SPDX-License-Identifier: Apache-2.0
"""What was trained beside a model (LoRA adapters, draft heads), read and written the same way."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from smoothrot_offline.output.directory import OutputDirectory
from smoothrot_offline.source.checkpoint import file_digest
from smoothrot_offline.transform.record import RecordedTransform, read_transform
from smoothrot_vllm.errors import CheckpointError, ConfigError, UnsupportedModelError
from smoothrot_vllm.foreign_files import read_json, read_tensors
from smoothrot_vllm.format import ADAPTER_BASE, TRANSFORM_NAME


def read_untransformed(path: Path, what: str) -> dict[str, Any]:
    """The configuration of a companion of the original model.

    Raises:
        ConfigError: it has been transformed already.
        CheckpointError: it cannot be read.
    """
    config = read_json(path, f"Save or download the {what} again.")
    if ADAPTER_BASE in config:
        raise ConfigError(
            f"{path}: already transformed, as its {ADAPTER_BASE} says. Give the {what} it was"
            " made from."
        )
    return config


def read_weights(path: Path, what: str) -> dict[str, torch.Tensor]:
    """The tensors of a companion, in their stored dtype.

    Raises:
        CheckpointError: there is no such file, or it is damaged.
    """
    if not path.exists():
        raise CheckpointError(
            f"{path}: expected the {what}'s tensors, found no such file. Save the {what} with"
            " safe_serialization; pickles are never read."
        )
    return read_tensors(path, f"Save or download the {what} again.")


def read_base(base: Path, what: str, advice: str) -> RecordedTransform:
    """The transform of the converted text model that a companion will be served with; ``advice``
    is what else can be done with other models.

    Raises:
        UnsupportedModelError: the model sees images.
        CheckpointError: see :func:`~smoothrot_offline.transform.record.read_transform`.
    """
    recorded = read_transform(base)
    spec = recorded.transform.spec
    if spec.composite is not None:
        raise UnsupportedModelError(
            f"{base}: {spec.architecture.class_name} sees images; {what}s are transformed for text"
            f" models only. {advice}"
        )
    return recorded


def check_floats(tensor: torch.Tensor, name: str) -> None:
    """Refuse what no training leaves behind.

    Raises:
        CheckpointError: ``tensor`` holds anything but finite floats.
    """
    if not tensor.is_floating_point() or not tensor.isfinite().all():
        raise CheckpointError(f"{name}: expected finite floats, got others. Train it again.")


def cast_back(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """A transformed float64 tensor in the dtype it came in.

    Raises:
        CheckpointError: a value exceeds its range.
    """
    cast = tensor.to(dtype)
    if not cast.isfinite().all():
        raise CheckpointError(
            f"{name}: exceeds the range of {dtype} after the transform. Save it as float32."
        )
    return cast.contiguous()


def write_companion(
    out: Path,
    base: Path,
    config: tuple[str, dict[str, Any]],
    weights: tuple[str, dict[str, torch.Tensor]],
) -> str:
    """Make the directory ``out``, complete or not at all.

    Args:
        out: of the transformed companion.
        base: the converted model it is for, whose transform its configuration names.
        config, weights: name of the file and its content.

    Returns:
        The digest of the base's transform.

    Raises:
        ConfigError: ``out`` is taken.
    """
    digest = file_digest(base / TRANSFORM_NAME)
    with OutputDirectory(out) as directory:
        directory.write_json(config[0], config[1] | {ADAPTER_BASE: digest})
        directory.write_tensors(*weights)
        directory.commit()
    return digest


def refuse_value(path: Path, key: str, expected: Sequence[Any], got: object, advice: str) -> None:
    """Refuse a value of a companion's configuration that is none of ``expected``.

    Raises:
        ConfigError: naming file and key.
    """
    if got not in expected:
        raise ConfigError(f"{path}: {key}: expected {expected[0]!r}, got {got!r}. {advice}")
