# SPDX-License-Identifier: Apache-2.0
"""Damaged and hostile checkpoints end in a typed error, in bounded time, whatever is in
configuration, index or shard."""

import contextlib
import functools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from smoothrot_offline.check.inspect import open_converted
from smoothrot_offline.source.checkpoint import open_checkpoint
from smoothrot_vllm.errors import SmoothRotError
from smoothrot_vllm.format import QuantizationSchema, parse_schema
from smoothrot_vllm.plugin.headers import check_shards

BOUNDED = settings(
    max_examples=100,
    deadline=2000,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
CONFIG = {
    **QuantizationSchema().model_dump(mode="json"),
    "online": {"down_proj": {"size": 1536, "block": 768}, "readers": None},
    "overrides": {
        "model.layers.0.mlp.up_proj": {
            "weights": {"bits": 8},
            "activations": {"bits": 8, "clip": 1.0},
        }
    },
}
SHARD = "model-00001-of-00001.safetensors"
INDEX = "model.safetensors.index.json"

scalars = (
    st.none() | st.booleans() | st.integers(-(2**200), 2**200) | st.floats() | st.text(max_size=5)
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
)


def places(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where every value of a JSON document is."""
    inner = (
        content.items()
        if isinstance(content, dict)
        else enumerate(content)
        if isinstance(content, list)
        else ()
    )
    return [path, *(place for key, value in inner for place in places(value, (*path, key)))]


def replaced(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    """The document with another value in one place."""
    if not path:
        return value
    copy = content.copy()
    copy[path[0]] = replaced(content[path[0]], path[1:], value)
    return copy


def typed(call: Callable[[], object]) -> None:
    """Only errors of the project's own may come out."""
    with contextlib.suppress(SmoothRotError):
        call()


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The skeleton of a converted model: what is read before any layer is built."""
    directory = tmp_path_factory.mktemp("converted")
    tensors = {
        "model.embed_tokens.weight": torch.zeros(8, 4, dtype=torch.bfloat16),
        "model.norm.weight": torch.zeros(4),
    }
    save_file(tensors, directory / SHARD)
    (directory / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, SHARD)}))
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "quantization_config": CONFIG,
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def opened(directory: Path) -> None:
    """Everything that reads a directory it was given: the converter's and the plugin's."""
    typed(lambda: check_shards(directory))
    typed(lambda: open_checkpoint(directory))
    typed(lambda: open_converted(directory))


@BOUNDED
@given(place=st.sampled_from([place for place in places(CONFIG) if place]), value=values)
def test_quantization_config(place: tuple[Any, ...], value: Any) -> None:
    typed(lambda: parse_schema(replaced(CONFIG, place, value)))


@BOUNDED
@given(size=st.integers(1, 2**200), block=st.integers(1, 2**200), power=st.integers(0, 200))
def test_hadamard_sizes_of_any_magnitude_take_no_time(size: int, block: int, power: int) -> None:
    for wide, of in (
        (size, block),
        (block * size, block),
        (math.prod((block, 2**power)), 2**power),
    ):
        config = CONFIG | {"online": {"down_proj": {"size": wide, "block": of}}}
        typed(functools.partial(parse_schema, config))


@BOUNDED
@given(name=st.sampled_from(["config.json", INDEX]), data=st.data())
def test_json_files(converted: Path, tmp_path: Path, name: str, data: st.DataObject) -> None:
    directory = shutil.copytree(converted, tmp_path / "copy", dirs_exist_ok=True)
    content = json.loads((converted / name).read_text())
    place = data.draw(st.sampled_from(places(content)))
    (directory / name).write_text(json.dumps(replaced(content, place, data.draw(values))))
    opened(directory)


@BOUNDED
@given(
    cut=st.integers(0, 400),
    position=st.integers(0, 399),
    byte=st.integers(0, 255),
    header=st.booleans(),
)
def test_shards(
    converted: Path, tmp_path: Path, cut: int, position: int, byte: int, header: bool
) -> None:
    directory = shutil.copytree(converted, tmp_path / "copy", dirs_exist_ok=True)
    content = bytearray((converted / SHARD).read_bytes())
    # The first eight bytes are the length of the header: a liar's must not be allocated.
    content[position % 8 if header else position % len(content)] = byte
    (directory / SHARD).write_bytes(content[: len(content) - cut % len(content)])
    opened(directory)
