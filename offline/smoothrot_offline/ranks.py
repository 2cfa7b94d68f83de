# SPDX-License-Identifier: Apache-2.0
"""Processes that share the calibration of one conversion, as ``torchrun`` starts them.

Each rank runs the same code on every N-th sequence, and whatever is summed over sequences is summed
over ranks here, so that all of them decide alike; the first one alone writes and prints. In a
process by itself every function gives back what it is given.
"""

import contextlib
import io
import logging
import os
import traceback
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from typer import Exit

from smoothrot_vllm.errors import ConfigError, OutputError, SmoothRotError

T = TypeVar("T")

_PATIENCE = timedelta(days=7)
"""The others wait while the first rank generates text, or trains the rounded model."""


def count() -> int:
    """How many there are."""
    return dist.get_world_size() if _several() else 1


def number() -> int:
    """Which one this is, from 0."""
    return dist.get_rank() if _several() else 0


def first() -> bool:
    """Whether this is the one that writes."""
    return number() == 0


def place() -> int | None:
    """Which of its machine's processes this is; None in a process by itself."""
    return int(os.environ["LOCAL_RANK"]) if count() > 1 else None


def _several() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Be one of ``torchrun``'s processes while the context lasts.

    An error of one rank ends all: it is raised in the first, with the rank's number, and the others
    end with exit code 1. They print nothing.
    """
    backends = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backends, timeout=_PATIENCE)
    _Ended.told = False
    try:
        with contextlib.nullcontext() if first() else _silence():
            yield
            _meet()
    except BaseException as error:
        if isinstance(error, Exception) and not isinstance(error, Exit | _LostError):
            _end(error)
        if not first():
            raise SystemExit(getattr(error, "code", 1) or 1) from None
        raise
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


class _LostError(OutputError):
    """A rank is gone, and with it every way to tell the others."""


class _Ended:
    """Whether the ranks have told each other why they end."""

    told = False


def _meet(error: BaseException | None = None) -> None:
    """Wait for every rank, before all that they do together.

    Raises:
        SmoothRotError, RuntimeError: a rank has come here with an error; that of the lowest one.
    """
    failed = torch.tensor(int(error is not None))
    with _reaching_all():
        dist.all_reduce(failed)
        if not failed:
            return
        told: list[Any] = [None] * count()
        dist.all_gather_object(told, error and _told(error))
    _Ended.told = True
    if error is None or not first():
        kind, message, trace = next(one for one in told if one is not None)
        found = kind(message)
        found.add_note(trace)
        raise found


def _told(error: BaseException) -> tuple[type[Exception], str, str]:
    """What other ranks need of an error: its kind, so that the output is kept or removed as if it
    were their own."""
    trace = "".join(traceback.format_exception(error))
    if isinstance(error, SmoothRotError):
        return type(error), f"rank {number()}: {error}", trace
    kinds = (kind for kind in (OSError, MemoryError) if isinstance(error, kind))
    return next(kinds, RuntimeError), f"rank {number()}: {type(error).__name__}: {error}", trace


def _end(error: BaseException) -> None:
    """Tell the others of this rank's error, unless it is theirs; wait until the first has cleaned
    up, which ``torchrun`` would interrupt."""
    with contextlib.suppress(Exception):
        if not _Ended.told:
            _meet(error)
    with contextlib.suppress(_LostError), _reaching_all():
        dist.all_reduce(torch.zeros(()))


@contextlib.contextmanager
def _reaching_all() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise _LostError(
            f"a rank ended without a word, killed by the system for want of memory, most likely"
            f" ({str(error).partition(chr(10))[0]}). Use fewer ranks; the same number of them goes"
            " on from the last finished layer."
        ) from error


def share(rows: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor: every N-th row along the first axis."""
    return rows[number() :: count()]


def places(tokens: torch.Tensor, seqlen: int) -> torch.Tensor:
    """Where in all sequences, one after the other, this rank's tokens are; given by their number
    in its own :func:`share`."""
    return tokens + (tokens // seqlen * (count() - 1) + number()) * seqlen


def gathered(rows: torch.Tensor) -> torch.Tensor:
    """The tensor of which each rank has given its :func:`share`."""
    if count() == 1:
        return rows
    parts = _parts(rows)
    whole = rows.new_empty(sum(map(len, parts)), *rows.shape[1:])
    for rank, part in enumerate(parts):
        whole[rank :: count()] = part
    return whole


def joined(rows: torch.Tensor) -> torch.Tensor:
    """The rows of every rank, however many each has, one rank's after the other's."""
    return rows if count() == 1 else torch.cat(_parts(rows))


def _parts(rows: torch.Tensor) -> list[torch.Tensor]:
    lengths = _from_each(len(rows))
    parts = [
        rows.contiguous() if rank == number() else rows.new_empty(length, *rows.shape[1:])
        for rank, length in enumerate(lengths)
    ]
    _meet()  # every rank has the memory
    with _reaching_all():
        for rank, part in enumerate(parts):
            dist.broadcast(part, rank)
    return parts


def add(*sums: torch.Tensor) -> None:
    """Add what the other ranks have to tensors, in place."""
    _reduce(sums, dist.ReduceOp.SUM)


def keep_largest(*maxima: torch.Tensor) -> None:
    """Replace each number by the largest that a rank has in its place."""
    _reduce(maxima, dist.ReduceOp.MAX)


def _reduce(tensors: Iterable[torch.Tensor], operation: Any) -> None:
    if count() == 1:
        return
    _meet()
    with _reaching_all():
        for tensor in tensors:
            dist.all_reduce(tensor, operation)


def summed(*numbers: float) -> list[float]:
    """Each number summed over the ranks."""
    if count() == 1:
        return list(numbers)
    sums = torch.tensor(numbers, dtype=torch.float64)
    add(sums)
    return sums.tolist()


def add_gradients(parameters: Iterable[torch.Tensor]) -> None:
    """Add the other ranks' gradients to those of parameters, which need not have one yet."""
    if count() == 1:
        return
    for one in parameters:
        if one.grad is None:
            one.grad = torch.zeros_like(one)
        add(one.grad)


def from_first(make: Callable[[], T] | None) -> T:
    """What the first rank makes; the others need not give anything to make it with."""
    if count() == 1:
        assert make is not None
        return make()
    sent: list[Any] = [_packed(make()) if make is not None and first() else None]
    _meet()
    with _reaching_all():
        dist.broadcast_object_list(sent)
    found: T = _unpacked(sent[0])
    return found


def shared_out(pieces: Iterable[Callable[[], T]]) -> Iterator[T]:
    """The results of pieces of work, in order. Each rank does every N-th and has all results; what
    is logged meanwhile the first one logs.

    The pieces themselves are made in each rank, one for each rank at a time: what makes them may
    use all ranks, they may not.
    """
    if count() == 1:
        yield from (piece() for piece in pieces)
        return
    rest = iter(pieces)
    while batch := list(islice(rest, count())):
        done = None
        with _kept_logs() as logs:
            if number() < len(batch):
                done = _packed(batch[number()]())
        for result, records in _from_each((done, logs))[: len(batch)]:
            for record in records if first() else []:
                logging.getLogger(record.name).handle(record)
            yield _unpacked(result)


@contextlib.contextmanager
def _kept_logs() -> Iterator[list[logging.LogRecord]]:
    """What is logged while the context lasts, in ranks that print nothing."""
    kept: list[logging.LogRecord] = []
    if first():
        yield kept
        return
    handler = logging.Handler()
    handler.emit = kept.append  # type: ignore[assignment, method-assign]
    logging.getLogger().addHandler(handler)
    try:
        yield kept
    finally:
        logging.getLogger().removeHandler(handler)


def check_alike(facts: dict[str, dict[str, Any]]) -> None:
    """Refuse ranks that would not come to the same numbers.

    Raises:
        ConfigError: a rank has another value in ``facts``; the message names it.
    """
    everyone = _from_each(facts) if count() > 1 else [facts]
    for rank, other in enumerate(everyone):
        for part, fields in everyone[0].items():
            for field, wanted in fields.items():
                if other[part].get(field) != wanted:
                    raise ConfigError(
                        f"rank {rank}: {part}: {field}: expected what the first rank has,"
                        f" {wanted!r}, got {other[part].get(field)!r}. Give every rank the same"
                        " files, packages and kind of device."
                    )


def _from_each(value: Any) -> list[Any]:
    """What each rank has given, in order."""
    _meet()
    found: list[Any] = [None] * count()
    with _reaching_all():
        dist.all_gather_object(found, value)
    return found


def _packed(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def _unpacked(data: bytes) -> Any:
    """A value that another rank has packed, its tensors on this rank's own GPU if they were on
    one."""
    return torch.load(io.BytesIO(data), map_location=_placed, weights_only=False)


def _placed(storage: Any, location: str) -> Any:
    own = location if location == "cpu" else f"cuda:{place()}"
    return torch.serialization.default_restore_location(storage, own)
