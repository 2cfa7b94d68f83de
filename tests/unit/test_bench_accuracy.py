# SPDX-License-Identifier: Apache-2.0
"""Perplexities that benchmarks.conversion.accuracy puts into one table are of one problem."""

import argparse
from pathlib import Path

import pytest

from benchmarks.conversion.accuracy import Results, problem_of


def problem(folder: Path, weights: bytes) -> dict[str, object]:
    for name, content in {"model.safetensors": weights, "text": b"text"}.items():
        (folder / name).write_bytes(content)
    options = {"calib": "generated", "seqlen": 8, "limit_chunks": None, "tasks": "one", "limit": 9}
    return problem_of(argparse.Namespace(model=folder, text=[folder / "text"], **options))


def test_rows_of_another_checkpoint_are_not_gone_on_with(tmp_path: Path) -> None:
    table, one = tmp_path / "accuracy.json", problem(tmp_path, b"one")
    score = {"task": "one", "metric": "acc", "value": 0.5, "standard_error": 0.02}
    row = {"seed": None, "bytes": 1, "tasks": [score]}
    Results(table, one).add(row | {"recipe": "16-bit", "perplexity": {"text": 2.0}})
    again = Results(table, one)
    assert again.has("16-bit", None)
    for seed, perplexity in enumerate((3.0, 5.0)):
        again.add(row | {"recipe": "ours", "seed": seed, "perplexity": {"text": perplexity}})
    assert "| recipe | text | to 16-bit | one acc |" in again.table()
    assert "| ours | 4.00 (3.00 to 5.00) | 2.000x | 50.0 ± 2.0 |" in again.table()
    with pytest.raises(SystemExit, match="holds rows for"):
        Results(table, problem(tmp_path, b"two"))
