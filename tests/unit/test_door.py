# SPDX-License-Identifier: Apache-2.0
"""The door for files of others lets nothing in that would hang or fill the memory, and nothing
is read beside it."""

import ast
import os
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import REPOSITORY

from smoothrot_vllm.errors import CheckpointError
from smoothrot_vllm.foreign_files import MAX_DEPTH, read_json

Edit = Callable[[Path], object]


def deep(path: Path) -> None:
    path.write_text('{"a":' * (MAX_DEPTH + 1) + "1" + "}" * (MAX_DEPTH + 1))


def large(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate((256 << 20) + 1)


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (deep, "values inside each other more than 64 deep"),
        (lambda path: path.write_text("[" * 10**6), "values inside each other more than 64 deep"),
        (lambda path: path.write_text('{"a": 1' + "0" * 5000 + "}"), "cannot be read as JSON"),
        (lambda path: path.write_text('{"a": 1' + "0" * 50 + "}"), "more than 128 bits"),
        (lambda path: path.write_text('{"a": "\\ud800"}'), "half a character"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "cannot be read as JSON"),
        (large, "expected at most 268435456 bytes"),
        (fifo, "expected a file, got something else"),
        (
            lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
            "expected a file, got something else",
        ),
        (lambda path: (path.unlink(), path.mkdir()), "expected a file, got something else"),
    ],
)
def test_json_that_would_hang_or_fill_the_memory_is_refused(
    tmp_path: Path, damage: Edit, words: str
) -> None:
    path = tmp_path / "config.json"
    path.write_text("{}")
    damage(path)
    with pytest.raises(CheckpointError, match=words):
        read_json(path)


def test_a_small_file_takes_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a": 1}')
    tracemalloc.start()
    read_json(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


EXPECTED_LOADS = [
    ("offline/smoothrot_offline/output/journal.py", "json.loads"),
    ("offline/smoothrot_offline/output/model.py", "pickle.loads"),
    ("offline/smoothrot_offline/ranks.py", "torch.load"),
    ("offline/smoothrot_offline/source/layers.py", "AutoModel.from_config"),
]
"""A layer of a configuration that went through the door, and what the same process, or another of
the same torchrun, has just written."""
DOORS = ("foreign_files.py", "source/models.py", "source/tokenizers.py")


def called(file: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]


def test_every_load_goes_through_the_door() -> None:
    loads = r"(.*\.)?(from_pretrained|from_config|safe_open|load_file)|(json|pickle|torch)\.loads?"
    found = [
        (file.relative_to(REPOSITORY).as_posix(), ast.unparse(call.func))
        for folder in ("offline", "smoothrot_vllm")
        for file in (REPOSITORY / folder).rglob("*.py")
        for call in called(file)
        if re.fullmatch(loads, ast.unparse(call.func)) and not file.as_posix().endswith(DOORS)
    ]
    assert sorted(found) == EXPECTED_LOADS


@pytest.mark.parametrize("folder", ["offline", "smoothrot_vllm", "benchmarks"])
def test_no_load_leaves_code_of_others_to_a_question(folder: str) -> None:
    for file in (REPOSITORY / folder).rglob("*.py"):
        for call in called(file):
            if re.fullmatch(r"Auto\w+\.from_(pretrained|config)", ast.unparse(call.func)):
                options = [ast.unparse(option) for option in call.keywords]
                assert {"trust_remote_code=False", "**LOCAL_ONLY"} & set(options), (
                    f"{file}:{call.lineno}"
                )
