# SPDX-License-Identifier: Apache-2.0
"""benchmarks/serve.py without a server: its models, floors, report and what it does with
interrupted runs."""

import io
import json
import subprocess
from pathlib import Path
from typing import Any

import llama_cpp_peer
import models
import prepack
import pytest
import serve
import torch
from common import Floors, Schedule, machine, packages
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig
from gguf import GGUFReader
from rich.console import Console
from safetensors.torch import load_file
from serve import Cell
from serve_devices import CpuServing
from serve_report import show
from tiny_models import byte_tokenizer

from benchmarks.support.server import ServerError

TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "vocab_size": 320,
    "tie_word_embeddings": True,
}
PROJECTIONS = 2 * 7


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with a tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    byte_tokenizer().save_pretrained(folder / "tokenizer")
    models.random_model(folder / "bf16", TINY, folder / "tokenizer")
    return folder / "bf16"


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in directory.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def arguments(*words: str) -> Any:
    return serve.parse_arguments(words)


def result(scheme: str, tpot_ms: float, **changes: Any) -> dict[str, Any]:
    return {
        "model": "SmolLM2-135M",
        "scheme": scheme,
        "batch": 1,
        "prompt": 128,
        "output": 32,
        "ttft_ms": 100.0,
        "tpot_ms": tpot_ms,
        "tokens_per_s": 1e3 / tpot_ms,
        "tpot_floor_ms": 2.0,
        "ttft_floor_ms": 2.0,
        "peak_rss_bytes": 2_000_000_000,
        "loaded_rss_bytes": 1_500_000_000,
        "startup_s": 30.25,
        "rounds": [],
    } | changes


def report(*results: dict[str, Any]) -> dict[str, Any]:
    return {
        "machine": machine(),
        "packages": packages(),
        "options": {"rounds": 3, "eager": False, "executor": None, "device": "cpu"},
        "floors": {"read_bytes_per_s": 1e10, "multiply_adds_per_s": None},
        "prepack": [
            {
                "weight": "down_proj",
                "shape": [8, 8],
                "group_size": -1,
                "gb_per_s": 1.5,
                "peak_of_packed": 1.0,
            }
        ],
        "missing": {"llama.cpp": "not installed"},
        "left_out": [],
        "results": list(results),
    }


def test_a_tied_random_model_has_no_head_of_its_own_and_a_tokenizer(source: Path) -> None:
    assert "lm_head.weight" not in tensors(source)
    assert {file.name for file in source.glob("tokenizer*.json")} == set(models.TOKENIZER_FILES)


@pytest.mark.parametrize("scheme", models.PEERS)
def test_a_peer_holds_the_rounded_weights_of_the_source(
    source: Path, tmp_path: Path, scheme: str
) -> None:
    models.write_peer(source, tmp_path / scheme, scheme)
    written, plain = tensors(tmp_path / scheme), tensors(source)
    projections = [name for name in plain if name.endswith("_proj.weight")]
    assert len(projections) == PROJECTIONS
    for name in projections:
        scale = written[f"{name}_scale"].float()
        codes = (
            written[name]
            if scheme == "w8a8"
            else unpack_from_int32(written[f"{name}_packed"], 4, plain[name].shape)
        )
        width = plain[name].shape[1] // scale.shape[1]
        restored = codes.float().view(-1, scale.shape[1], width) * scale[..., None]
        # Half a step of rounding; a bfloat16 scale adds its own rounding of up to seven steps'
        # 2^-9.
        error = (restored.view(plain[name].shape) - plain[name].float()).abs().view(restored.shape)
        assert (error <= scale[..., None] * (0.5 + 7 * 2**-8)).all()
    assert set(plain) - set(written) == (set() if scheme == "w8a8" else set(projections))


@pytest.mark.parametrize(("scheme", "group"), [("w8a8", None), ("w4a16", 32)])
def test_a_peer_names_its_scheme_as_compressed_tensors_reads_it(
    source: Path, tmp_path: Path, scheme: str, group: int
) -> None:
    models.write_peer(source, tmp_path / scheme, scheme)
    config = QuantizationConfig.model_validate(
        models.read_config(tmp_path / scheme)["quantization_config"]
    )
    (linears,) = config.config_groups.values()
    assert linears.weights.num_bits == int(scheme[1])
    assert linears.weights.group_size == group
    assert (linears.input_activations is not None) == (scheme == "w8a8")


def test_widths_that_no_group_divides_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no group of 128, 64 or 32 inputs divides .*\(96, 100\)"):
        models.group_size({"hidden_size": 96, "intermediate_size": 100})


def test_an_interrupted_model_is_made_again(tmp_path: Path) -> None:
    def interrupted(out: Path) -> None:
        out.mkdir()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        models._made(tmp_path / "model", interrupted)
    assert list(tmp_path.iterdir()) == []


def test_parameters_are_those_of_the_written_linears(source: Path) -> None:
    count = sum(
        tensor.numel() for name, tensor in tensors(source).items() if name.endswith("_proj.weight")
    )
    assert models.linear_parameters(models.read_config(source)) == count


def test_no_rounds_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        arguments("--rounds", "0")
    assert "--rounds 0: expected at least 1" in capsys.readouterr().err


def test_floors_are_reading_all_weights_once_or_multiplying_once_a_token() -> None:
    config = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    config |= {"num_hidden_layers": 1, "vocab_size": 100}
    linears, head = 8 * (2 * 8 + 2 * 4) + 3 * 8 * 16, 800
    slow = serve.floor("w4a8", config, Cell(1, 10), Floors(1e3, 1e9))
    assert slow["tpot_floor_ms"] == slow["ttft_floor_ms"] == pytest.approx(linears / 2 + head)
    busy = serve.floor("w4a8", config, Cell(2, 10), Floors(1e9, 1e3))
    assert busy == {
        "tpot_floor_ms": pytest.approx(2 * linears),
        "ttft_floor_ms": pytest.approx(20 * linears),
    }
    # The rate of int8 products says nothing about 16-bit activations.
    assert serve.floor("w4a16", config, Cell(2, 10), Floors(1e3, 1e3))[
        "ttft_floor_ms"
    ] == pytest.approx(linears / 2 + 2 * head)


def test_llama_cpp_brings_its_own_time_to_start_and_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = {"ttft_ms": 1.0, "tpot_ms": 2.0, "tokens_per_s": 3.0, "startup_s": 0.5}
    peaks = iter([7e9, 5e9])
    monkeypatch.setattr(
        serve, "measure_llama_cpp", lambda *_cell: found | {"peak_rss_bytes": next(peaks)}
    )
    contender = serve.Contender("q4_0", tmp_path)
    for _ in range(2):
        assert contender.measure(Cell(1, 8), 0, tmp_path) == {
            "ttft_ms": 1.0,
            "tpot_ms": 2.0,
            "tokens_per_s": 3.0,
        }
    assert (contender.startup_s, contender.peak_rss_bytes) == (0.5, 7_000_000_000)


def test_gguf_holds_every_weight_under_the_name_that_llama_cpp_gives_it(
    source: Path, tmp_path: Path
) -> None:
    llama_cpp_peer.write_float16(source, tmp_path / "model.gguf", models.read_config(source))
    reader = GGUFReader(tmp_path / "model.gguf")
    plain = tensors(source)
    written = {
        tensor.name: torch.from_numpy(tensor.data.astype("float32")) for tensor in reader.tensors
    }
    assert len(written) == len(plain)
    assert torch.equal(
        written["blk.1.attn_output.weight"],
        plain["model.layers.1.self_attn.o_proj.weight"].half().float(),
    )
    assert torch.equal(
        written["blk.0.ffn_norm.weight"],
        plain["model.layers.0.post_attention_layernorm.weight"].float(),
    )
    assert torch.equal(
        written["token_embd.weight"], plain["model.embed_tokens.weight"].half().float()
    )
    with pytest.raises(KeyError, match="q_norm"):
        llama_cpp_peer.gguf_name("model.layers.0.self_attn.q_norm.weight")


def test_a_batch_with_a_short_answer_is_no_measurement() -> None:
    measured = {
        "completed": 4,
        "total_output_tokens": 4 * 32 - 1,
        "median_ttft_ms": 1,
        "median_tpot_ms": 1,
        "output_throughput": 1,
    }
    with pytest.raises(
        RuntimeError, match="expected 4 answers of 32 tokens, got 4 answers, 127 tokens"
    ):
        serve.figures(measured, Cell(4, 128))


def test_a_failing_client_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(command: list[str], **_options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, stderr="no such endpoint")

    monkeypatch.setattr(serve.subprocess, "run", fail)
    server = type("Server", (), {"url": "http://127.0.0.1:1", "model": "bf16"})()
    with pytest.raises(RuntimeError, match="no such endpoint"):
        serve.Contender("bf16", tmp_path, server).measure(Cell(1, 8), 0, tmp_path)
    with pytest.raises(RuntimeError, match="no such endpoint"):
        serve.Contender("q4_0", tmp_path).measure(Cell(1, 8), 0, tmp_path)


def test_finished_cells_are_kept_and_a_repeated_one_is_replaced(tmp_path: Path) -> None:
    kept = report(result("bf16", 40.0), result("w4a8", 10.0))
    serve.save(kept, tmp_path / "serve.json")
    found = serve.open_report(arguments("--output", str(tmp_path / "serve.json")), CpuServing())
    assert found == kept
    assert serve.has(found, "SmolLM2-135M", "w4a8", Cell(1, 128))
    assert not serve.has(found, "SmolLM2-135M", "w4a8", Cell(4, 128))
    serve.drop(found, "SmolLM2-135M", "w4a8", Cell(1, 128))
    assert [r["scheme"] for r in found["results"]] == ["bf16"]
    assert [file.name for file in tmp_path.iterdir()] == ["serve.json"]


def test_a_report_of_other_options_is_not_gone_on_with(tmp_path: Path) -> None:
    serve.save(report(result("bf16", 40.0)), tmp_path / "serve.json")
    with pytest.raises(
        ValueError,
        match=r"serve\.json: expected a report of .*'rounds': 5.*, got one of .*'rounds': 3",
    ):
        serve.open_report(
            arguments("--rounds", "5", "--output", str(tmp_path / "serve.json")), CpuServing()
        )


def test_the_table_holds_times_ratios_and_what_is_missing() -> None:
    console = Console(width=160, record=True, file=io.StringIO())
    show(json.loads(json.dumps(report(result("bf16", 40.0), result("w4a8", 10.0)))), console)
    text = console.export_text()
    (line,) = [line for line in text.splitlines() if "w4a8" in line and "20%" in line]
    assert [word.strip(" │") for word in line.split("│")][6:-1] == [
        "10.0",
        "20%",
        "100.0",
        "1.00",
        "4.00",
        "4.00",
    ]
    assert "missing: llama.cpp: not installed" in text
    assert "1.50" in text


def test_repacking_reports_a_rate_and_the_memory_of_its_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prepack, "SHAPES", {"small": (8192, 4096)})
    for measured in prepack.measure_prepack(rounds=1):
        assert measured["gb_per_s"] > 0
        # The result is written, so resident; twice its size would be a second copy.
        assert 0.9 < measured["peak_of_packed"] < 1.6


def test_a_contender_that_fails_is_named_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def start(model: str, scheme: str, *_others: Any) -> serve.Contender:
        if scheme == "w8a8":
            raise ServerError("no kernel")
        return serve.Contender(scheme, tmp_path)

    def measure(contender: serve.Contender, *_others: Any) -> dict[str, float]:
        if contender.scheme == "w4a16":
            raise RuntimeError("a request failed")
        return {"tpot_ms": 1.0}

    monkeypatch.setattr(serve, "start", start)
    monkeypatch.setattr(serve.Contender, "measure", measure)
    monkeypatch.setattr(
        serve,
        "row",
        lambda model, contender, cell, *_others: result(
            contender.scheme, 1.0, batch=cell.batch, prompt=cell.prompt
        ),
    )
    measured = report()
    args = arguments("--quick", "--output", str(tmp_path / "serve.json"))
    serve.measure_model("SmolLM2-135M", args, measured, CpuServing(), Schedule(None))
    assert {r["scheme"] for r in measured["results"]} == {"bf16", "w4a8"}
    assert len(measured["results"]) == 2 * len(serve.QUICK_CELLS)
    assert measured["missing"]["SmolLM2-135M w8a8"] == "no kernel"
    assert measured["missing"]["SmolLM2-135M w4a16"] == "a request failed"
    assert json.loads((tmp_path / "serve.json").read_text()) == measured
