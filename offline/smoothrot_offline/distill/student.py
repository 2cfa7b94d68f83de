# SPDX-License-Identifier: Apache-2.0
"""A converted model with a gradient in what it stores beside its codes: channel scales, norms
and biases."""

from collections.abc import Iterator, Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from smoothrot_offline.report.model import QuantizedLinear
from smoothrot_offline.rounding.rtn import fake_quantize_tokens
from smoothrot_offline.transform.rotation import hadamard
from smoothrot_vllm.format import WEIGHT_SCALE
from smoothrot_vllm.reference import scaled_codes


class StudentLinear(nn.Module):
    """A quantized linear whose channel scales are trained; codes, group scales and clips stay as
    they are.

    ``log_scale (N,)`` is what the scale is multiplied by, as a logarithm. It multiplies what the
    product gives out, so no gradient of a whole weight is ever formed.
    """

    def __init__(self, stored: QuantizedLinear) -> None:
        super().__init__()
        self._activations = stored.scheme.activations
        self._block = stored.block
        self._scale = stored.weight_scale.flatten()
        bits = stored.scheme.weights.bits
        self._units = scaled_codes(stored.weight_packed, stored.weight_group_scale, bits).float()
        self.log_scale = nn.Parameter(torch.zeros_like(self._scale))
        self.bias = stored.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x (..., K)`` to ``(..., N)``, float32."""
        if self._block:
            x = hadamard(x, self._block)
        x = fake_quantize_tokens(x, self._activations)
        y = nn.functional.linear(x, self._units) * self.scale()
        return y if self.bias is None else y + self.bias

    def scale(self) -> torch.Tensor:
        """Of each output channel, float32 ``(N,)``."""
        return self._scale * self.log_scale.exp()


class Student:
    """A loaded converted model, its quantized linears replaced by :class:`StudentLinear`.

    Args:
        model: float32, of kernels ``reference``.
        dtypes: of the vectors (norms, biases) in the checkpoint, by name: they are trained as
            numbers of those.
    """

    def __init__(self, model: PreTrainedModel, dtypes: Mapping[str, torch.dtype]) -> None:
        self.model = model
        model.requires_grad_(False)
        self._linears = {}
        for name, module in list(model.named_modules()):
            if isinstance(module, QuantizedLinear):
                parent, _, child = name.rpartition(".")
                self._linears[name] = StudentLinear(module)
                setattr(model.get_submodule(parent), child, self._linears[name])
        self._dtypes = {
            name: dtypes[name]
            for name, parameter in model.named_parameters()
            if name in dtypes and parameter.dim() == 1
        }
        for name in self._dtypes:
            model.get_parameter(name).requires_grad_(True)

    def log_scales(self) -> list[nn.Parameter]:
        """Of every quantized linear."""
        return [one.log_scale for one in self._linears.values()]

    def vectors(self) -> list[nn.Parameter]:
        """Weights of norms, and biases."""
        return [self.model.get_parameter(name) for name in self._dtypes]

    @torch.no_grad()
    def round_vectors(self) -> None:
        """Vectors to the nearest number that their dtype in the checkpoint has."""
        for name, dtype in self._dtypes.items():
            parameter = self.model.get_parameter(name)
            parameter.copy_(parameter.to(dtype))

    def stored(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor that training has changed, by name, as the checkpoint stores it."""
        for name, linear in self._linears.items():
            yield f"{name}.{WEIGHT_SCALE}", linear.scale().detach()[:, None]
        for name, dtype in self._dtypes.items():
            yield name, self.model.get_parameter(name).detach().to(dtype)
