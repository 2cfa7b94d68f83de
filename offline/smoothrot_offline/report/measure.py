# SPDX-License-Identifier: Apache-2.0
"""Quantization difficulty, layer error, occupied bins and massive activations of the inputs of a
layer, before and after each transform (arXiv 2506.01967).

The plain quantizer is that of the paper: symmetric, 4 bits, no clip, one scale per token and per
output channel; the converter's clips activations and searches each output channel's scale.
Everything is gathered a chunk of tokens at a time, so that no layer's activations are held whole.
Where R1 is folded, a layer is run with its norms folded, so what is captured behind a norm is the
unit norm's output: R needs exactly that."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from smoothrot_offline.config import ACTIVATION_CLIP
from smoothrot_offline.rounding.rtn import quantize_rtn
from smoothrot_offline.rounding.served import ops_on
from smoothrot_offline.source.family import ModelSpec
from smoothrot_offline.transform.rotation import Rotation, Tensors, random_rotation, random_signs
from smoothrot_vllm.format import WeightScheme
from smoothrot_vllm.hadamard import choose_block
from smoothrot_vllm.reference import decode

BITS = 4
BINS = 1 << BITS
"""Codes -8 to 7; without a clip the symmetric quantizer never uses -8."""

MASSIVE_RATIO = 1000.0
"""A token is massive if it holds a value of more than this many times the median magnitude of
its sequence (arXiv 2402.17762)."""

SURFACE_SHAPE = (64, 96)
"""Tokens and channels that a picture of ``|X|`` shows; each of its points is the largest
magnitude of what it stands for."""

ActivationMap = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Transform:
    """An equivalent form of ``X W^T``: float32 ``(tokens, K)`` activations from the input as
    captured, and its W ``(out, K)``.

    ``converted``: quantize both as the converter does (W4A4, round to nearest), rather than
    plainly.
    """

    activations: ActivationMap
    weight: torch.Tensor
    converted: bool = False


@dataclass(frozen=True)
class Measured:
    """What :class:`TransformMeter` found; ``bins`` are the shares of the 16 codes from -8 to 7."""

    activation_difficulty: float
    weight_difficulty: float
    error: float
    relative_error: float
    activation_bins: list[float]
    weight_bins: list[float]


@dataclass(frozen=True)
class Peak:
    """The largest ``|x|`` of an input, where it is, and the median magnitude of its sequence."""

    magnitude: float
    sample: int
    position: int
    channel: int
    median: float


def quantize(x: torch.Tensor, clip: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """4-bit symmetric quantization of each row: int8 codes, and the float32 values that they stand
    for.

    Args:
        x: float32 ``(rows, K)``, K even.
        clip: share of a row's largest magnitude that the largest code stands for.
    """
    stored, scale = ops_on(x.device).quant(x.contiguous(), clip, BITS)
    codes = decode(stored, BITS)
    return codes, codes * scale[:, None]


def quantize_weight(weight: torch.Tensor, converted: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`quantize` of a weight, or, if ``converted``, as the converter rounds to nearest."""
    if not converted:
        return quantize(weight)
    found = quantize_rtn(weight, WeightScheme())  # 4 bits, per output channel
    return found.codes, found.dequantize()


def difficulty(sum_of_squares: torch.Tensor) -> float:
    """Unbiased standard deviation of the channel magnitudes ``||X[:, j]||_2``, from their
    squares, float64 ``(K,)``."""
    return float(sum_of_squares.sqrt().std(correction=1))


class TransformMeter:
    """Difficulty, layer error and occupied bins of one transform of one linear."""

    def __init__(self, transform: Transform) -> None:
        codes, self._weight = quantize_weight(transform.weight, transform.converted)
        self._clip = ACTIVATION_CLIP[BITS] if transform.converted else 1.0
        self._transform = transform
        self._weight_counts = _count(codes)
        self._weight_squares = transform.weight.double().square().sum(dim=0)
        self._squares = torch.zeros_like(self._weight_squares)
        self._counts = torch.zeros_like(self._weight_counts)
        self._error = 0.0

    def update(self, captured: torch.Tensor, exact: torch.Tensor) -> None:
        """Add the tokens of ``captured (tokens, K)``, whose exact float32 output is ``exact
        (tokens, out)``."""
        x = self._transform.activations(captured)
        codes, quantized = quantize(x, self._clip)
        self._squares += x.double().square().sum(dim=0)
        self._counts += _count(codes)
        self._error += _square_sum(exact - quantized @ self._weight.T)

    def result(self, output_squares: float) -> Measured:
        """What was measured; ``output_squares`` is ``||X W^T||_F^2``, of which the relative
        error is a share."""
        return Measured(
            activation_difficulty=difficulty(self._squares),
            weight_difficulty=difficulty(self._weight_squares),
            error=self._error,
            relative_error=self._error / output_squares if output_squares else 0.0,
            activation_bins=_shares(self._counts),
            weight_bins=_shares(self._weight_counts),
        )


class InputMeter:
    """Observes what the linears of one input read, and measures every transform of it.

    Args:
        transforms: by name; the first is the untransformed model, whose product is the exact one.
        seqlen: tokens of a sequence; what is observed are whole sequences, in order.
        shown: names of the transforms whose ``peak_token_bins`` are kept; with ``surfaces``, their
            ``|X|`` for a picture too.
        surfaces: keep ``|X|`` of the sequence with the largest value.
    """

    def __init__(
        self,
        transforms: Mapping[str, Transform],
        seqlen: int,
        shown: tuple[str, ...] = (),
        surfaces: bool = False,
    ) -> None:
        self._transforms = transforms
        self._meters = {name: TransformMeter(transform) for name, transform in transforms.items()}
        self._original = next(iter(transforms.values()))
        self._seqlen = seqlen
        self._shown = shown
        self._surfaces = surfaces
        self._samples = 0
        self._output_squares = 0.0
        self.peak: Peak | None = None
        self.massive: list[tuple[int, int]] = []
        self.peak_token_bins: dict[str, list[float]] = {}
        self.surfaces: dict[str, torch.Tensor] = {}

    def update(self, captured: torch.Tensor) -> None:
        """Add the sequences of ``captured``, float32 ``(sequences * seqlen, K)``."""
        x = self._original.activations(captured)
        exact = x @ self._original.weight.T
        self._output_squares += _square_sum(exact)
        for meter in self._meters.values():
            meter.update(captured, exact)
        for sequence, source in zip(
            x.abs().split(self._seqlen), captured.split(self._seqlen), strict=True
        ):
            self._look_for_massive(sequence, source)
            self._samples += 1

    def results(self) -> dict[str, Measured]:
        """What was measured of each transform."""
        return {name: meter.result(self._output_squares) for name, meter in self._meters.items()}

    def _look_for_massive(self, magnitudes: torch.Tensor, captured: torch.Tensor) -> None:
        median = float(magnitudes.median())
        largest = magnitudes.amax(dim=1)
        self.massive += [
            (self._samples, int(token)) for token in (largest > MASSIVE_RATIO * median).nonzero()
        ]
        position = int(largest.argmax())
        if self.peak is None or float(largest[position]) > self.peak.magnitude:
            channel = int(magnitudes[position].argmax())
            self.peak = Peak(float(largest[position]), self._samples, position, channel, median)
            transformed = {
                name: self._transforms[name].activations(captured) for name in self._shown
            }
            self.peak_token_bins = {
                name: _shares(_count(quantize(x[position, None])[0]))
                for name, x in transformed.items()
            }
            if self._surfaces:
                self.surfaces = {name: _surface(x) for name, x in transformed.items()}


def _surface(x: torch.Tensor) -> torch.Tensor:
    shape = tuple(min(*sizes) for sizes in zip(SURFACE_SHAPE, x.shape, strict=True))
    return torch.nn.functional.adaptive_max_pool2d(x.abs()[None], shape)[0].cpu()


def _count(codes: torch.Tensor) -> torch.Tensor:
    return torch.bincount((codes + BINS // 2).flatten(), minlength=BINS)


def _shares(counts: torch.Tensor) -> list[float]:
    return (counts.double() / counts.sum()).tolist()


def _square_sum(x: torch.Tensor) -> float:
    return float(x.square().sum(dtype=torch.float64))


KINDS = ("qkv", "o_proj", "gate_up", "down_proj")
"""The inputs of a decoder layer, in the order of
:meth:`~smoothrot_offline.source.family.Architecture.input_groups`."""

DOWN = KINDS[-1]
NONE, SMOOTHED, ROTATED, SMOOTHED_ROTATED = "none", "S", "R", "S+R"
TRANSFORMS = (NONE, SMOOTHED, ROTATED, SMOOTHED_ROTATED)


def layer_transforms(
    spec: ModelSpec,
    seed: int,
    index: int,
    layer: Tensors,
    scales: Mapping[str, torch.Tensor],
    norms: Mapping[str, torch.Tensor],
) -> dict[str, dict[str, Transform]]:
    """Transforms of each kind of input of decoder layer ``index``.

    Args:
        spec: the model's sizes and names.
        seed: of the random signs, as in a conversion.
        index: which layer.
        layer: its original tensors, float64, by names relative to it.
        scales: smoothing scales by policy, float64 ``(f,)``; those of ``max`` are S.
        norms: smoothing scales of what each norm gives out, float64 ``(hidden,)``: S behind a norm,
            where the family has norms there.

    Returns:
        By kind, the transforms by name, ``none`` first; at ``down_proj`` also each policy's S and
        R4 under its name, and under :func:`converted` of its name with the converter's quantizers.

    Raises:
        UnsupportedModelError: a size has no Hadamard block.
    """
    table = spec.architecture
    groups = dict(zip(KINDS, table.input_groups(), strict=True))
    weights = {
        kind: torch.cat([layer[f"{linear}.weight"] for linear in group])
        for kind, group in groups.items()
    }
    found = {}
    for kind, norm in zip(("qkv", "gate_up"), table.readers, strict=True):
        if table.rotates_residual:
            gamma = layer[f"{norm}.weight"] + table.norm_offset
            found[kind] = _read_from_unit_norm(
                weights[kind], gamma, random_rotation(spec.hidden, seed), norms[norm]
            )
        else:
            online = _hadamard(spec.hidden)
            found[kind] = {
                NONE: _plain(weights[kind]),
                ROTATED: _rotated(weights[kind], online),
            }
            if norm in norms:
                found[kind][SMOOTHED_ROTATED] = _rotated(weights[kind], online, norms[norm])
    heads = _hadamard(spec.heads * spec.head_dim, choose_block(spec.head_dim).size)
    found["o_proj"] = {NONE: _plain(weights["o_proj"]), ROTATED: _rotated(weights["o_proj"], heads)}
    online = Rotation(
        random_signs(spec.intermediate, seed, f"R4/{index}"), choose_block(spec.intermediate).size
    )
    found[DOWN] = _down(weights[DOWN], online, scales)
    return {kind: found[kind] for kind in KINDS}


def converted(policy: str) -> str:
    """The name of a policy's transform with the converter's quantizers."""
    return f"{policy}, converted"


def _hadamard(size: int, block: int | None = None) -> Rotation:
    """A rotation without random signs, in the largest blocks unless ``block`` is given."""
    return Rotation(torch.ones(size, dtype=torch.float64), block or choose_block(size).size)


def _plain(weight: torch.Tensor) -> Transform:
    return Transform(lambda x: x, weight.float())


def _rotated(
    weight: torch.Tensor, rotation: Rotation, scales: torch.Tensor | None = None
) -> Transform:
    """S, if ``scales`` are given, and then the rotation."""
    divisor = (
        torch.ones(weight.shape[1], dtype=torch.float64, device=weight.device)
        if scales is None
        else scales
    )
    return Transform(
        lambda x: rotation.rotate(x / divisor).float(), rotation.rotate(weight * divisor).float()
    )


def _read_from_unit_norm(
    weight: torch.Tensor, gamma: torch.Tensor, rotation: Rotation, scales: torch.Tensor
) -> dict[str, Transform]:
    """``scales`` divide the rotated input, where the norm's weight is."""
    return {
        NONE: Transform(lambda x: x * gamma.float(), weight.float()),
        ROTATED: _rotated(weight * gamma, rotation),
        SMOOTHED_ROTATED: Transform(
            lambda x: (rotation.rotate(x.double()) / scales).float(),
            (rotation.rotate(weight * gamma) * scales).float(),
        ),
    }


def _down(
    weight: torch.Tensor, rotation: Rotation, scales: Mapping[str, torch.Tensor]
) -> dict[str, Transform]:
    smoothing = scales["max"]
    return {
        NONE: _plain(weight),
        SMOOTHED: Transform(lambda x: (x / smoothing).float(), (weight * smoothing).float()),
        ROTATED: _rotated(weight, rotation),
        SMOOTHED_ROTATED: _rotated(weight, rotation, smoothing),
    } | _policies(weight, rotation, scales)


def _policies(
    weight: torch.Tensor, rotation: Rotation, scales: Mapping[str, torch.Tensor]
) -> dict[str, Transform]:
    plain = {policy: _rotated(weight, rotation, own) for policy, own in scales.items()}
    return plain | {
        converted(policy): replace(transform, converted=True) for policy, transform in plain.items()
    }
