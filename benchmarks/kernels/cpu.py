# SPDX-License-Identifier: Apache-2.0
"""The CPU as layers.py times it, with the int8 and int4 linears of vLLM and of zentorch beside
it."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.kernels.contenders import Calls, Maker, Peers, Rotating, torch_linear, vllm_ops
from benchmarks.support.machine import machine
from benchmarks.support.timing import Floors, Timing, measure_floors, time_alternately
from smoothrot_vllm import ops


class CpuDevice:
    """All cores that torch uses."""

    name = "cpu"
    cache_bytes = 96 << 20
    activation_bytes = 0

    def __init__(self) -> None:
        self.peers = Peers()
        self.peers.makers["bf16"] = torch_linear
        self.peers.find("w8a8", vllm_w8a8)
        self.peers.find("zentorch_w8a8", partial(zentorch_linear, 8))
        self.peers.find("zentorch_w4a8", partial(zentorch_linear, 4))

    def facts(self) -> dict[str, Any]:
        """Processor, cores, load and the kernels' path."""
        return machine() | {"threads": torch.get_num_threads(), "kernel": ops.kernel_name()}

    def floors(self) -> Floors:
        """Read bandwidth and int8 dot products of the threads together."""
        return measure_floors(torch.get_num_threads())

    def reader(self, memory: Sequence[torch.Tensor]) -> Callable[[], object]:
        """Sums, which reading bounds, by torch's threads: a virtual machine's bandwidth changes
        from one second to the next."""
        words = [piece.flatten()[: piece.nbytes // 8 * 8].view(torch.int64) for piece in memory]
        return lambda: [piece.sum() for piece in words]

    def time(self, calls: Calls, rounds: int, seconds: float) -> dict[str, Timing]:
        """Alternately."""
        return time_alternately({name: call for name, (call, _) in calls.items()}, rounds, seconds)


def vllm_w8a8() -> Maker:
    """vLLM's CPU int8 linear: dynamic per-token quantization, then oneDNN; raises what
    ``contenders.vllm_ops`` does."""
    vllm = vllm_ops("onednn_scaled_mm")

    def linear(x: torch.Tensor, handler: Any) -> torch.Tensor:
        codes, scale, _ = vllm.onednn_scaled_int8_quant(x, None, None, True)
        out = torch.empty((x.shape[0], handler.n), dtype=x.dtype)
        return vllm.onednn_scaled_mm(handler, codes, out, scale, None, None, None)

    def make(columns: int, inputs: int, cache_bytes: int) -> Rotating:
        weight = torch.randint(-128, 128, (columns, inputs), dtype=torch.int8)
        scale, numbers = torch.rand(columns, 1), (torch.bfloat16, True, False, 32)
        create = partial(vllm.create_onednn_scaled_mm, weight.t(), scale, *numbers)
        return Rotating(linear, create, weight.nbytes, cache_bytes)

    return make


def zentorch_linear(weight_bits: int) -> Maker:
    """zentorch's dynamic linear with int8 activations, which vLLM takes for W8A8 and W4A8 on AMD
    processors that have it.

    Args:
        weight_bits: 8 or 4, with one scale per output.

    Raises:
        ImportError: zentorch is not installed, or is a build for another torch.
    """
    try:
        import zentorch  # noqa: F401  # registers the ops
    except ImportError as error:
        raise ImportError(
            f"{error}: pip install zentorch, the version of this torch ({torch.__version__})"
        ) from error
    linear = torch.ops.zentorch.zentorch_dynamic_qlinear

    def make(columns: int, inputs: int, cache_bytes: int) -> Rotating:
        top = 1 << (weight_bits - 1)
        weight = torch.randint(-top, top, (columns, inputs), dtype=torch.int8)
        scale = torch.rand(columns, dtype=torch.bfloat16)
        if weight_bits == 4:
            weight, scale = (
                torch.ops.zentorch.zentorch_woq_repack_weight(weight).view(torch.int8),
                scale[None],
            )
        return Rotating(
            lambda x, codes: linear(x, codes, scale), weight.clone, weight.nbytes, cache_bytes
        )

    return make
