# SPDX-License-Identifier: Apache-2.0
"""Plain-torch definition of every op: what a kernel must compute, bit for bit where it says so.

Slow on purpose. The kernels' tests, the converter's checks and the served model's tests all compare
against these functions.
"""

import torch

from smoothrot_vllm.errors import UnsupportedModelError
from smoothrot_vllm.hadamard import base_matrix, factorize

QUANT_MIN_SCALE = 2.0**-100
"""A row whose scale would fall below this is treated as all zero and gets scale 1."""


def quant_max(bits: int) -> int:
    """Largest code of a symmetric signed quantiser: 7 for 4 bits, 127 for 8; the smallest is ``-quant_max - 1``."""
    return (1 << (bits - 1)) - 1


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """Pack int8 codes in [-8, 7], ``(..., K)`` with K even, to uint8 ``(..., K/2)``: low nibble = even index."""
    nibbles = codes.to(torch.uint8) & 0xF
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`pack_int4`: uint8 ``(..., K/2)`` to int8 ``(..., K)`` in [-8, 7]."""
    nibbles = torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2).to(torch.int8)
    return torch.where(nibbles > 7, nibbles - 16, nibbles)


def encode(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes as they are stored: uint8 nibble pairs for 4 bits, int8 as it is for 8."""
    return pack_int4(codes) if bits == 4 else codes.to(torch.int8)


def decode(stored: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of :func:`encode`: int8 ``(..., K)``."""
    return unpack_int4(stored) if bits == 4 else stored


def hadamard_transform(x: torch.Tensor, block: int) -> torch.Tensor:
    """Unnormalised ``x (I (x) H_base (x) H_power)`` in float32 (float64 stays float64), ``(..., K)``, ``block`` divides K.

    Dividing by ``sqrt(block)`` makes it orthonormal. The order of float additions is part of the
    definition: butterflies at strides 1, 2, 4 ... within each run of ``power`` values, then, for a base
    above 1, the sum from left to right over groups of four runs, each ``(+-r0 +-r1) + (+-r2 +-r3)``.
    """
    factors = factorize(block)
    if factors is None or x.shape[-1] % block:
        raise UnsupportedModelError(f"block {block}: expected a Hadamard order that divides {x.shape[-1]}")
    y = x if x.dtype == torch.float64 else x.float()
    stride = 1
    while stride < factors.power:
        pairs = y.reshape(-1, 2, stride)
        y = torch.stack((pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]), dim=1)
        stride *= 2
    if factors.base > 1:
        runs = y.reshape(-1, factors.base, 1, factors.power)
        signs = base_matrix(factors.base).to(y)
        y = torch.zeros_like(runs[:, 0])
        for b in range(0, factors.base, 4):
            r = [runs[:, i] * signs[i, :, None] for i in range(b, b + 4)]
            y = y + ((r[0] + r[1]) + (r[2] + r[3]))
    return y.reshape(x.shape)


def quant(x: torch.Tensor, clip: float, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Dynamic symmetric per-token quantisation.

    Args:
        x: ``(T, K)``, float32, bfloat16 or float16; K even.
        clip: the scale is ``max|x| * (clip / quant_max)``, 0 < clip <= 1.
        bits: 4 or 8.

    Returns:
        codes ``(T, K/2)`` uint8 or ``(T, K)`` int8, and scale ``(T,)`` float32. A zero row gets scale 1;
        a row with a NaN or an infinity gets scale NaN and zero codes, so that its output is NaN.
    """
    return _quant_float32(x.float(), clip, bits, 1.0)


def hadamard_quant(x: torch.Tensor, block: int, clip: float, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`quant` of ``x`` rotated by ``I (x) H_block`` (orthonormal), ``block`` dividing K."""
    norm = float(torch.tensor(block, dtype=torch.float64).rsqrt().to(torch.float32))
    return _quant_float32(hadamard_transform(x, block), clip, bits, norm)


def _quant_float32(y: torch.Tensor, clip: float, bits: int, norm: float) -> tuple[torch.Tensor, torch.Tensor]:
    top = quant_max(bits)
    factor = torch.tensor(clip / top, dtype=torch.float32)
    scale = y.abs().amax(dim=-1) * factor
    finite = scale.isfinite()
    scale = torch.where(finite & (scale < QUANT_MIN_SCALE), 1.0 / norm, scale)
    codes = (y * (1.0 / scale)[:, None]).round().clamp(-top - 1, top)
    codes = torch.where(finite[:, None], codes, 0.0).to(torch.int8)
    scale = torch.where(finite, scale * norm, torch.nan)
    return encode(codes, bits), scale


def accumulate(codes: torch.Tensor, weight: torch.Tensor, act_bits: int, weight_bits: int, group: int = -1) -> torch.Tensor:
    """Exact int32 sums of code products: ``(G, T, N)`` for stored ``codes (T, ...)`` and ``weight (N, ...)``."""
    a, w = decode(codes, act_bits).double(), decode(weight, weight_bits).double()
    size = a.shape[-1] if group == -1 else group
    return torch.stack([p @ q.T for p, q in zip(a.split(size, 1), w.split(size, 1), strict=True)]).to(torch.int32)


def gemm(
    codes: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    act_bits: int,
    weight_bits: int,
) -> torch.Tensor:
    """``y = scale * sum_g(accumulator_g * weight_scale_g) + bias``, float32 epilogue, rounded once to ``out_dtype``.

    Args:
        codes, scale: from :func:`quant` or :func:`hadamard_quant`.
        weight: stored codes ``(N, K/2)`` uint8 (4 bits) or ``(N, K)`` int8 (8 bits).
        weight_scale: float32 ``(N, G)``; G = 1 for per-channel, else G groups of K/G consecutive inputs.
        bias: ``(N,)`` of any float dtype, or None.

    Returns:
        ``(T, N)`` in ``out_dtype``.
    """
    groups = weight_scale.shape[1]
    k = codes.shape[1] * (2 if act_bits == 4 else 1)
    sums = accumulate(codes, weight, act_bits, weight_bits, k // groups).float()
    y = torch.einsum("gtn,ng->tn", sums, weight_scale) * scale[:, None]
    if bias is not None:
        y = y + bias.float()
    return y.to(out_dtype)


def dequantize_weight(weight: torch.Tensor, weight_scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Float32 ``(N, K)`` from stored codes and float32 scales ``(N, G)``."""
    codes = decode(weight, bits).float()
    return codes * weight_scale.repeat_interleave(codes.shape[1] // weight_scale.shape[1], dim=1)
