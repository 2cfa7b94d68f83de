# SPDX-License-Identifier: Apache-2.0
"""``report``: a plain directory and two converted ones side by side, without a network; its
numbers, page and refusals."""

import functools
import json
import re
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import SHORT_TEXT, byte_tokenizer, save_tiny_model
from typer.testing import CliRunner, Result

from smoothrot_offline.check.inspect import inspect
from smoothrot_offline.cli import app
from smoothrot_offline.report.compare import Report
from smoothrot_offline.report.evaluate import evaluate_perplexity
from smoothrot_offline.report.model import load_model

CHOICES = ["red", "green", "blue", "no color at all"]
DOCUMENTS = [
    {"question": f"Question {number}: what color is it?", "choices": CHOICES, "label": number % 4}
    for number in range(12)
]
TASK = """\
task: tiny_colors
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The plain model, W4A8 in groups of 32, and plain W4A4."""
    base = tmp_path_factory.mktemp("models")
    source = save_tiny_model(base / "plain", "llama")
    for name, options in {
        "w4a8": (
            "--activation-bits",
            8,
            "--group-size",
            32,
            "--calib-samples",
            2,
            "--calib-seqlen",
            32,
        ),
        "w4a4": ("--scales", "none"),
    }.items():
        assert invoke("run", source, base / name, "--preset", "none", *options).exit_code == 0
    return [source, base / "w4a8", base / "w4a4"]


@pytest.fixture
def texts(tmp_path: Path) -> list[Path]:
    (tmp_path / "text.txt").write_text(SHORT_TEXT.read_text()[:1000])
    (tmp_path / "docs.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in ("one two", "three four"))
    )
    return [tmp_path / "text.txt", tmp_path / "docs.jsonl"]


@pytest.fixture
def task_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "colors.jsonl").write_text(
        "".join(json.dumps(document) + "\n" for document in DOCUMENTS)
    )
    (folder / "colors.yaml").write_text(TASK.format(data=folder / "colors.jsonl"))
    return folder


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")

    def refuse(_socket: socket.socket, address: object) -> None:
        pytest.fail(f"a connection to {address} was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def accuracy(directory: Path, documents: list[dict[str, Any]]) -> float:
    """Share of the documents whose right answer is the likeliest continuation, one continuation
    at a time."""
    model, tokenizer, right = load_model(directory, torch.float32), byte_tokenizer(), 0
    for document in documents:
        question = tokenizer(document["question"]).input_ids
        scores = []
        for choice in document["choices"]:
            answer = tokenizer(f" {choice}").input_ids
            with torch.no_grad():
                logits = model(torch.tensor([question + answer])).logits[0].log_softmax(-1)
            rows = logits[len(question) - 1 : -1]
            scores.append(float(rows.gather(1, torch.tensor(answer)[:, None]).sum()))
        right += scores.index(max(scores)) == document["label"]
    return right / len(documents)


@pytest.mark.usefixtures("no_network")
def test_every_number_is_the_direct_one(
    directories: list[Path], texts: list[Path], task_folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval")
    options: list[object] = [part for text in texts for part in ("--text", text)]
    options += ["--seqlen", 128, "--tasks", "tiny_colors", "--include-path", task_folder]
    options += [
        "--prompt-tokens",
        16,
        "--new-tokens",
        2,
        "--rounds",
        3,
        "--out",
        tmp_path / "report.json",
    ]
    result = invoke("report", *directories, *options, "--json")
    assert result.exit_code == 0, result.stderr
    found = Report.model_validate_json(result.stdout)
    assert Report.model_validate_json((tmp_path / "report.json").read_text()) == found
    assert [record.directory for record in found.directories] == [
        str(directory) for directory in directories
    ]
    assert [record.kind for record in found.directories] == ["plain", "SmoothRot", "SmoothRot"]
    for record, directory in zip(found.directories, directories, strict=True):
        assert record.dtype == "float32"
        for text in texts:
            direct = evaluate_perplexity(directory, text, 128, dtype=torch.float32)
            assert record.perplexity[text.name].perplexity == pytest.approx(
                direct.perplexity, rel=1e-6
            )
            assert record.perplexity[text.name].tokens == direct.tokens
        assert record.size.disk_bytes == sum(
            file.stat().st_size for file in directory.glob("*.safetensors")
        )
        assert record.size.ratio == record.size.sixteen_bit_bytes / record.size.disk_bytes
        (score,) = record.tasks
        assert (score.task, score.metric, score.samples) == ("tiny_colors", "acc", len(DOCUMENTS))
        assert score.value == pytest.approx(accuracy(directory, DOCUMENTS))
        assert score.standard_error is not None
        speed = record.speed
        assert speed is not None
        assert (len(speed.rounds_prefill), len(speed.rounds_decode)) == (3, 3)
        assert speed.prefill == sorted(speed.rounds_prefill)[1]
        assert speed.decode == sorted(speed.rounds_decode)[1]
        first = found.directories[0].speed
        assert first is not None
        assert speed.prefill_ratio == speed.prefill / first.prefill
        assert speed.decode_ratio == speed.decode / first.decode
    plain, converted, _ = found.directories
    assert plain.conversion is None
    assert plain.size.ratio == pytest.approx(1, rel=0.02)
    assert converted.conversion == inspect(directories[1]).origin["config"]
    assert converted.size.linears_ratio == inspect(directories[1]).ratio_linears
    assert found.speed_conditions is not None
    assert found.speed_conditions.threads == torch.get_num_threads()


def test_limits_and_no_speed_measure_less_and_say_so(
    directories: list[Path], texts: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "new" / "report.html"
    options = (
        "--text",
        texts[0],
        "--seqlen",
        64,
        "--limit-chunks",
        2,
        "--no-speed",
        "--dtype",
        "auto",
        "--out",
        out,
    )
    result = invoke("report", *directories[:2], *options)
    assert result.exit_code == 0, result.stderr
    for words in ("the first 2 only", "smaller", "Arithmetic: bfloat16", "126"):
        assert words in " ".join(result.stdout.split()), words
    assert "tokens/s" not in result.stdout
    page = out.read_text()
    assert [file.name for file in out.parent.iterdir()] == ["report.html"]
    assert not re.search(r"https?://|url\(|@import|<script|<link|<img|src=", page)
    assert str(directories[1]) in page
    assert "W4A8 groups of 32" in page
    assert "group_size" in page


@pytest.mark.usefixtures("no_network")
def test_limit_takes_the_first_documents(directories: list[Path], task_folder: Path) -> None:
    pytest.importorskip("lm_eval")
    options = (
        "--tasks",
        "tiny_colors",
        "--include-path",
        task_folder,
        "--limit",
        5,
        "--no-speed",
        "--json",
    )
    result = invoke("report", directories[2], *options)
    assert result.exit_code == 0, result.stderr
    (record,) = Report.model_validate_json(result.stdout).directories
    assert record.tasks[0].samples == 5
    assert record.tasks[0].value == pytest.approx(accuracy(directories[2], DOCUMENTS[:5]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--out", "report.pdf"), "ends in .html or .json"),
        (("--prompt-tokens", 500, "--new-tokens", 13), "context of 512 together"),
        (("--text", "nowhere.txt"), "nowhere.txt"),
        (("--tasks", "piqa", "--include-path", "nowhere"), "expected a folder"),
    ],
)
def test_refusals_name_the_option(
    directories: list[Path], options: tuple[object, ...], words: str
) -> None:
    result = invoke("report", directories[1], *options)
    assert result.exit_code == 1
    assert words in result.stderr
    assert result.stdout == ""


def test_taken_output_is_refused_and_kept(directories: list[Path], tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("mine")
    result = invoke("report", directories[1], "--out", tmp_path / "report.json")
    assert result.exit_code == 1
    assert "expected no such file" in result.stderr
    assert (tmp_path / "report.json").read_text() == "mine"


def test_names_that_would_be_confused_are_refused(
    directories: list[Path], texts: list[Path], tmp_path: Path
) -> None:
    assert "different directories" in invoke("report", directories[1], directories[1]).stderr
    (tmp_path / "more").mkdir()
    (tmp_path / "more/text.txt").write_text("other")
    result = invoke(
        "report", directories[1], "--text", texts[0], "--text", tmp_path / "more/text.txt"
    )
    assert "text.txt more than once" in result.stderr


def test_a_method_that_is_not_installed_is_refused_before_a_model_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "smoothrot_offline.report.compare.load_model", lambda *_: pytest.fail("a model was loaded")
    )
    source = save_tiny_model(tmp_path / "awq", "llama")
    config = json.loads((source / "config.json").read_text()) | {
        "quantization_config": {"quant_method": "awq"}
    }
    (source / "config.json").write_text(json.dumps(config))
    result = invoke("report", source, "--no-speed")
    assert result.exit_code == 1
    assert "quant_method 'awq'" in result.stderr


def test_missing_lm_eval_is_named(directories: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    result = invoke("report", directories[1], "--tasks", "piqa")
    assert result.exit_code == 1
    assert "pip install 'smoothrot-vllm[eval]'" in result.stderr


@pytest.mark.usefixtures("no_network")
def test_task_whose_data_is_missing_is_refused_before_a_model_runs(
    directories: list[Path], task_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    (task_folder / "colors.jsonl").unlink()
    monkeypatch.setattr(
        "smoothrot_offline.report.compare.load_model", lambda *_: pytest.fail("a model was loaded")
    )
    result = invoke(
        "report", directories[1], "--tasks", "tiny_colors", "--include-path", task_folder
    )
    assert result.exit_code == 1
    assert "cannot load their data" in result.stderr


def test_unknown_task_is_named(directories: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = pytest.importorskip("lm_eval.tasks")
    # Without the index of lm-eval's own thousands of tasks, which takes long to build.
    monkeypatch.setattr(
        tasks, "TaskManager", functools.partial(tasks.TaskManager, include_defaults=False)
    )
    result = invoke("report", directories[1], "--tasks", "magic")
    assert result.exit_code == 1
    assert "lm-eval knows no magic" in result.stderr
