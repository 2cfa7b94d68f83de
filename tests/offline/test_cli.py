# SPDX-License-Identifier: Apache-2.0
"""The command line: what it prints where, its exit codes, and plan, verify, inspect and eval."""

import json
import math
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packers import awq, awq_config, pack_linears
from safetensors.torch import load_file
from stored import edit_file, load_weights
from tiny_models import byte_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from typer.testing import CliRunner, Result

from smoothrot_offline.cli import app
from smoothrot_offline.source.checkpoint import Checkpoint
from smoothrot_offline.source.resolve import resolve
from smoothrot_vllm.errors import CheckpointError
from smoothrot_vllm.foreign_files import read_header

MakeModel = Callable[..., Path]


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def invoke_json(*arguments: object) -> dict[str, Any]:
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("\n") == 1, "one object on one line"
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def converted_once(
    build_model: Callable[..., PreTrainedModel], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    base = tmp_path_factory.mktemp("converted")
    build_model(tie_word_embeddings=True).save_pretrained(base / "model")
    (base / "model/tokenizer.json").write_text("{}")
    assert (
        invoke(
            "run",
            "--preset",
            "none",
            base / "model",
            base / "out",
            "--scales",
            "none",
            "--lm-head-bits",
            8,
        ).exit_code
        == 0
    )
    return base / "out"


@pytest.fixture
def converted(converted_once: Path, tmp_path: Path) -> Path:
    """A converted model that the test may damage."""
    return shutil.copytree(converted_once, tmp_path / "converted")


def test_json_of_a_real_process_is_all_of_its_stdout(make_model: MakeModel, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "smoothrot_offline.cli",
        "run",
        "--preset",
        "none",
        str(make_model()),
        str(tmp_path / "out"),
        "--json",
    ]
    done = subprocess.run(
        [*command, "--calib-samples", "2", "--calib-seqlen", "8"],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    facts = json.loads(done.stdout)
    assert facts["output"] == str(tmp_path / "out")
    assert facts["calibration"]["samples"] == 2
    assert facts["ratio_linears"] > 3
    assert 0 < facts["mean_weight_error"] < 0.3


def test_results_for_people_name_the_output(
    converted: Path, make_model: MakeModel, tmp_path: Path
) -> None:
    result = invoke(
        "run", "--preset", "none", make_model(name="other"), tmp_path / "second", "--scales", "none"
    )
    assert "second: " in result.stdout
    assert "4-bit" not in result.stderr
    for command in ("verify", "inspect"):
        assert invoke(command, converted).exit_code == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "MODEL", "OUT", "--group-size", "16"),
        ("run", "MODEL", "OUT", "--weight-bits", "3"),
        ("run", "MODEL", "OUT", "--alpha", "2"),
        ("run", "MODEL"),
        ("plan", "MODEL", "--color"),
        ("eval", "MODEL"),
        ("quantize",),
    ],
)
def test_wrong_command_lines_exit_with_2(arguments: tuple[str, ...]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""


@pytest.mark.parametrize("extra", [(), ("--json",)])
def test_refusal_is_one_line_on_stderr_and_exit_code_1(
    make_model: MakeModel, tmp_path: Path, extra: tuple[str, ...]
) -> None:
    result = invoke(
        "run", "--preset", "none", make_model(), tmp_path / "out", "--group-size", 128, *extra
    )
    assert result.exit_code == 1
    assert result.stdout == ""
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "72 inputs" in errors[0]
    assert "Traceback" not in result.stderr


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = invoke("verify", tmp_path, "--debug")
    assert isinstance(result.exception, CheckpointError)


def test_unexpected_failure_is_one_line_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("smoothrot_offline.check.inspect.inspect", fail)
    result = invoke("inspect", tmp_path)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: unexpected ZeroDivisionError: oops")


def llama_3_8b(directory: Path) -> Path:
    """A checkpoint with the headers of Llama-3-8B and a hole in place of its 16 GB."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    header, offset = {}, 0
    for name, shape in resolve(config.to_dict()).source_tensors().items():
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + offset)
    return directory


def test_plan_of_a_large_model_reads_headers_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = llama_3_8b(tmp_path)
    monkeypatch.setattr(Checkpoint, "load", lambda *_: pytest.fail("a weight was read"))
    plan = invoke_json(
        "plan",
        "--preset",
        "none",
        source,
        "--max-tp",
        2,
        "--lm-head-bits",
        8,
        "--calib",
        "text.txt",
    )
    linears = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    assert plan["refusals"] == []
    assert plan["source_bytes"]["linears"] == 2 * linears
    assert linears / 2 < plan["output_bytes"]["linears"] < 1.005 * linears / 2
    assert plan["output_bytes"]["embedding"] == 2 * 128256 * 4096
    assert plan["hadamard"] == {
        "R1": {"size": 4096, "block": 4096, "factors": "4096"},
        "R2": {"size": 128, "block": 128, "factors": "128"},
        "R4": {"size": 14336, "block": 7168, "factors": "28·256"},
    }
    assert [entry["size"] for entry in plan["tensor_parallel"] if entry["refused"] is None] == [
        1,
        2,
    ]
    # More than its largest tensor in float64, less than the model.
    assert 8 * 4096 * 14336 < plan["memory_bytes"] < 16e9
    assert plan["seconds"] > 0


def test_plan_of_the_converted_sizes_is_what_run_writes(
    make_model: MakeModel, tmp_path: Path
) -> None:
    source = make_model("qwen2", tie_word_embeddings=True)
    options = ("--scales", "none", "--lm-head-bits", 8)
    assert (
        invoke_json("plan", "--preset", "none", source, *options)["output_bytes"]
        == invoke_json("run", "--preset", "none", source, tmp_path / "out", *options)[
            "output_bytes"
        ]
    )
    stored = load_weights(tmp_path / "out")
    inspected = invoke_json("inspect", tmp_path / "out")
    assert sum(inspected["output_bytes"].values()) == sum(
        tensor.nbytes for tensor in stored.values()
    )
    assert sum(inspected["sixteen_bit_bytes"].values()) == sum(
        t.nbytes for t in load_file(source / "model.safetensors").values()
    )


def test_plan_names_refusals_and_exits_with_1(make_model: MakeModel) -> None:
    result = invoke("plan", "--preset", "none", make_model(), "--group-size", 64, "--json")
    assert result.exit_code == 1
    plan = json.loads(result.stdout)
    assert "group size 64" in plan["refusals"][0]
    assert plan["source_bytes"]["linears"] > 0
    assert plan["output_bytes"] is None


def test_plan_names_why_a_tensor_parallel_size_is_not_served(make_model: MakeModel) -> None:
    found = invoke_json(
        "plan", "--preset", "none", make_model(), "--max-tp", 2, "--calib-seqlen", 64
    )
    sizes = {entry["size"]: entry["refused"] for entry in found["tensor_parallel"]}
    assert sizes[1] is None
    assert "9 attention heads" in sizes[2]
    assert "Hadamard blocks of 76" in sizes[8]


def _fuse(source: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(source)
    model.save_pretrained(source, save_original_format=False)


def _pack(source: Path) -> None:
    pack_linears(source, awq_config(8), awq(8))


@pytest.mark.parametrize(
    ("family", "store"),
    [("llama", lambda _: None), ("mixtral", _fuse), ("llama", _pack)],
    ids=["16-bit", "fused experts", "packed"],
)
def test_plan_of_a_hub_model_fetches_no_weight(
    make_model: MakeModel,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    store: Callable[[Path], None],
) -> None:
    source = make_model(family)
    store(source)
    header = {
        name: SimpleNamespace(dtype=found.dtype, shape=list(found.shape))
        for name, found in read_header(source / "model.safetensors", "").items()
    }
    metadata = SimpleNamespace(
        files_metadata={"model.safetensors": SimpleNamespace(tensors=header)}
    )
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda _model, name: source / name)
    monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", lambda _model: metadata)
    hub, local = (
        invoke_json("plan", "--preset", "none", model, "--scales", "none")
        for model in ("some-org/some-model", source)
    )
    assert hub["model"] == "some-org/some-model"
    assert hub["output_bytes"] == local["output_bytes"]
    assert hub["source_bytes"] == local["source_bytes"]
    assert hub["notes"] == local["notes"]


CODES = "model.layers.0.mlp.up_proj.weight_packed"
HEAD_SCALE = "lm_head.weight_scale"
SCALE = "model.layers.2.mlp.down_proj.weight_scale"


def _flip_a_code(directory: Path) -> None:
    edit_file(directory, CODES, lambda tensors: tensors[CODES].view(-1)[:1].bitwise_xor_(1))


def _nan_scale(directory: Path) -> None:
    edit_file(
        directory, HEAD_SCALE, lambda tensors: tensors[HEAD_SCALE].view(-1)[:1].fill_(math.nan)
    )


def _negative_scale(directory: Path) -> None:
    edit_file(directory, HEAD_SCALE, lambda tensors: tensors[HEAD_SCALE].view(-1)[:1].neg_())


def _drop_scale(directory: Path) -> None:
    edit_file(directory, SCALE, lambda tensors: tensors.pop(SCALE))
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"][SCALE]
    index.write_text(json.dumps(content))


def _half_scale(directory: Path) -> None:
    edit_file(directory, SCALE, lambda tensors: tensors.update({SCALE: tensors[SCALE].half()}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            _flip_a_code,
            ["model.layers.0.mlp.up_proj.weight_packed", "not the ones that were written"],
        ),
        (_nan_scale, ["lm_head.weight_scale", "NaN"]),
        (_negative_scale, ["lm_head.weight_scale", "positive"]),
        (_drop_scale, ["model.layers.2.mlp.down_proj.weight_scale", "missing"]),
        (_half_scale, ["model.layers.2.mlp.down_proj.weight_scale", "expected torch.float32"]),
        (
            lambda directory: (directory / "tokenizer.json").write_text("{ }"),
            ["tokenizer.json", "not the one that was written"],
        ),
        (lambda directory: (directory / "tokenizer.json").unlink(), ["tokenizer.json", "missing"]),
    ],
)
def test_verify_finds_every_damage(
    converted: Path, damage: Callable[[Path], object], words: list[str]
) -> None:
    assert invoke_json("verify", converted)["ok"]
    damage(converted)
    result = invoke("verify", converted, "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert not found["ok"]
    assert any(all(word in problem for word in words) for problem in found["problems"]), found[
        "problems"
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method 'smoothrot'"),
        (
            {"quantization_config": {"quant_method": "smoothrot", "format_version": 1}},
            "format_version: expected 2, got 1",
        ),
        ({"dtype": "float64"}, "dtype: expected bfloat16 or float16"),
    ],
)
def test_verify_refuses_what_is_not_this_format(
    converted: Path, change: dict[str, Any], words: str
) -> None:
    path = converted / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    result = invoke("verify", converted)
    assert result.exit_code == 1
    assert words in result.stderr


def test_verify_needs_the_manifest(converted: Path) -> None:
    (converted / "smoothrot_manifest.json").write_text('{"manifest_version": 1}')
    result = invoke("verify", converted)
    assert result.exit_code == 1
    assert "smoothrot_manifest.json" in result.stderr


def test_inspect_says_what_is_stored(converted: Path) -> None:
    found = invoke_json("inspect", converted)
    assert found["architecture"] == "LlamaForCausalLM"
    assert found["quantization"]["lm_head"]["weights"]["bits"] == 8
    assert found["sixteen_bit_bytes"]["lm_head"] == 0
    assert found["ratio_linears"] > 3
    assert len(found["origin"]["layers"]) == 3
    shown = invoke("inspect", converted).stdout
    assert "W4 (per channel) A4" in shown
    assert "152 in blocks of 152" in shown


def test_plan_and_inspect_show_what_the_server_rotates(
    make_model: MakeModel, tmp_path: Path
) -> None:
    source = make_model("gemma3", tie_word_embeddings=True)
    planned = invoke_json("plan", "--preset", "none", source, "--scales", "none")
    assert planned["hadamard"]["R1 online"] == {"size": 72, "block": 72, "factors": "36·2"}
    assert planned["output_bytes"]["lm_head"] == 0
    assert (
        invoke("run", "--preset", "none", source, tmp_path / "out", "--scales", "none").exit_code
        == 0
    )
    assert invoke_json("verify", tmp_path / "out")["ok"]
    assert invoke_json("inspect", tmp_path / "out")["output_bytes"] == planned["output_bytes"]
    shown = " ".join(invoke("inspect", tmp_path / "out").stdout.split())
    assert (
        "152 in blocks of 152; input of the residual stream's readers, 72 in blocks of 72" in shown
    )


def test_eval_prints_what_the_evaluation_measures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from smoothrot_offline.report.evaluate import PerplexityResult

    asked: list[tuple[object, ...]] = []

    def evaluate(*arguments: object) -> PerplexityResult:
        asked.append(arguments)
        return PerplexityResult(8.0, math.log(8.0), 99, 3, 33, False, "bfloat16", "text.txt", 1.5)

    monkeypatch.setattr("smoothrot_offline.report.evaluate.evaluate_perplexity", evaluate)
    facts = invoke_json(
        "eval",
        tmp_path,
        "--text",
        "text.txt",
        "--seqlen",
        33,
        "--limit-chunks",
        3,
        "--device",
        "cpu",
    )
    assert asked == [(tmp_path, Path("text.txt"), 33, 3, torch.float32, torch.device("cpu"))]
    assert (facts["perplexity"], facts["tokens"]) == (8.0, 99)
    assert (
        "perplexity 8.0000 over 99 tokens in bfloat16"
        in invoke("eval", tmp_path, "--text", "text.txt").stdout
    )
    invoke("eval", tmp_path, "--text", "text.txt", "--dtype", "auto")
    assert asked[-1][:5] == (tmp_path, Path("text.txt"), 2048, None, None)
