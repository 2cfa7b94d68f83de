# SPDX-License-Identifier: Apache-2.0
"""About a minute of ``make fuzz``, and controls: what no reader of files may do is reported if
one does it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("fuzz.py")
TARGETS = (
    *(
        "quantization_config",
        "plugin",
        "model_config",
        "source",
        "source_gptq",
        "source_awq",
        "source_compressed",
        "source_fp8",
        "source_fused",
        "source_mxfp4",
        "converted",
        "transform",
        "adapter",
        "draft_head",
        "journal",
    ),
    *(
        "calibration_text",
        "tokenizer",
        "load_source",
        "load_converted",
        "commands_source",
        "commands_converted",
    ),
)
SLOW_START_SECONDS = 600


def fuzz(folder: Path, *options: str) -> dict[str, Any]:
    output = folder / "fuzz.json"
    command: list[str | Path] = [sys.executable, SCRIPT, "--output", output, *options]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=SLOW_START_SECONDS
    )
    assert output.exists(), done.stderr
    found: dict[str, Any] = json.loads(output.read_text())
    assert done.returncode == bool(found["defects"])
    return found


@pytest.fixture(scope="module")
def minute(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return fuzz(tmp_path_factory.mktemp("fuzz"), "--minutes", "1", "--seed", "7")


@pytest.mark.parametrize("target", TARGETS)
def test_mutated_files_are_read_or_refused_by_name(minute: dict[str, Any], target: str) -> None:
    assert [defect for defect in minute["defects"] if defect["target"] in (target, "start")] == []
    assert minute["inputs_by_target"].get(target, 0) > 0
    # Neither is every input refused at the first check, nor is none damaged.
    if target in ("quantization_config", "model_config", "source", "calibration_text"):
        assert 0 < minute["refused_by_target"][target] < minute["inputs_by_target"][target]


def test_no_target_is_left_out(minute: dict[str, Any]) -> None:
    assert set(minute["inputs_by_target"]) == set(TARGETS)


@pytest.fixture(scope="module")
def controls(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    options = ("--module", "controls", "--minutes", "4", "--inputs", "121", "--case-seconds", "0.5")
    defects: list[dict[str, Any]] = fuzz(tmp_path_factory.mktemp("controls"), *options)["defects"]
    return defects


@pytest.mark.parametrize(
    ("control", "words"),
    [
        ("untyped", "KeyError"),
        ("runs_code", "code of the files was run"),
        ("asks", "a question on the terminal"),
        ("connects", "a connection"),
        ("fills_memory", "MemoryError"),
        ("hides_full_memory", "RuntimeError"),
        ("hangs", "hang"),
        ("waits", "hang"),
        ("crashes", "crash -11"),
    ],
)
def test_what_no_reader_may_do_is_reported(
    controls: list[dict[str, Any]], control: str, words: str
) -> None:
    found = [defect["where"] for defect in controls if defect["target"] == control]
    assert len(found) >= 1
    assert all(words in where for where in found), found
