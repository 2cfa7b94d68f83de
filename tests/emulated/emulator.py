# SPDX-License-Identifier: Apache-2.0
"""The hand-written CUDA kernels executed on the CPU: builds csrc/emulator with g++ and calls it
through ctypes."""

import ctypes
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from smoothrot_vllm import reference
from smoothrot_vllm.hadamard import base_matrix, factorize

EMULATOR = Path(__file__).resolve().parents[2] / "csrc" / "emulator"
FLAGS = [
    "-std=c++17",
    "-O2",
    "-g0",
    "-fPIC",
    "-shared",
    "-ffp-contract=off",
    "-Wno-unknown-pragmas",
    "-DSMOOTHROT_EMULATED",
]
FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
PACKED, INT8 = 0, 1
GROUPS_OF_A_WORD = 8


def build_emulator(out: Path, *, native_int4: bool) -> Path:
    """Compile the library as sm_80 to sm_89 (with the int4 MMA) or a later architecture
    (without) sees the kernels."""
    macro = f"-DSMOOTHROT_EMULATED_INT4={int(native_int4)}"
    subprocess.run(
        ["g++", *FLAGS, macro, "-o", str(out), str(EMULATOR / "library.cpp")], check=True
    )
    return out


class _Rotation(ctypes.Structure):
    _fields_ = [("base", ctypes.c_int64), ("power", ctypes.c_int64), ("signs", ctypes.c_void_p)]


class _QuantArgs(ctypes.Structure):
    _fields_ = [
        ("x", ctypes.c_void_p),
        ("dtype", ctypes.c_int),
        ("tokens", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("rotation", _Rotation),
        ("factor", ctypes.c_float),
        ("norm", ctypes.c_float),
        ("bits", ctypes.c_int),
        ("form", ctypes.c_int),
        ("codes", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("norm_weight", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("epsilon", ctypes.c_float),
    ]


class _GemmArgs(ctypes.Structure):
    _fields_ = [
        ("codes", ctypes.c_void_p),
        ("form", ctypes.c_int),
        ("scale", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("weight_form", ctypes.c_int),
        ("weight_scale", ctypes.c_void_p),
        ("group_scale", ctypes.c_void_p),
        ("group_size", ctypes.c_int64),
        ("bias", ctypes.c_void_p),
        ("bias_dtype", ctypes.c_int),
        ("out", ctypes.c_void_p),
        ("out_dtype", ctypes.c_int),
        ("tokens", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
    ]


class _ExpertsArgs(ctypes.Structure):
    _fields_ = [
        ("gemm", _GemmArgs),
        ("expert_bytes", ctypes.c_int64),
        ("tiles", ctypes.c_void_p),
        ("tile_count", ctypes.c_int64),
        ("experts", ctypes.c_int64),
    ]


class _PrepackArgs(ctypes.Structure):
    _fields_ = [
        ("weight", ctypes.c_void_p),
        ("group_scale", ctypes.c_void_p),
        ("group_size", ctypes.c_int64),
        ("packed", ctypes.c_void_p),
        ("experts", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
    ]


class _CombineArgs(ctypes.Structure):
    _fields_ = [
        ("rows", ctypes.c_void_p),
        ("sources", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("out_dtype", ctypes.c_int),
        ("tokens", ctypes.c_int64),
        ("top_k", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
        ("row_count", ctypes.c_int64),
    ]


class _Options(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int)
        for name in ("reverse_order", "dropped_barrier", "wait_slack", "multiprocessors", "trace")
    ]


class _Counters(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("loaded", "stored", "launches", "barriers")]


def packed_groups(weight: torch.Tensor, group_scale: torch.Tensor) -> torch.Tensor:
    """What csrc/cuda/launch.h says of a packed weight ``(..., N, K/2)`` with group scales
    ``(..., N, G)``: the codes, the scales in nibbles and whole words, zeros up to 16 bytes."""
    padded = torch.nn.functional.pad(group_scale, (0, -group_scale.shape[-1] % GROUPS_OF_A_WORD))
    scales = reference.pack_group_scale(padded).flatten(-2)
    return torch.cat(
        (weight.flatten(-2), torch.nn.functional.pad(scales, (0, -scales.shape[-1] % 16))), dim=-1
    )


@dataclass(frozen=True)
class Counters:
    """Global bytes that launches moved, and the block barriers a thread met."""

    loaded: int
    stored: int
    launches: int
    barriers: int


class Emulator:
    """The launchers of csrc/cuda/launch.h over CPU tensors."""

    def __init__(self, library: Path):
        self._library = ctypes.CDLL(str(library))
        for name in ("smoothrot_loaded_from", "smoothrot_dram_loaded"):
            getattr(self._library, name).restype = ctypes.c_int64
        self._options: dict[str, int] = {"dropped_barrier": -1, "multiprocessors": 2}
        self.reset()

    def reset(self) -> None:
        """Clear the counters."""
        self._library.smoothrot_set_options(ctypes.byref(_Options(**self._options)))

    @contextmanager
    def options(self, **options: int) -> Iterator[None]:
        """Options of csrc/emulator/emulator.h for the launches within; the counters start at
        zero."""
        before = self._options
        self._options = before | options
        self.reset()
        try:
            yield
        finally:
            self._options = before
            self.reset()

    def option(self, name: str) -> int:
        """The value of an option."""
        return self._options[name]

    def counters(self) -> Counters:
        """What happened since the last reset."""
        counters = _Counters()
        self._library.smoothrot_get_counters(ctypes.byref(counters))
        return Counters(*(getattr(counters, field[0]) for field in _Counters._fields_))

    def loaded_from(self, tensor: torch.Tensor) -> int:
        """Bytes loaded from ``tensor`` since the last reset, repeats included; needs the option
        ``trace``."""
        return self._library.smoothrot_loaded_from(
            ctypes.c_void_p(tensor.data_ptr()), ctypes.c_int64(tensor.nbytes)
        )

    def dram_loaded(self, cache_bytes: int, resident_blocks: int) -> int:
        """Bytes that the launch since the last reset loads from DRAM through a cache; needs the
        option ``trace``."""
        return self._library.smoothrot_dram_loaded(
            ctypes.c_int64(cache_bytes), ctypes.c_int(resident_blocks)
        )

    def quant(
        self,
        x: torch.Tensor,
        clip: float,
        bits: int,
        form: int = PACKED,
        *,
        block: int = 0,
        producer: str = "",
        norm_weight: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
        epsilon: float = 0.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scale from one launch; ``producer`` is "", "silu_mul" or "rms_norm"."""
        x = x.contiguous()
        tokens, inputs = x.shape[0], x.shape[1] // (2 if producer == "silu_mul" else 1)
        codes = torch.full((tokens, inputs // 2), 0xAA, dtype=torch.uint8)
        if form == INT8:
            codes = torch.full((tokens, inputs), 99, dtype=torch.int8)
        scale = torch.full((tokens,), -1.0)
        args = _QuantArgs(
            x=x.data_ptr(),
            dtype=FLOATS[x.dtype],
            tokens=tokens,
            inputs=inputs,
            rotation=_Rotation(1, 0, None),
            factor=clip / reference.quant_max(bits),
            norm=1.0,
            bits=bits,
            form=form,
            codes=codes.data_ptr(),
            scale=scale.data_ptr(),
            norm_weight=None if norm_weight is None else norm_weight.data_ptr(),
            residual=None if residual is None else residual.data_ptr(),
            epsilon=epsilon,
        )
        matrix = None
        if block:
            factors = factorize(block)
            assert factors is not None
            args.rotation = _Rotation(factors.base, factors.power, None)
            args.norm = torch.tensor(block, dtype=torch.float64).rsqrt().item()
            matrix = base_matrix(factors.base).contiguous() if factors.base > 1 else None
        pointer = None if matrix is None else ctypes.c_void_p(matrix.data_ptr())
        self._check(self._library.smoothrot_quant(producer.encode(), ctypes.byref(args), pointer))
        return codes, scale

    def gemm(
        self,
        kernel: str,
        codes: torch.Tensor,
        scale: torch.Tensor,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        out_dtype: torch.dtype,
        bias: torch.Tensor | None = None,
        tiles: torch.Tensor | None = None,
        group_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``(T, N)`` from one launch of ``kernel``, "small", "s8" or "experts"; int8 codes are
        unpacked ones.

        For "experts", weights and all their scales are stacked, and ``tiles`` is the kernel's int32
        table.
        """
        out = torch.full((codes.shape[0], weight.shape[-2]), 777.0, dtype=out_dtype)
        packed = weight if group_scale is None else packed_groups(weight, group_scale)
        args = _weight_args(weight, packed, group_scale)
        args.codes = codes.data_ptr()
        args.form = INT8 if codes.dtype == torch.int8 else PACKED
        args.scale = scale.data_ptr()
        args.weight_scale = weight_scale.data_ptr()
        args.bias = None if bias is None else bias.data_ptr()
        args.bias_dtype = 0 if bias is None else FLOATS[bias.dtype]
        args.out = out.data_ptr()
        args.out_dtype = FLOATS[out_dtype]
        args.tokens = codes.shape[0]
        # All that the kernels of one weight read is at the beginning.
        table = (None, 0) if tiles is None else (tiles.data_ptr(), tiles.shape[1])
        with_tiles = _ExpertsArgs(args, packed[0].nbytes, *table, len(weight))
        self._check(getattr(self._library, f"smoothrot_gemm_{kernel}")(ctypes.byref(with_tiles)))
        return out

    def prepack_groups(self, weight: torch.Tensor, group_scale: torch.Tensor) -> torch.Tensor:
        """Codes ``(E, N, K/2)`` and group scales ``(E, N, G)`` as one tensor of bytes an expert."""
        experts, outputs, columns = weight.shape
        packed = torch.full_like(packed_groups(weight, group_scale), 0xAA)
        args = _PrepackArgs(
            weight.data_ptr(),
            group_scale.data_ptr(),
            2 * columns // group_scale.shape[2],
            packed.data_ptr(),
            *(experts, outputs, 2 * columns),
        )
        self._check(self._library.smoothrot_prepack_groups(ctypes.byref(args)))
        return packed

    def expand_weight(
        self, weight: torch.Tensor, group_scale: torch.Tensor, first: int, count: int
    ) -> torch.Tensor:
        """Codes times group scales of ``count`` outputs, int8, and a row of 99 after them."""
        packed = packed_groups(weight, group_scale)
        args = _weight_args(weight, packed, group_scale)
        out = torch.full((count + 1, args.inputs), 99, dtype=torch.int8)
        self._check(
            self._library.smoothrot_expand_weight(
                ctypes.byref(args),
                ctypes.c_int64(first),
                ctypes.c_int64(count),
                ctypes.c_void_p(out.data_ptr()),
            )
        )
        return out

    def combine(
        self,
        rows: torch.Tensor,
        sources: torch.Tensor,
        weights: torch.Tensor,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        """``(T, N)`` from one launch that sums the ``rows`` that int32 ``sources`` name, times
        ``weights``, both ``(T, k)``."""
        out = torch.full((len(sources), rows.shape[1]), 777.0, dtype=out_dtype)
        args = _CombineArgs(
            rows=rows.data_ptr(),
            sources=sources.data_ptr(),
            weights=weights.data_ptr(),
            out=out.data_ptr(),
            out_dtype=FLOATS[out_dtype],
            tokens=len(sources),
            top_k=sources.shape[1],
            outputs=rows.shape[1],
            row_count=len(rows),
        )
        self._check(self._library.smoothrot_combine_experts(ctypes.byref(args)))
        return out

    @staticmethod
    def _check(error: int) -> None:
        if error:
            raise RuntimeError(f"launch: cudaError {error}")


def _weight_args(
    weight: torch.Tensor, packed: torch.Tensor, group_scale: torch.Tensor | None
) -> _GemmArgs:
    """The weight's side of a launch, of the first expert if there are several."""
    outputs, columns = weight.shape[-2:]
    args = _GemmArgs(
        weight=packed.data_ptr(),
        weight_form=INT8 if weight.dtype == torch.int8 else PACKED,
        group_size=-1,
        outputs=outputs,
        inputs=columns * (1 if weight.dtype == torch.int8 else 2),
    )
    if group_scale is not None:
        args.group_scale = packed.data_ptr() + outputs * columns
        args.group_size = args.inputs // group_scale.shape[-1]
    return args
