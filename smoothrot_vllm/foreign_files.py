# SPDX-License-Identifier: Apache-2.0
"""The one door through which files of others are read: JSON and safetensors, by the converter and
by the plugin.

What comes out is a value or a :class:`CheckpointError` that names the file. No more is read than a
file of its kind can need, nothing but regular files is opened, and nothing in a file is ever run.
``offline/smoothrot_offline/source/models.py`` is the door to whatever transformers reads.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safetensors import SafetensorError, safe_open

from smoothrot_vllm.errors import CheckpointError

if TYPE_CHECKING:  # a refusal by a header must not wait for it
    import torch

MAX_JSON_BYTES = 256 << 20
"""Of one JSON document: several times the manifest of the largest mixture of experts."""
MAX_DEPTH = 64
"""Objects and lists inside each other in a JSON document; what works on it later may recurse."""
MAX_INTEGER_BITS = 128
"""Tokenizers without a limit write 10**30 as their longest text."""
_LFS_SPEC = b"version https://git-lfs.github.com/spec/v"
_LFS_POINTER_BYTES = 1024
"""Git LFS keeps its pointers below this."""


@dataclass(frozen=True)
class TensorHeader:
    """What a safetensors header says of one tensor; ``dtype`` in safetensors' spelling."""

    dtype: str
    shape: tuple[int, ...]


def refuse_pointer(path: Path, advice: str = "") -> None:
    """Refuse a Git LFS pointer that stands in place of a file's content.

    Raises:
        CheckpointError: the file is one, is missing, is no regular file or cannot be read.
    """
    try:
        if not path.is_file():
            what = (
                "got something else, such as a directory"
                if path.exists()
                else "the file is missing"
            )
            raise CheckpointError(
                f"{path}: expected a file, {what}. {advice or 'Fetch the checkpoint again.'}"
            )
        if path.stat().st_size > _LFS_POINTER_BYTES:
            return
        with path.open("rb") as file:
            start = file.read(len(_LFS_SPEC))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}. {advice}".rstrip()) from error
    if start == _LFS_SPEC:
        raise CheckpointError(
            f"{path}: expected the file itself, got a Git LFS pointer to it. Run `git lfs pull` in"
            " the repository, or download the model from the hub."
        )


def read_bytes(path: Path, limit: int, advice: str = "") -> bytes:
    """The whole of a regular file.

    Args:
        path: of the file.
        limit: bytes it may have at the most.
        advice: what to do if it cannot be read.

    Raises:
        CheckpointError: it is missing, larger, unreadable, no regular file, or a Git LFS pointer.
    """
    refuse_pointer(path, advice)
    try:
        size = path.stat().st_size
        if size > limit:
            raise CheckpointError(
                f"{path}: expected at most {limit} bytes, got {size}. {advice}".rstrip()
            )
        with path.open("rb") as file:
            # No more than this, as so much memory is taken before the first byte is there.
            return file.read(size)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}. {advice}".rstrip()) from error


def parse_json(data: bytes) -> Any:
    """A JSON document of sane depth and numbers, whose texts can be written again.

    Raises:
        ValueError: it is none.
    """
    text = data.decode("utf-8")
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError(f"values inside each other more than {MAX_DEPTH} deep") from None
    _check_values(content)
    if "\\u" in text:
        # Halves of characters can come from escapes alone.
        try:
            json.dumps(content, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("a text with half a character, a lone surrogate") from None
    return content


def _check_values(content: Any) -> None:
    level = [content]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner.extend(value.values())
            elif isinstance(value, list):
                inner.extend(value)
            elif isinstance(value, int) and value.bit_length() > MAX_INTEGER_BITS:
                raise ValueError(f"a whole number of more than {MAX_INTEGER_BITS} bits")
        if not inner:
            return
        level = inner
    raise ValueError(f"values inside each other more than {MAX_DEPTH} deep")


def read_json(path: Path, advice: str = "") -> dict[str, Any]:
    """A JSON object from a file.

    Args:
        path: of the file.
        advice: what to do if it is damaged.

    Raises:
        CheckpointError: the file is missing, unreadable, too large or no JSON object.
    """
    data = read_bytes(path, MAX_JSON_BYTES, advice)
    try:
        content = parse_json(data)
    except ValueError as error:
        raise CheckpointError(
            f"{path}: expected JSON, cannot be read as JSON: {error}. {advice}".rstrip()
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path}: expected a JSON object, got {type(content).__name__}. {advice}".rstrip()
        )
    return content


@contextmanager
def opened_safetensors(
    path: Path, advice: str, framework: Literal["pt", "np"] = "pt"
) -> Iterator[Any]:
    """A safetensors file, as ``safe_open`` gives it to torch or to NumPy, for as long as the
    context lasts.

    Args:
        path: of the file.
        advice: what to do if it is damaged.
        framework: ``pt`` for torch's tensors, ``np`` for NumPy's arrays.

    Raises:
        CheckpointError: it is missing or not whole, or a tensor cannot be read.
    """
    refuse_pointer(path, advice)
    try:
        with safe_open(path, framework=framework) as tensors:
            yield tensors
    except CheckpointError:
        raise
    # A dtype that torch lacks is a KeyError or a ValueError of the library's.
    except (
        SafetensorError,
        OSError,
        ValueError,
        KeyError,
        TypeError,
        RuntimeError,
        AttributeError,
    ) as error:
        raise CheckpointError(
            f"{path}: expected a whole safetensors file: {_one_line(error)}. {advice}"
        ) from error


def read_header(path: Path, advice: str) -> dict[str, TensorHeader]:
    """The tensors of a safetensors file; no weight is read.

    Raises:
        CheckpointError: see :func:`opened_safetensors`.
    """
    with opened_safetensors(path, advice, "np") as tensors:
        names = tensors.keys()  # safe_open is no mapping
        slices = {name: tensors.get_slice(name) for name in names}
        return {
            name: TensorHeader(part.get_dtype(), tuple(part.get_shape()))
            for name, part in slices.items()
        }


def read_tensors(
    path: Path, advice: str, names: Iterable[str] | None = None
) -> "dict[str, torch.Tensor]":
    """Tensors of a safetensors file, all of them or those of ``names``, in their stored dtype.

    Raises:
        CheckpointError: see :func:`opened_safetensors`.
    """
    with opened_safetensors(path, advice) as tensors:
        return {
            name: tensors.get_tensor(name) for name in (tensors.keys() if names is None else names)
        }


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return (
        text if isinstance(error, SafetensorError | OSError) else f"{type(error).__name__}: {text}"
    )
