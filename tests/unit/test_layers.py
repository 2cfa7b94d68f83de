# SPDX-License-Identifier: Apache-2.0
"""Who imports whom: the shared ground nobody above it, the converter the shared ground alone."""

import subprocess
import sys

import pytest
from tiny_models import REPOSITORY

IMPORT_ALL = """
import importlib, sys
from pathlib import Path
folder, *unwanted = sys.argv[1:]
for file in sorted(Path(folder).rglob("*.py")):
    if not {"plugin", "fake_ops.py"} & set(file.parts[-2:]):  # ops imports fake_ops
        module = ".".join(file.relative_to(Path(folder).parent).with_suffix("").parts)
        importlib.import_module(module.removesuffix(".__init__"))
print(*(n for n in sys.modules if any(n == u or n.startswith(u + ".") for u in unwanted)))
"""


@pytest.mark.parametrize(
    ("folder", "unwanted"),
    [
        ("smoothrot_vllm", ["vllm", "smoothrot_vllm.plugin", "smoothrot_offline"]),
        ("offline/smoothrot_offline", ["vllm", "smoothrot_vllm.plugin"]),
    ],
)
def test_a_package_imports_only_what_stands_above_it(folder: str, unwanted: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, REPOSITORY / folder, *unwanted],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert done.stdout.split() == []
