# SPDX-License-Identifier: Apache-2.0
"""Error-compensated rounding: GPTQ (arXiv 2210.17323), its asymmetric form that also undoes earlier
layers' errors, and the statistics of the inputs that both need."""

import logging
from collections.abc import Iterator

import torch

from smoothrot_offline import ranks
from smoothrot_offline.rounding.rtn import QuantizedWeight, check_weight
from smoothrot_offline.rounding.scales import search_scales
from smoothrot_vllm.errors import CheckpointError
from smoothrot_vllm.format import WeightScheme
from smoothrot_vllm.reference import quant_max


class HessianAccumulator:
    """``H = mean_t w_t x_t^T x_t`` and, for asymmetric calibration, ``C = mean_t w_t (x~_t -
    x_t)^T x_t``, added a batch at a time; the weights are 1 unless they are given.

    ``x`` is what the quantized linear reads at run time: smoothed, rotated, quantized and
    dequantized. ``x~`` is what the full-precision model has there, in the same smoothed and rotated
    basis.

    Args:
        channels: inputs of the linear.
        asymmetric: accumulate C too; then every batch needs its full-precision counterpart.
        device: that of the batches.
    """

    def __init__(
        self, channels: int, asymmetric: bool = False, device: torch.device | None = None
    ) -> None:
        self._tokens = 0
        self._hessian = torch.zeros(channels, channels, dtype=torch.float64, device=device)
        self._cross = torch.zeros_like(self._hessian) if asymmetric else None

    def add(
        self,
        x: torch.Tensor,
        full_precision: torch.Tensor | None = None,
        *,
        weights: torch.Tensor | None = None,
    ) -> None:
        """Add tokens ``x (..., channels)``, float32, and what the full-precision model has for the
        same tokens; each counts by its weight of ``weights (...)``, or once.

        Raises:
            CheckpointError: an input is NaN or infinite.
        """
        x = x.flatten(0, -2).float()
        if not x.isfinite().all():
            raise CheckpointError(
                "calibration: expected finite activations, got a NaN or an infinity. "
                "Check the source weights with `smoothrot-convert plan`, and the calibration text."
            )
        self._tokens += x.shape[0]
        weighed = x if weights is None else x * weights.reshape(-1, 1)
        self._hessian += x.T @ weighed
        if self._cross is not None:
            assert full_precision is not None
            self._cross += (full_precision.flatten(0, -2).float() - x).T @ weighed

    def reduce(self) -> None:
        """Take in what the other ranks have added."""
        ranks.add(self._hessian, *([] if self._cross is None else [self._cross]))
        (tokens,) = ranks.summed(self._tokens)
        self._tokens = int(tokens)

    @property
    def tokens(self) -> int:
        """How many were added."""
        return self._tokens

    @property
    def hessian(self) -> torch.Tensor:
        """H, float64 ``(channels, channels)``."""
        return self._hessian / max(1, self._tokens)

    @property
    def cross(self) -> torch.Tensor | None:
        """C, float64 ``(channels, channels)``, or None for a symmetric accumulator."""
        return None if self._cross is None else self._cross / max(1, self._tokens)


_log = logging.getLogger(__name__)

_BLOCK = 128
_DAMPING_STEP = 10.0
_OUTPUT_DAMPING = 0.1
_FEWEST_ROWS = 32
_OUTPUT_BLOCKS = 32


def quantize_gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    scheme: WeightScheme,
    *,
    act_order: bool = True,
    damping: float = 0.01,
    cross: torch.Tensor | None = None,
    qronos: bool = False,
    outputs: torch.Tensor | None = None,
    name: str = "weight",
) -> QuantizedWeight:
    """Round one input channel after the other, each rounding error made up for by the channels
    still to come.

    Minimizes ``tr((W - Q) H (W - Q)^T)``, the mean squared output error. Scales, those of
    groups included, are fixed beforehand by the search, so that groups keep their meaning in any
    order.

    With ``cross`` the target is the full-precision model's output, ``|W x~ - Q x|^2`` (asymmetric
    calibration: GPTAQ, arXiv 2504.02692; Qronos, arXiv 2505.11695). Before rounding it is least at
    ``W* = W + W C (H + dI)^-1``, and for d = 0 any Q adds exactly ``tr((W* - Q) H (W* - Q)^T)`` to
    that; so W* is rounded in place of W. Qronos does the same but for its first step, which rounds
    the first channel for the others as they are in W: ``w_1 + (W C)_1 / H_11`` (section 3, equation
    of q_1).

    With ``outputs`` it minimizes ``tr(O (W - Q) H (W - Q)^T)``: what errors of several output
    channels cost together (YAQA, arXiv 2505.22988). Output channels are then rounded in blocks one
    after the other, from the largest diagonal of O to the smallest, and each block makes up for the
    errors of those before it, as input channels do.

    Args:
        weight: ``(N, K)``, any float dtype, in the basis of the run-time input.
        hessian: symmetric positive semi-definite ``(K, K)``; see :class:`HessianAccumulator`.
        scheme: bits and group size.
        act_order: round channels from the largest diagonal of H to the smallest, instead of from
            first to last.
        damping: added to the diagonal of H, as a fraction of its mean; raised tenfold, with a
            warning, until H factorizes.
        cross: C ``(K, K)``, or a share of it: all of it also follows the noise of the calibration
            text (GPTAQ takes a quarter). None for plain GPTQ.
        qronos: take the first step of Qronos; needs ``cross``.
        outputs: O, symmetric positive semi-definite ``(N, N)``: the second moment of the loss's
            gradient in what the linear gives out. None is the identity.
        name: the tensor's name, for messages.

    Raises:
        ConfigError: K does not fit the scheme.
        CheckpointError: the weight, the Hessian or the correction is not finite.
    """
    check_weight(weight, scheme, name)
    statistics = [hessian, *(one for one in (cross, outputs) if one is not None)]
    if not all(one.isfinite().all() for one in statistics):
        raise CheckpointError(
            f"{name}: expected a finite Hessian, got a NaN or an infinity. Check the calibration"
            " text."
        )
    diagonal = _of_active_channels(hessian)
    order = (
        diagonal.argsort(descending=True, stable=True)
        if act_order
        else torch.arange(len(diagonal), device=weight.device)
    )
    damped, inverse_root = _factorize(
        hessian[order[:, None], order], diagonal[order], damping, name
    )
    first = None
    if cross is not None:
        if qronos:
            channel = order[0]
            moment = weight.to(cross.dtype) @ cross[:, channel]
            first = (weight[:, channel] + moment / damped[0, 0]).float()
        weight = _corrected(weight, cross, damped, order)
        check_weight(weight, scheme, name)
    scales = search_scales(weight, scheme)
    steps = scales.steps.repeat_interleave(weight.shape[1] // scales.steps.shape[1], dim=1)
    wanted, steps, inverse_root = weight.float()[:, order], steps[:, order], inverse_root.float()
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for rows, moved in _output_blocks(wanted, steps, codes, outputs, name):
        codes[rows] = _round_in_order(
            moved,
            steps[rows],
            inverse_root,
            quant_max(scheme.bits),
            None if first is None else first[rows] + moved[:, 0] - wanted[rows, 0],
        )
    return QuantizedWeight(codes[:, order.argsort()], *scales)


def _output_blocks(
    weight: torch.Tensor,
    steps: torch.Tensor,
    codes: torch.Tensor,
    outputs: torch.Tensor | None,
    name: str,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Rows to be rounded together, and their weights as the errors of earlier rows move them: all
    at once for ``outputs`` None.

    With ``O = U U^T``, U upper triangular, the loss is that of ``U^T E`` row by row, where E is the
    error: a block b leaves least of its rows of it at ``E_b = -(U_ab U_bb^-1)^T E_a``, a being the
    rows before it.

    Args:
        weight, steps: ``(N, K)``.
        codes: of the rows that were given, once the next are asked for.
        outputs, name: see :func:`quantize_gptq`.
    """
    if outputs is None:
        yield torch.arange(len(weight), device=weight.device), weight
        return
    diagonal = _of_active_channels(outputs)
    order = diagonal.argsort(descending=True, stable=True)
    _, upper = _upper_factor(outputs[order[:, None], order], diagonal[order], _OUTPUT_DAMPING, name)
    upper = upper.float()
    errors = torch.zeros_like(weight)
    for first in range(0, len(weight), size := max(_FEWEST_ROWS, len(weight) // _OUTPUT_BLOCKS)):
        block = slice(first, first + size)
        feedback = torch.linalg.solve_triangular(
            upper[block, block], upper[:first, block], upper=True, left=False
        )
        rows = order[block]
        yield rows, weight[rows] + feedback.T @ errors[:first]
        errors[block] = weight[rows] - codes[rows] * steps[rows]


def _of_active_channels(hessian: torch.Tensor) -> torch.Tensor:
    """The diagonal, with 1 for channels never seen active: they are rounded to nearest and touch no
    other."""
    diagonal = hessian.diagonal()
    return diagonal.where(diagonal > 0, 1.0)


def _factorize(
    hessian: torch.Tensor, diagonal: torch.Tensor, damping: float, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """H with another diagonal, damped, in place; and the upper-triangular R with ``H^-1 = R^T R``,
    from one Cholesky factorization: with ``H = U U^T`` it is ``U^-1``, and no inverse is formed and
    factorized again."""
    damped, upper = _upper_factor(hessian, diagonal, damping, name)
    return damped, _inverse_of_upper(upper)


def _upper_factor(
    hessian: torch.Tensor, diagonal: torch.Tensor, damping: float, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """H with another diagonal, damped, in place; and the upper-triangular U with ``H = U U^T``: the
    Cholesky factor of H with both axes reversed."""
    mean = diagonal.mean()
    while True:
        hessian.diagonal().copy_(diagonal + damping * mean)
        lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
        if not failed:
            return hessian, lower.flip(0, 1)
        damping = max(damping, 1e-6) * _DAMPING_STEP
        _log.warning(
            "%s: the Hessian is not positive definite; damping raised to %g of its mean diagonal",
            name,
            damping,
        )


def _inverse_of_upper(upper: torch.Tensor) -> torch.Tensor:
    """Inverse of an upper-triangular matrix by halves: a third of the work of solving for the
    dense identity."""
    half = len(upper) // 2
    if half < _BLOCK:
        identity = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
        return torch.linalg.solve_triangular(upper, identity, upper=True)
    first, last = _inverse_of_upper(upper[:half, :half]), _inverse_of_upper(upper[half:, half:])
    inverse = torch.zeros_like(upper)
    inverse[:half, :half], inverse[half:, half:] = first, last
    inverse[:half, half:] = -first @ (upper[:half, half:] @ last)
    return inverse


def _corrected(
    weight: torch.Tensor, cross: torch.Tensor, damped: torch.Tensor, order: torch.Tensor
) -> torch.Tensor:
    """``W + W C (H + dI)^-1``, with the damped H given in rounding order."""
    moment = (weight.to(cross.dtype) @ cross)[:, order]
    correction = torch.linalg.solve(damped, moment, left=False)
    return weight.to(cross.dtype) + correction[:, order.argsort()]


def _round_in_order(
    weight: torch.Tensor,
    steps: torch.Tensor,
    inverse_root: torch.Tensor,
    top: int,
    first: torch.Tensor | None = None,
) -> torch.Tensor:
    """int8 codes ``(N, K)`` of ``weight (N, K)``, both in rounding order; ``first (N,)`` is rounded
    in place of the first channel, if given.

    Errors reach the rest of a block of channels at once and later blocks together, as one matrix
    product (GPTQ, section 3.3).
    """
    work, steps = weight.T.contiguous(), steps.T.contiguous()  # channels as contiguous rows
    codes = torch.empty_like(work, dtype=torch.int8)
    for start in range(0, len(work), _BLOCK):
        block = slice(start, min(start + _BLOCK, len(work)))
        errors = torch.empty_like(work[block])
        for i in range(block.start, block.stop):
            wanted = work[i] if first is None or i else first
            code = (wanted / steps[i]).round_().clamp_(-top - 1, top)
            codes[i] = code
            error = (work[i] - code * steps[i]) / inverse_root[i, i]
            errors[i - start] = error
            work[i + 1 : block.stop].addr_(inverse_root[i, i + 1 : block.stop], error, alpha=-1)
        work[block.stop :].addmm_(inverse_root[block, block.stop :].T, errors, alpha=-1)
    return codes.T.contiguous()
