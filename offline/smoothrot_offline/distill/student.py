# SPDX-License-Identifier: Apache-2.0
"""A converted model with a gradient in what it stores beside its codes: channel scales, norms
and biases."""

from collections.abc import Iterator, Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from smoothrot_offline.distill.products import QuantizedInputs, quantized_product
from smoothrot_offline.report.model import QuantizedLinear
from smoothrot_vllm.format import WEIGHT_SCALE
from smoothrot_vllm.reference import scaled_codes


class StudentLinear(nn.Module):
    """A quantized linear whose channel scales are trained; codes, group scales and clips stay as
    they are.

    ``log_scale (N,)`` is what the scale is multiplied by, as a logarithm. It multiplies what the
    product gives out, so no gradient of a whole weight is ever formed.
    """

    def __init__(self, stored: QuantizedLinear, inputs: QuantizedInputs) -> None:
        super().__init__()
        self._activations = stored.scheme.activations
        self._block = stored.block
        self._inputs = inputs
        self._scale = stored.weight_scale.flatten()
        bits = stored.scheme.weights.bits
        units = scaled_codes(stored.weight_packed, stored.weight_group_scale, bits)
        self._units = units.to(inputs.dtype)
        self.log_scale = nn.Parameter(torch.zeros_like(self._scale))
        self.bias = stored.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x (..., K)`` to ``(..., N)``, float32."""
        quantized = self._inputs(x, self._activations, self._block)
        y = quantized_product(quantized, self._units, self.scale())
        y = y.reshape(*x.shape[:-1], -1)
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
        products: dtype of the products of codes.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        dtypes: Mapping[str, torch.dtype],
        products: torch.dtype = torch.float32,
    ) -> None:
        self.model = model
        model.requires_grad_(False)
        self.products = products
        self._inputs = QuantizedInputs(products)
        self._linears = {}
        for name, module in list(model.named_modules()):
            if isinstance(module, QuantizedLinear):
                parent, _, child = name.rpartition(".")
                self._linears[name] = StudentLinear(module, self._inputs)
                setattr(model.get_submodule(parent), child, self._linears[name])
        self._dtypes = {
            name: dtypes[name]
            for name, parameter in model.named_parameters()
            if name in dtypes and parameter.dim() == 1
        }
        for name in self._dtypes:
            model.get_parameter(name).requires_grad_(True)

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Of every token of ``tokens (samples, seqlen)``, ``(samples * seqlen, vocabulary)``."""
        found = logits(self.model, tokens, self.products)
        self._inputs.forget()
        return found

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


def logits(model: PreTrainedModel, tokens: torch.Tensor, products: torch.dtype) -> torch.Tensor:
    """Of every token of ``tokens (samples, seqlen)``, ``(samples * seqlen, vocabulary)``.

    Args:
        model: float32.
        tokens: int64.
        products: dtype of its matrix products; what is between them stays float32.
    """
    with torch.autocast(tokens.device.type, products, enabled=products != torch.float32):
        found: torch.Tensor = model(tokens, use_cache=False).logits
    return found.flatten(0, 1)
