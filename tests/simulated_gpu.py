# SPDX-License-Identifier: Apache-2.0
"""A GPU that is none: tensors "on" it compute on the CPU, and torch calls are refused where a real
GPU would refuse them.

``SimulatedGpu`` sees every call of torch from Python while it is entered. Tensors made on ``cuda``
or moved there are marked (a subclass with the same values), and so is what is computed from them. A
call that mixes marked and plain tensors, or that only works on memory of the CPU, raises what torch
raises there. The values are the CPU's own, so that whatever was computed on the simulated GPU can
be compared bit for bit; how a real one rounds, its memory and its speed are not simulated.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")
NAME = "Simulated GPU"

_HOST_ONLY = ("numpy", "__array__", "data_ptr", "untyped_storage", "__dlpack__")
_MOVES = ("to", "cpu", "cuda")
_GETTERS = {"device": GPU, "is_cuda": True, "is_cpu": False}
_PRODUCTS = (
    *(
        "matmul",
        "__matmul__",
        "__rmatmul__",
        "mm",
        "bmm",
        "addmm_",
        "addr_",
        "einsum",
        "linear",
        "scaled_dot_product_attention",
    ),
    *("linalg_cholesky_ex", "linalg_solve", "linalg_solve_triangular"),
)


class OnGpu(torch.Tensor):
    """A tensor that counts as one of the simulated GPU; only used while a :class:`SimulatedGpu`
    is entered."""


class SimulatedGpu(TorchFunctionMode):
    """The GPU, as a context; ``products`` counts matrix products and factorizations by where
    they ran: ``gpu`` or ``cpu``."""

    def __init__(self) -> None:
        super().__init__()
        self.products: Counter[str] = Counter()

    def __torch_function__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = _name(func)
        tensors = list(_tensors((args, kwargs)))
        marked = any(isinstance(tensor, OnGpu) for tensor in tensors)
        if (
            name == "__get__"
            and marked
            and (attribute := getattr(func.__self__, "__name__", "")) in _GETTERS
        ):
            return _GETTERS[attribute]
        if marked and name in _HOST_ONLY:
            raise TypeError(
                "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the"
                " tensor to host memory."
            )
        if marked and "smoothrot" in str(func):
            raise NotImplementedError(
                f"Could not run '{func}' with arguments from the 'CUDA' backend."
            )
        if name == "_has_compatible_shallow_copy_type":
            # A module that moves to another device gets new parameters instead of other data in the
            # old ones.
            return len({isinstance(tensor, OnGpu) for tensor in tensors}) == 1
        if name in _MOVES:
            return _moved(name, args, kwargs)
        device = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        if device is not None and device.type == "cuda":
            kwargs["device"] = CPU
        if marked:
            _refuse_mixed(name, args, tensors)
        if name in _PRODUCTS:
            self.products["gpu" if marked else "cpu"] += 1
        # A subclass's own rule would mark a new leaf by a view of it, which is no leaf.
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        to_gpu = marked if device is None else device.type == "cuda"
        if to_gpu:
            return _mapped(result, _mark)
        return _mapped(result, _unmark) if marked and device is not None else result


@contextmanager
def simulated_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimulatedGpu]:
    """One simulated GPU that ``torch.cuda`` knows of while the context lasts."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        patch.setattr(torch.cuda, "get_device_name", lambda device=None: NAME)
        with SimulatedGpu() as gpu:
            yield gpu


def _name(func: Callable[..., Any]) -> str:
    return str(getattr(func, "__name__", func))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _refuse_mixed(name: str, args: tuple[Any, ...], tensors: list[torch.Tensor]) -> None:
    """Numbers, which are tensors without an axis, go with any device; copies go between them,
    but not through an index tensor."""
    if name == "copy_" or (name == "__setitem__" and not list(_tensors(args[1]))):
        return
    if any(tensor.ndim and not isinstance(tensor, OnGpu) for tensor in tensors):
        places = ", ".join(
            f"{tuple(t.shape)} on {'cuda:0' if isinstance(t, OnGpu) else 'cpu'}" for t in tensors
        )
        raise RuntimeError(
            f"{name}: Expected all tensors to be on the same device, but found at least two"
            f" devices: {places}"
        )


def _moved(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``Tensor.to``, ``cpu`` and ``cuda``: the device is that named, that of a tensor given as
    an example, or the old one."""
    source, *rest = args
    wanted = {"cpu": CPU, "cuda": GPU}.get(name) or kwargs.get("device")
    dtype = kwargs.get("dtype")
    for value in rest if name == "to" else []:
        if isinstance(value, str | torch.device):
            wanted = torch.device(value)
        elif isinstance(value, torch.Tensor):
            wanted, dtype = GPU if isinstance(value, OnGpu) else CPU, value.dtype
        elif isinstance(value, torch.dtype):
            dtype = value
    on_gpu = isinstance(source, OnGpu) if wanted is None else torch.device(wanted).type == "cuda"
    crosses = on_gpu != isinstance(source, OnGpu)
    result = torch.Tensor.to(
        source, dtype=dtype or source.dtype, copy=crosses or kwargs.get("copy", False)
    )
    return _mark(result) if on_gpu else _unmark(result)


def _mark(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if isinstance(tensor, OnGpu) else _as(tensor, OnGpu)


def _unmark(tensor: torch.Tensor) -> torch.Tensor:
    return _as(tensor, torch.Tensor) if isinstance(tensor, OnGpu) else tensor


def _as(tensor: torch.Tensor, kind: type[torch.Tensor]) -> torch.Tensor:
    with torch._C.DisableTorchFunction():
        if tensor.is_leaf and tensor.requires_grad:
            return tensor.detach().as_subclass(kind).requires_grad_()
        return tensor.as_subclass(kind)


def _mapped(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, torch.Size):
        return value
    if isinstance(value, list):
        return [_mapped(item, change) for item in value]
    if isinstance(value, tuple):
        # The named tuples of torch take one sequence, those of collections.namedtuple as many
        # arguments as they have fields.
        items = [_mapped(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value
