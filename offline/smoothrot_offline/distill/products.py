# SPDX-License-Identifier: Apache-2.0
"""A quantized linear with a gradient, on codes: whole numbers, which bfloat16 holds exactly, so
that the products can be taken in it."""

from typing import Any

import torch

from smoothrot_offline.transform.rotation import hadamard
from smoothrot_vllm.format import ActivationScheme
from smoothrot_vllm.reference import QUANT_MIN_SCALE, quant_max

_COLUMNS = 2048

Quantized = tuple[torch.Tensor, torch.Tensor]
"""Codes ``(T, K)`` in the dtype of the products, and float32 scales ``(T, 1)``."""


def product_dtype(device: torch.device) -> torch.dtype:
    """The faster of bfloat16 and float32: the former where the hardware multiplies it."""
    if device.type != "cpu":
        return torch.bfloat16
    has = torch.cpu.get_capabilities()
    multiplies = ("avx512_bf16", "amx_bf16", "bf16")
    return torch.bfloat16 if any(has.get(name) for name in multiplies) else torch.float32


class _QuantizeTokens(torch.autograd.Function):
    """Gradients of ``fake_quantize_tokens``, with the codes and the scale apart.

    With ``q = clamp(round(x / s)) * s``, rounding passed through, ``dq/ds`` is the code where it is
    clamped and ``code - x / s`` elsewhere: that is kept, as it tells the two apart as well.
    """

    @staticmethod
    def forward(
        context: Any, x: torch.Tensor, clip: float, bits: int, dtype: torch.dtype
    ) -> Quantized:
        top = quant_max(bits)
        largest, index = x.abs().max(dim=-1, keepdim=True)
        scale = largest * (clip / top)
        scale = torch.where(scale < QUANT_MIN_SCALE, 1.0, scale)
        units = x / scale
        rounded = units.round()
        codes = rounded.clamp(-top - 1, top)
        slope = torch.where(rounded == codes, codes - units, codes)
        sign = x.gather(-1, index).sign() * (clip / top)
        context.save_for_backward(slope.to(dtype), scale, index, sign)
        context.mark_non_differentiable(scale)
        return codes.to(dtype), scale

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        slope, scale, index, sign = context.saved_tensors
        gradient = gradients[0].float() / scale
        of_scale = torch.linalg.vecdot(gradient, slope.float())[:, None]
        gradient.masked_fill_(slope.abs() > 0.5, 0.0)
        return gradient.scatter_add_(-1, index, of_scale * sign), None, None, None


class _Product(torch.autograd.Function):
    """``(codes @ units^T) * token_scale * channel_scale``. The gradient of the codes is that of the
    quantized values times their scale, which :class:`_QuantizeTokens` takes back."""

    @staticmethod
    def forward(
        context: Any,
        codes: torch.Tensor,
        token_scale: torch.Tensor,
        units: torch.Tensor,
        channel_scale: torch.Tensor,
    ) -> torch.Tensor:
        product = codes @ units.T
        context.save_for_backward(token_scale, units, channel_scale, product)
        return (product * token_scale).mul_(channel_scale)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        token_scale, units, channel_scale, product = context.saved_tensors
        of_product, of_scale = torch.empty_like(product), torch.empty_like(channel_scale)
        # A head has so many columns that whole matrices would leave the caches.
        for start in range(0, len(channel_scale), _COLUMNS):
            columns = slice(start, start + _COLUMNS)
            scaled = gradients[0][:, columns] * token_scale
            of_product[:, columns] = scaled * channel_scale[columns]
            of_scale[columns] = scaled.mul_(product[:, columns]).sum(0)
        return of_product @ units, None, None, of_scale


def quantized_product(
    quantized: Quantized, units: torch.Tensor, channel_scale: torch.Tensor
) -> torch.Tensor:
    """What a linear gives for quantized inputs, float32 ``(T, N)``, differentiable in the inputs
    and in the channels' scales.

    Args:
        quantized: of :class:`QuantizedInputs`.
        units: ``code * group_scale``, ``(N, K)``, in the dtype of the codes.
        channel_scale: float32 ``(N,)``.
    """
    product: torch.Tensor = _Product.apply(*quantized, units, channel_scale)
    return product


class QuantizedInputs:
    """Inputs of linears as the server quantizes them, each once for all linears that read it.

    Args:
        dtype: of the codes.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._last: tuple[torch.Tensor, ActivationScheme, int, Quantized] | None = None

    def __call__(self, x: torch.Tensor, scheme: ActivationScheme, block: int) -> Quantized:
        """``x (..., K)``, rotated in blocks of ``block`` (0: not), quantized per token."""
        if self._last is not None:
            last, *how, quantized = self._last
            if last is x and how == [scheme, block]:
                return quantized
        # Rotated with the matrix's own bits, whatever the products have.
        with torch.autocast(x.device.type, enabled=False):
            tokens = x.flatten(0, -2).float()
            if block:
                tokens = hadamard(tokens, block)
            quantized = _QuantizeTokens.apply(tokens, scheme.clip, scheme.bits, self.dtype)
        self._last = x, scheme, block, quantized
        return quantized

    def forget(self) -> None:
        """Let go of the last input."""
        self._last = None
