# SPDX-License-Identifier: Apache-2.0
"""Where a tensor of a model is stored."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TensorInfo:
    """What a safetensors header says of one tensor; ``dtype`` in safetensors' spelling,
    ``stored`` its name in the file.

    ``part`` chooses from a stored tensor of which this one is a part: the entry of its first
    dimension, the rows of that, and the columns. ``turned`` says that these are the columns and the
    rows of this one.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    stored: str
    part: tuple[int | slice, ...] | None = None
    turned: bool = False
