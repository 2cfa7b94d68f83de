# SPDX-License-Identifier: Apache-2.0
"""A conversion that must be refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from smoothrot_offline.config import make_config
from smoothrot_offline.convert import convert
from smoothrot_vllm.errors import (
    SmoothRotError,
)


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(source: Path, **options: Any) -> SmoothRotError:
    out = source.parent / "out"
    with pytest.raises(SmoothRotError) as caught:
        convert(source, out, make_config(**{"scales": "none"} | options))
    assert [path.name for path in source.parent.iterdir()] == [source.name], (
        "a refusal leaves nothing behind"
    )
    return caught.value
