# SPDX-License-Identifier: Apache-2.0
"""The stage after rounding: train what the output directory stores, and keep it if it is better."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from smoothrot_offline.config import ConvertConfig
from smoothrot_offline.distill.cost import HELD_OUT, distillation_sequences
from smoothrot_offline.distill.products import product_dtype
from smoothrot_offline.distill.student import Student
from smoothrot_offline.distill.training import held_out_divergence, train
from smoothrot_offline.output.manifest import DistillationRecord, TensorRecord
from smoothrot_offline.report.model import load_model
from smoothrot_offline.source.checkpoint import DTYPES
from smoothrot_offline.source.text import load_calibration

_log = logging.getLogger(__name__)


def distill(
    directory: Path,
    source: Path,
    config: ConvertConfig,
    tensors: Mapping[str, TensorRecord],
    device: torch.device,
    step: Callable[[str], None],
) -> tuple[DistillationRecord, dict[str, torch.Tensor]]:
    """Train channel scales, norms and biases of a converted directory.

    Args:
        directory: the converted model, rounded.
        source: the original model.
        config: of the conversion; ``distill_steps`` is not 0.
        tensors: what the directory stores, by name; vectors that are not among them are left.
        device: where both models run, as a whole.
        step: told what begins, ``distillation_steps`` times.

    Returns:
        What came of it, and the tensors that replace the directory's, on the CPU: none if what it
        has predicts held-out text better.

    Raises:
        ConfigError: the calibration text has too few tokens.
        CheckpointError: the original does not load as a whole.
    """
    wanted = distillation_sequences(config)
    tokens = load_calibration(
        config.calib, source, wanted, config.calib_seqlen, config.seed + 1, device, HELD_OUT
    ).to(device)
    trained, held_out = tokens.tensor_split([wanted])
    dtypes = {name: DTYPES[record.dtype] for name, record in tensors.items()}
    original = load_model(source, torch.float32, device=device)
    rounded = load_model(directory, torch.float32, "reference", device)
    products = product_dtype(device)
    student = Student(rounded, dtypes, products)
    step("held-out loss before distillation")
    before = held_out_divergence(original, student, held_out)
    train(original, student, trained, config.distill_steps, config.seed, step)
    step("held-out loss after distillation")
    after = held_out_divergence(original, student, held_out)
    record = DistillationRecord(
        steps=config.distill_steps,
        sequences=wanted,
        before=before,
        after=after,
        products="bfloat16" if products == torch.bfloat16 else "float32",
    )
    if not after < before:
        _log.warning(
            "distillation: the held-out loss went from %.4f to %.4f nats, so the model stays as"
            " rounding left it. Use more or more varied text (--calib), or leave --distill-steps"
            " out.",
            before,
            after,
        )
        return record, {}
    return record, {name: tensor.cpu().contiguous() for name, tensor in student.stored()}
