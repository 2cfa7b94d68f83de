# SPDX-License-Identifier: Apache-2.0
"""Smoothing of what the norms give out, the input of q, k, v, gate and up, in the basis in which a
norm multiplies by its weight.

R1 leaves a norm's weight at 1, and the server multiplies by it all the same: dividing each channel
of the rotated input is free there. It pays because a rotation evens out single channels, but not
the part that all tokens share: the mean of the residual stream is as uneven after a rotation as any
vector.
"""

from collections.abc import Callable, Mapping, Sequence

import torch

from smoothrot_offline.architectures import ModelSpec
from smoothrot_offline.calibrate import LayerRunner, Observer, embed
from smoothrot_offline.checkpoint import Checkpoint
from smoothrot_offline.rotate import Orthogonal

SAMPLE_SEQUENCES = 16
"""Calibration sequences that the norms are measured on where the whole text does not pass
anyway."""


class NormStatistics:
    """``||X_j||_2`` of what each norm of a layer gives out before its weight (R1 folded) or after
    it (R1 not folded).

    Args:
        spec: the model.
        residual: R1, or None if it is not folded.
        layer: the layer's tensors in the original model, by names relative to it.
    """

    def __init__(
        self, spec: ModelSpec, residual: Orthogonal | None, layer: Mapping[str, torch.Tensor]
    ) -> None:
        self._spec = spec
        self._residual = residual
        offset = spec.architecture.norm_offset
        self._gammas = {
            norm: layer[f"{norm}.weight"].double() + offset for norm in spec.architecture.readers
        }
        self._squares = {norm: torch.zeros_like(gamma) for norm, gamma in self._gammas.items()}

    def observers(self) -> dict[str, Observer]:
        """What to call with each norm's input, by the norm's name."""
        return {norm: self._observer(norm) for norm in self._gammas}

    def scales(
        self, layer: Mapping[str, torch.Tensor], dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        """``s_j = (||X_j|| / ||W_j||)^(1/2)`` of each norm, W its readers in the same basis: see
        ``l2`` of ``choose_scales``.

        The scales are such that the norm's new weight is a number of ``dtype``: nothing is lost
        where it is stored.

        Args:
            layer: as for the statistics.
            dtype: of the norms in the output.
        """
        return {norm: self._scales_of(norm, layer, dtype) for norm in self._gammas}

    def _observer(self, norm: str) -> Observer:
        def observe(x: torch.Tensor) -> None:
            variance = x.square().mean(dim=1, keepdim=True)
            out = self._in_basis(x * (variance + self._spec.config.rms_norm_eps).rsqrt(), norm)
            self._squares[norm] = self._squares[norm] + out.square().sum(dim=0)

        return observe

    def _in_basis(self, rows: torch.Tensor, norm: str) -> torch.Tensor:
        return (
            rows.double() * self._gammas[norm]
            if self._residual is None
            else self._residual.rotate(rows.double())
        )

    def _scales_of(
        self, norm: str, layer: Mapping[str, torch.Tensor], dtype: torch.dtype
    ) -> torch.Tensor:
        table, gamma = self._spec.architecture, self._gammas[norm]
        weight = torch.cat([layer[f"{reader}.weight"].double() for reader in table.readers[norm]])
        if self._residual is not None:
            weight, gamma = self._residual.rotate(weight * gamma), torch.ones_like(gamma)
        inputs, columns = self._squares[norm].sqrt(), weight.norm(dim=0)
        used = (inputs > 0) & (columns > 0)
        wanted = torch.where(used, (inputs / columns.where(used, 1.0)).sqrt(), 1.0)
        wanted = wanted / wanted[used].log().mean().exp() if used.any() else wanted
        stored = (gamma / wanted - table.norm_offset).to(dtype).double() + table.norm_offset
        return torch.where(used & (stored * gamma > 0), gamma / stored, 1.0)


@torch.no_grad()
def smooth_norms(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    residual: Orthogonal | None,
    tokens: torch.Tensor,
    dtype: torch.dtype,
    step: Callable[[str], None],
) -> Sequence[dict[str, torch.Tensor]]:
    """Scales of the norms of every layer for a transform that was chosen after the study.

    Args:
        checkpoint, spec: the original model.
        residual: R1 as it will be folded.
        tokens: calibration tokens, int64 ``(samples, seqlen)``.
        dtype: of the norms in the output.
        step: told what begins, once for each layer.

    Raises:
        CheckpointError: the model's activations are not finite.
    """
    name = f"{spec.architecture.embedding}.weight"
    hidden = embed(tokens[:SAMPLE_SEQUENCES], checkpoint.load([name])[name], spec.embedding_scale)
    runner, found = LayerRunner(spec), []
    for index in range(spec.layers):
        step(f"smoothing the norms of layer {index + 1} of {spec.layers}")
        layer = checkpoint.load_relative(spec.layer_prefix(index), spec.layer_tensors())
        statistics = NormStatistics(spec, residual, layer)
        runner.run(index, layer, hidden, statistics.observers())
        found.append(statistics.scales(layer, dtype))
    return found
