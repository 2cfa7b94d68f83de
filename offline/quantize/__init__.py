# SPDX-License-Identifier: Apache-2.0
"""Weight quantisers: from a float matrix to codes and scales."""

from smoothrot_offline.quantize.gptq import quantize_gptq
from smoothrot_offline.quantize.hessian import HessianAccumulator
from smoothrot_offline.quantize.rtn import QuantizedWeight, quantize_rtn

__all__ = ["HessianAccumulator", "QuantizedWeight", "quantize_gptq", "quantize_rtn"]
