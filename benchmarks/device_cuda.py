# SPDX-License-Identifier: Apache-2.0
"""A GPU as kernels.py times it, with the 16-bit, 8-bit and 4-bit linears that vLLM would run there.

Never run on a GPU yet: no CUDA device was at hand.
"""

import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from common import Floors, Timing, time_alternately
from contenders import Maker, Peers, Rotating, torch_linear

from smoothrot_vllm import ops

LEAST_CALLS = 16
"""Calls that one CUDA graph holds at least, so that its launch is not what is timed."""
PROBE_BYTES = 1 << 30
PROBE_SIZE = 8192
MARLIN_GROUP = 128


class CudaClock:
    """Seconds of device time: an event is recorded on the current stream and waited for."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.last = self._event()

    def __call__(self) -> float:
        """Seconds since the clock was made. Elapsed times are short and summed here: torch gives them as float32."""
        now = self._event()
        self.seconds += self.last.elapsed_time(now) / 1e3
        self.last = now
        return self.seconds

    @staticmethod
    def _event() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        return event


def capture(call: Callable[[], object], times: int) -> torch.cuda.CUDAGraph:
    """``times`` calls as a CUDA graph, which is how vLLM runs them: the host's part of a launch is not timed."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            call()
    return graph


def graph_calls(period: int) -> int:
    """Calls of a graph: whole rounds through the weights, at least :data:`LEAST_CALLS`."""
    return period * -(-LEAST_CALLS // period)


class CudaDevice:
    """The current GPU."""

    activation_bytes = 2

    def __init__(self) -> None:
        self.properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.capability = 10 * self.properties.major + self.properties.minor
        self.name = re.sub(r"[^a-z0-9]+", "-", self.properties.name.lower()).strip("-")
        self.cache_bytes = 2 * self.properties.L2_cache_size
        self.peers = find_peers()

    def facts(self) -> dict[str, Any]:
        """Name, capability, memory, driver's CUDA and what our library was built for."""
        return {
            "gpu": self.properties.name,
            "capability": f"sm_{self.capability}",
            "multiprocessors": self.properties.multi_processor_count,
            "memory_bytes": self.properties.total_memory,
            "l2_bytes": self.properties.L2_cache_size,
            "cuda": torch.version.cuda,
            "architectures": list(ops.cuda_architectures()),
            "clock": "CUDA events around CUDA graphs",
        }

    def reader(self, memory: Sequence[torch.Tensor]) -> None:
        """None: a GPU's bandwidth is its own, so that of :meth:`floors` holds for the whole run."""

    def floors(self) -> Floors:
        """Bytes/s of a copy within device memory, read and written, and int8 multiply-adds/s of torch's own matmul.

        Twice the int8 rate stands for int4 where the GPU multiplies it natively: nothing in torch measures that.
        """
        source = torch.empty(PROBE_BYTES, dtype=torch.uint8)
        target = torch.empty_like(source)
        left, right = (torch.randint(-128, 128, (PROBE_SIZE, PROBE_SIZE), dtype=torch.int8) for _ in range(2))
        probes: dict[str, Callable[[], object]] = {
            "copy": partial(target.copy_, source),
            "multiply": partial(torch._int_mm, left, right.t()),
        }
        times = time_alternately(probes, 15, 0.02, CudaClock())
        rate = PROBE_SIZE**3 / times["multiply"].best
        return Floors(2 * PROBE_BYTES / times["copy"].best, rate, 2 * rate if self.capability < 90 else None)

    def time(self, calls: Mapping[str, tuple[Callable[[], object], int]], rounds: int, seconds: float) -> dict[str, Timing]:
        """Alternately, each as a CUDA graph of whole rounds through its weights."""
        counts = {name: graph_calls(period) for name, (_, period) in calls.items()}
        graphs = {name: capture(call, counts[name]) for name, (call, _) in calls.items()}
        times = time_alternately({name: graph.replay for name, graph in graphs.items()}, rounds, seconds, CudaClock())
        return {name: Timing(time.median / counts[name], time.best / counts[name]) for name, time in times.items()}


def find_peers() -> Peers:
    """torch's 16-bit linears and whichever of vLLM's and Humming's kernels are installed."""
    peers = Peers()
    peers.makers["bf16"] = torch_linear
    peers.makers["fp16"] = partial(torch_linear, dtype=torch.float16)
    peers.find("w8a8", cutlass_w8a8)
    peers.find("marlin_w4a16", marlin_w4a16)
    for bits in (4, 8):
        peers.find(f"humming_w4a{bits}", partial(humming, bits))
    return peers


def _vllm_for_cuda(op: str) -> Any:
    """vLLM's ``_custom_ops``, once its compiled op is there.

    Raises:
        ImportError: vLLM is not installed.
        RuntimeError: it is a build for another device, or has no such op.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ImportError("vllm is not installed: pip install 'vllm==0.32.0'")
    from vllm import _custom_ops as vllm_ops
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        raise RuntimeError("vllm is installed for another device: expected its CUDA wheel, pip install 'vllm==0.32.0'")
    current_platform.import_kernels()
    if not hasattr(torch.ops._C, op):
        raise RuntimeError(f"this build of vllm has no {op}")
    return vllm_ops


def cutlass_w8a8() -> Maker:
    """vLLM's int8 linear: dynamic per-token quantisation, then CUTLASS; raises what ``_vllm_for_cuda`` does."""
    vllm_ops = _vllm_for_cuda("cutlass_scaled_mm")

    def linear(x: torch.Tensor, weight: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        codes, scale, _ = vllm_ops.scaled_int8_quant(x)
        return vllm_ops.cutlass_scaled_mm(codes, weight[0].t(), scale, weight[1], x.dtype)

    def make(columns: int, inputs: int, copies: int) -> Rotating:
        weight, scale = torch.randint(-128, 128, (columns, inputs), dtype=torch.int8), torch.rand(columns, 1)
        return Rotating(linear, [(weight.clone(), scale) for _ in range(max(2, copies // 2))])

    return make


def marlin_w4a16() -> Maker:
    """vLLM's 4-bit weights with 16-bit activations, in groups of 128; raises what ``_vllm_for_cuda`` does."""
    vllm_ops = _vllm_for_cuda("marlin_gemm")
    from vllm.model_executor.layers.quantization.utils import marlin_utils
    from vllm.scalar_type import scalar_types

    def make(columns: int, inputs: int, copies: int) -> Rotating:
        # Eight 4-bit inputs of a column in each int32, as GPTQ stores them.
        packed = torch.randint(-(2**31), 2**31, (inputs // 8, columns), dtype=torch.int32)
        weight = vllm_ops.gptq_marlin_repack(packed, inputs, columns, 4)
        scale = torch.rand(inputs // MARLIN_GROUP, columns, dtype=torch.bfloat16)
        scale = marlin_utils.marlin_permute_scales(scale, size_k=inputs, size_n=columns, group_size=MARLIN_GROUP)
        zero_points = marlin_utils.marlin_make_empty(weight.device)

        def linear(x: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
            return marlin_utils.apply_gptq_marlin_linear(
                input=x,
                weight=own,
                weight_scale=scale,
                weight_zp=zero_points,
                workspace=None,
                wtype=scalar_types.uint4b8,
                output_size_per_partition=columns,
                input_size_per_partition=inputs,
            )

        return Rotating(linear, [weight.clone() for _ in range(copies)])

    return make


def humming(act_bits: int) -> Maker:
    """Humming's 4-bit weights with per-token int4 or int8 activations, compiled at the first call.

    Raises:
        ImportError: Humming is not installed.
    """
    if importlib.util.find_spec("humming") is None:
        raise ImportError("humming is not installed: pip install 'humming-kernels[cu13]'")
    from humming.layer import HummingLayer

    def make(columns: int, inputs: int, copies: int) -> Rotating:
        weight = torch.randn(columns, inputs, dtype=torch.bfloat16)

        def layer() -> Any:
            one = HummingLayer(
                shape_n=columns,
                shape_k=inputs,
                weight_config={"dtype": "int4"},
                input_config={"dtype": f"int{act_bits}"},
                torch_dtype=torch.bfloat16,
            ).cuda()
            one.load_from_unquantized(weight)
            one.transform()
            return one

        return Rotating(lambda x, one: one(x), [layer() for _ in range(copies)])

    return make
