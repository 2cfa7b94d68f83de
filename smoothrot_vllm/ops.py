# SPDX-License-Identifier: Apache-2.0
"""The compiled ops: Python signatures and the loading of the library.

Each function computes what its namesake in :mod:`smoothrot_vllm.reference` defines, codes and
integer sums bit for bit. They are ``torch.ops.smoothrot.*`` ops, so ``torch.compile`` keeps each as
one opaque call. Importing this module loads ``_C.abi3.so``; the first call picks the best kernels
of the CPU, or those named by the environment variable ``SMOOTHROT_CPU_ISA`` (``avx512_vnni``,
``avx2`` or ``portable``).
"""

import logging
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from smoothrot_vllm.errors import ConfigError, UnsupportedPlatformError
from smoothrot_vllm.grouped_experts import grouped_experts
from smoothrot_vllm.hadamard import base_matrix, factorize

logger = logging.getLogger("smoothrot_vllm")

LIBRARY = Path(__file__).parent / "_C.abi3.so"


def _load_library() -> None:
    if not LIBRARY.exists():
        raise UnsupportedPlatformError(
            f"compiled ops: expected the library {LIBRARY}, found none. Install the package with"
            " pip (a C++17 compiler is needed), or build it with `python setup.py build_ext"
            " --inplace`."
        )
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        raise UnsupportedPlatformError(
            f"compiled ops: {LIBRARY} does not load into torch {torch.__version__}: {error}."
            " Rebuild it with this torch."
        ) from error


_load_library()
_OPS = torch.ops.smoothrot


def _call(op: Any, *args: Any) -> Any:
    """Call an op and give its refusals, which the library can only raise as RuntimeError, their
    own types."""
    if torch.compiler.is_compiling():
        return op(*args)
    try:
        return op(*args)
    except RuntimeError as error:
        message = str(error)
        if message.startswith("smoothrot::"):
            raise ConfigError(message) from None
        if message.startswith("SMOOTHROT_CPU_ISA"):
            raise UnsupportedPlatformError(message) from None
        raise


def kernel_name() -> str:
    """Instruction-set path of the kernels: ``avx512_vnni``, ``avx2`` or ``portable``. Logged once.

    Raises:
        UnsupportedPlatformError: ``SMOOTHROT_CPU_ISA`` names an unknown path or one this CPU cannot
            run.
    """
    name: str = _call(_OPS.kernel_name)
    _log_kernel(name)
    return name


def select_kernel(isa: str) -> str:
    """Switch every op to another path from now on, the best one for an empty name: for tests and
    benchmarks.

    Raises:
        UnsupportedPlatformError: ``isa`` is unknown or this CPU cannot run it.
    """
    name: str = _call(_OPS.select_kernel, isa)
    return name


@cache
def _log_kernel(name: str) -> None:
    logger.info("SmoothRot CPU kernels: %s, %d threads", name, torch.get_num_threads())


@cache
def cuda_architectures() -> tuple[str, ...]:
    """GPU architectures that the library holds machine code for (``80``, ``90a``), empty for a
    build without CUDA."""
    return tuple(_OPS.cuda_architectures().split()) if hasattr(_OPS, "cuda_architectures") else ()


def check_cuda(capability: int) -> None:
    """Refuse a GPU that the library has no kernels for.

    Args:
        capability: 10 * major + minor.

    Raises:
        UnsupportedPlatformError: the library was built without CUDA, or not for this capability.
    """
    rebuild = "Install again with pip, nvcc on PATH and SMOOTHROT_CUDA=1"
    if not cuda_architectures():
        raise UnsupportedPlatformError(
            f"GPU of sm_{capability}: expected CUDA kernels in {LIBRARY}, found none. {rebuild}."
        )
    for name in cuda_architectures():
        number = int(name.rstrip("af"))
        if number == capability or (
            name.isdigit() and number // 10 == capability // 10 and number <= capability
        ):
            return
    raise UnsupportedPlatformError(
        f"GPU of sm_{capability}: expected one that runs the code for"
        f" {', '.join(f'sm_{a}' for a in cuda_architectures())}. {rebuild} and"
        f" TORCH_CUDA_ARCH_LIST={capability / 10}; the oldest supported is 8.0."
    )


@torch.compiler.assume_constant_result
def prepare_rotation(block: int, device: torch.device | None = None) -> int:
    """Make the rotation by ``H_block`` known to the kernels of a device, once per process; returns
    ``block``.

    On a GPU this allocates and waits, so it must have been done before a CUDA graph is captured.

    The functions below do it on their own. Code that runs a compiled graph without tracing it in
    the same process must call it when it loads the layer.

    Raises:
        ConfigError: ``block`` is not a Hadamard order.
    """
    cuda = device is not None and device.type == "cuda"
    return _prepare_rotation(block, (device.index or 0) if device is not None and cuda else None)


# The cache lies inside: torch.compile looks through a cached function, and would trace it instead
# of calling it.
@cache
def _prepare_rotation(block: int, cuda_device: int | None) -> int:
    factors = factorize(block)
    if factors is None:
        raise ConfigError(
            f"Hadamard block {block}: no such order is implemented. Use hadamard.choose_block to"
            " pick one."
        )
    if cuda_device is None:
        _OPS.prepare_rotation(base_matrix(factors.base), factors.power)
    else:
        _call(_OPS.prepare_cuda_rotation, base_matrix(factors.base), factors.power, cuda_device)
    return block


def quant(x: torch.Tensor, clip: float, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Dynamic symmetric per-token quantization, :func:`reference.quant`.

    Args:
        x: ``(T, K)`` contiguous float32, bfloat16 or float16; K even.
        clip: the scale is ``max|x| * (clip / quant_max)``, 0 < clip <= 1.
        bits: 4 or 8.

    Returns:
        codes ``(T, K/2)`` uint8 or ``(T, K)`` int8, and scale ``(T,)`` float32.

    Raises:
        ConfigError: an argument has another dtype, shape or range; the message names it.
    """
    return _call(_OPS.quant, x, clip, bits)


def hadamard_quant(
    x: torch.Tensor, block: int, clip: float, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`quant` of ``x (I (x) H_block)``, orthonormal, :func:`reference.hadamard_quant`.

    Args:
        x, clip, bits: as for :func:`quant`.
        block: divides K.

    Returns:
        codes and scale as from :func:`quant`.

    Raises:
        ConfigError: an argument has another dtype, shape or range; the message names it.
    """
    return _call(_OPS.hadamard_quant, x, prepare_rotation(block, x.device), clip, bits)


def silu_mul_hadamard_quant(
    gate_up: torch.Tensor, block: int, clip: float, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`hadamard_quant` of ``silu(gate) * up``, :func:`reference.silu_mul_hadamard_quant`.

    Args:
        gate_up: ``(T, 2 K)``, gate before up, float32, bfloat16 or float16.
        block: divides K; 0 leaves the rotation out.
        clip, bits: as for :func:`quant`.

    Returns:
        codes and scale as from :func:`quant`.

    Raises:
        ConfigError: an argument has another dtype, shape or range; the message names it.
    """
    prepared = prepare_rotation(block, gate_up.device) if block else 0
    return _call(_OPS.silu_mul_hadamard_quant, gate_up, prepared, clip, bits)


def swigluoai_hadamard_quant(
    gate_up: torch.Tensor, block: int, clip: float, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`hadamard_quant` of gpt-oss' activation, :func:`reference.swigluoai_hadamard_quant`; on
    a CPU only.

    Arguments, results and errors are those of :func:`silu_mul_hadamard_quant`.
    """
    prepared = prepare_rotation(block, gate_up.device) if block else 0
    return _call(_OPS.swigluoai_hadamard_quant, gate_up, prepared, clip, bits)


def rms_norm_quant(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float,
    clip: float,
    bits: int,
    residual: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`quant` of the RMS norm of ``x``, or of ``x + residual``,
    :func:`reference.rms_norm_quant`.

    Args:
        x: ``(T, K)`` contiguous float32, bfloat16 or float16; K a multiple of 8.
        weight: ``(K,)`` of x's dtype, or None for ones.
        epsilon: added to the mean of the squares, at least 0.
        clip, bits: as for :func:`quant`.
        residual: ``(T, K)`` of x's dtype; becomes ``x + residual`` in place. None for no addition.

    Returns:
        codes and scale as from :func:`quant`.

    Raises:
        ConfigError: an argument has another dtype, shape or range; the message names it.
    """
    return _call(_OPS.rms_norm_quant, x, weight, epsilon, clip, bits, residual)


def prepack_weight(
    weight: torch.Tensor, weight_scale: torch.Tensor, group_scale: torch.Tensor | None, bits: int
) -> torch.Tensor:
    """Stored codes and scales to the kernels' own layout, once at load.

    Args:
        weight: ``(N, K/2)`` uint8 (4 bits, low nibble = even input) or ``(N, K)`` int8 (8 bits), or
            those of several experts, stacked.
        weight_scale: ``(N, 1)`` float32, stacked where ``weight`` is.
        group_scale: ``(N, G)`` uint8 in [1, 15] of 4-bit weights, one for each group of K/G = 32,
            64 or 128 consecutive inputs, stacked where ``weight`` is; or None.
        bits: 4 or 8.

    Returns:
        One opaque tensor, stacked where ``weight`` is: on a CPU uint8, which holds codes and all
        scales, N padded to a multiple of 32; on a GPU codes and group scales.

    Raises:
        ConfigError: an argument has another dtype or shape; the message names it.
    """
    if weight.device.type == "cpu":
        kernel_name()
    return _call(_OPS.prepack_weight, weight, weight_scale, group_scale, bits)


def gemm(
    codes: torch.Tensor,
    scale: torch.Tensor,
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    act_bits: int,
    weight_bits: int,
    group_size: int,
) -> torch.Tensor:
    """``y = accumulator * weight_scale * scale + bias``, :func:`reference.gemm`.

    Args:
        codes, scale: from :func:`quant` or :func:`hadamard_quant` with ``act_bits``.
        packed: from :func:`prepack_weight` with ``weight_bits``.
        weight_scale: ``(N, 1)`` float32, as given to :func:`prepack_weight`; on a CPU only its
            shape is read here.
        bias: ``(N,)`` of any of the three float dtypes, or None.
        out_dtype: float32, bfloat16 or float16.
        group_size: inputs of a group of :func:`prepack_weight`, -1 where it had none.

    Returns:
        ``(T, N)`` in ``out_dtype``: exact int32 sums, float32 epilogue, rounded once.

    Raises:
        ConfigError: an argument has another dtype, shape or range; the message names it.
    """
    return _call(
        _OPS.gemm,
        codes,
        scale,
        packed,
        weight_scale,
        bias,
        out_dtype,
        act_bits,
        weight_bits,
        group_size,
    )


def linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    block: int,
    clip: float,
    act_bits: int,
    weight_bits: int,
    group_size: int,
) -> torch.Tensor:
    """A whole quantized linear layer: (hadamard) quantize ``x`` per token, then :func:`gemm`.

    Args:
        x: ``(..., K)`` contiguous float32, bfloat16 or float16.
        packed, weight_scale, bias: as for :func:`gemm`.
        block: Hadamard block that rotates the input, 0 for none; divides K.
        clip, act_bits: as for :func:`quant`.
        weight_bits: as for :func:`prepack_weight`.
        group_size: as for :func:`gemm`.

    Returns:
        ``(..., N)`` in the dtype of ``x``.

    Raises:
        ConfigError: an argument has another dtype, shape or range; the message names it.
    """
    if block:
        prepare_rotation(block, x.device)
    numbers = (block, clip, act_bits, weight_bits, group_size)
    return _call(_OPS.linear, x, packed, weight_scale, bias, *numbers)


def silu_mul_linear(
    gate_up: torch.Tensor,
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    block: int,
    clip: float,
    act_bits: int,
    weight_bits: int,
    group_size: int,
) -> torch.Tensor:
    """:func:`linear` of ``silu(gate) * up``: :func:`silu_mul_hadamard_quant`, then :func:`gemm`.

    Args:
        gate_up: ``(..., 2 K)`` contiguous, gate before up, float32, bfloat16 or float16.
        packed, weight_scale, bias, block, clip, act_bits, weight_bits, group_size: as for
            :func:`linear`.

    Returns:
        ``(..., N)`` in the dtype of ``gate_up``.

    Raises:
        ConfigError: an argument has another dtype, shape or range; the message names it.
    """
    if block:
        prepare_rotation(block, gate_up.device)
    numbers = (block, clip, act_bits, weight_bits, group_size)
    return _call(_OPS.silu_mul_linear, gate_up, packed, weight_scale, bias, *numbers)


@torch.library.custom_op("smoothrot::experts", mutates_args=())
def experts(
    x: torch.Tensor,
    weights: torch.Tensor,
    chosen: torch.Tensor,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    block: int,
    clip: float,
    act_bits: int,
    weight_bits: int,
    group_size: int,
    w13_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    activation: str = "silu",
) -> torch.Tensor:
    """The experts of a mixture, :func:`reference.experts`: the input is quantized once, then each
    expert computes its own tokens.

    Arguments are positional.

    Args:
        x, weights, chosen, block, clip, act_bits, weight_bits: as there.
        group_size: of both linears, as for :func:`gemm`.
        w13, w2: what :func:`prepack_weight` makes of all experts' stored codes.
        w13_scale, w2_scale: as given to :func:`prepack_weight`; only their shapes are read on a
            CPU.
        w13_bias, w2_bias: ``biases`` there; None on a GPU.
        activation: a :data:`reference.Activation`; ``silu`` on a GPU.

    Returns:
        ``(T, N)`` in the dtype of ``x``.

    Raises:
        ConfigError: an argument has another dtype, shape or range; the message names it.
    """
    if block:
        prepare_rotation(block, x.device)
    stacks, numbers = (
        (w13, w13_scale, w2, w2_scale),
        (
            block,
            clip,
            act_bits,
            weight_bits,
            group_size,
        ),
    )
    biases = (w13_bias, w2_bias)
    result: torch.Tensor = _call(
        grouped_experts, _OPS, x, weights, chosen, *stacks, *numbers, *biases, activation
    )
    return result


import_module("smoothrot_vllm.fake_ops")  # it can only describe ops that are there
