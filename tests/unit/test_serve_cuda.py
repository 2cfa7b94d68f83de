# SPDX-License-Identifier: Apache-2.0
"""benchmarks/serve.py --device cuda without a GPU: `vllm` and `nvidia-smi` are small programs of
these tests."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpu_ready
import pytest
import serve
import serve_device_cuda
import serve_devices
import torch
from common import Floors, Schedule
from serve import Cell
from serve_device_cuda import CudaServing

PYTHON = sys.executable
GIB = 1 << 30
MODEL = "Llama-3.2-1B"
CONFIG = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
}
ALL_SCHEMES = ["bf16", "w4a8", "w4a16", "w8a8", "w4a4"]
# Writes what it was called with below its folder. `serve` refuses w8a8 as vLLM refuses a scheme of
# another architecture.
FAKE_VLLM = """#!{python}
import http.server, json, os, pathlib, sys

here, words = pathlib.Path(__file__).parent, sys.argv[1:]
option = lambda name: words[words.index(name) + 1]
with (here / "calls").open("a") as calls:
    calls.write(json.dumps([words, dict(os.environ)]) + "\\n")
if words[0] == "serve":
    if words[1].endswith("w8a8"):
        sys.exit("Int8 not supported for this architecture")
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer({{}})
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            about = {{"id": "0", "object": "text_completion", "created": 0}}
            self.answer(about | {{"model": "m", "choices": []}})
        def answer(self, body):
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())
        def log_message(self, *_):
            pass
    with (here / "pids").open("a") as pids:
        pids.write(f"{{os.getpid()}}\\n")
    http.server.HTTPServer((option("--host"), int(option("--port"))), Handler).serve_forever()
batch, output = int(option("--num-prompts")), int(option("--random-output-len"))
result = {{"completed": batch, "total_output_tokens": batch * output}}
result |= {{"median_ttft_ms": 20.0, "median_tpot_ms": 5.0}}
result["output_throughput"] = 200.0
(pathlib.Path(option("--result-dir")) / option("--result-filename")).write_text(json.dumps(result))
"""
FAKE_NVIDIA_SMI = """#!{python}
import pathlib, sys

assert sys.argv[1:] == ["--query-compute-apps=pid,used_gpu_memory", "--format=csv,noheader,nounits"]
print("1, 70000")
for pid in pathlib.Path({pids!r}).read_text().split():
    print(f"{{pid}}, {answer}")
"""


class FakeGpu:
    """What CudaServing takes of a CudaDevice."""

    name = "nvidia-test-gpu"

    def facts(self) -> dict[str, Any]:
        return {
            "gpu": "NVIDIA Test GPU",
            "capability": "sm_90",
            "clock": "CUDA events around CUDA graphs",
        }

    def floors(self) -> Floors:
        return Floors(3e12, 5e14, None)


class Stage:
    """A folder with a fake ``vllm`` beside a fake python, a fake ``nvidia-smi`` on PATH and a
    results folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.report_file = folder / "results" / FakeGpu.name / "serve.json"
        self.program("vllm", FAKE_VLLM.format(python=PYTHON))
        self.nvidia_smi("2048")

    def program(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)
        (self.folder / name).chmod(0o755)

    def nvidia_smi(self, answer: str) -> None:
        """Let it say ``answer`` of every server."""
        pids = str(self.folder / "pids")
        self.program("nvidia-smi", FAKE_NVIDIA_SMI.format(python=PYTHON, pids=pids, answer=answer))

    def calls(self, command: str) -> list[tuple[list[str], dict[str, str]]]:
        """Words and environment of each call of ``vllm`` with a subcommand."""
        called = [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]
        return [(words, environment) for words, environment in called if words[0] == command]


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    made = Stage(tmp_path)
    readings = iter(range(0, 1000 * GIB, 3 * GIB))

    def scheme_model(model: str, scheme: str, folder: Path) -> Path:
        directory = tmp_path / model / scheme
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(CONFIG))
        return directory

    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(serve, "scheme_model", scheme_model)
    monkeypatch.setattr(serve_device_cuda, "CudaDevice", FakeGpu)
    monkeypatch.setattr(serve_device_cuda, "RESULTS", tmp_path / "results")
    # Each reading finds 3 GiB more in use than the one before, so that a difference is the readings
    # between.
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda: (1000 * GIB - next(readings), 1000 * GIB)
    )
    monkeypatch.setattr(serve_device_cuda, "SETTLE_READINGS", 0)
    monkeypatch.setattr(gpu_ready, "problems", lambda: [])
    monkeypatch.setattr(gpu_ready, "has_cuda_vllm", lambda: True)
    return made


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["serve.py", "--device", "cuda", *words])
    return serve.main()


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def test_a_whole_run_names_the_peer_that_does_not_start_and_reports_the_others(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--models", MODEL, "--quick", "--rounds", "2") == 0
    report = json.loads(stage.report_file.read_text())
    assert report["machine"].items() >= {"gpu": "NVIDIA Test GPU", "capability": "sm_90"}.items()
    assert {"cpu", "cores"} <= report["machine"].keys()
    assert "clock" not in report["machine"]
    assert report["packages"]["torch"]
    assert report["options"] == {"rounds": 2, "eager": False, "executor": None, "device": "cuda"}
    assert Floors.recorded(report["floors"]) == Floors(3e12, 5e14, None)
    assert (report["prepack"], report["left_out"]) == ([], [])
    assert "Int8 not supported for this architecture" in report["missing"][f"{MODEL} w8a8"]
    assert "CPUs only" in report["missing"]["llama.cpp"]
    served = [scheme for scheme in ALL_SCHEMES if scheme != "w8a8"]
    cells = [(c.batch, c.prompt, c.output) for c in serve.QUICK_CELLS]
    found = [(r["batch"], r["prompt"], r["output"], r["scheme"]) for r in report["results"]]
    assert found == [(*cell, scheme) for cell in cells for scheme in served]
    for row in report["results"]:
        assert (row["gpu_bytes"], row["gpu_bytes_of"]) == (2048 << 20, "processes")
        assert (row["ttft_ms"], row["tpot_ms"], row["tokens_per_s"], len(row["rounds"])) == (
            20.0,
            5.0,
            200.0,
            2,
        )
        assert 0 < row["loaded_rss_bytes"] <= row["peak_rss_bytes"]
        assert row["startup_s"] > 0
    table = capsys.readouterr().out
    assert "2147 (processes)" in table
    assert "Repacking" not in table
    assert f"missing: {MODEL} w8a8" in table


def test_servers_get_equal_shares_and_caches_and_none_of_the_cpu_settings(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_USE_AOT_COMPILE", raising=False)
    assert run(monkeypatch, "--models", MODEL, "--rounds", "1") == 0
    started = stage.calls("serve")
    assert [Path(words[1]).name for words, _ in started] == ALL_SCHEMES
    # 64 sequences of 1056 tokens, 32 KiB each: 2.06 GiB.
    expected = {
        "--kv-cache-memory-bytes": str(3 * GIB),
        "--gpu-memory-utilization": "0.18",
        "--dtype": "bfloat16",
    }
    expected |= {"--max-model-len": "1120", "--max-num-seqs": "64"}
    for words, environment in started:
        assert {name: option(words, name) for name in expected} == expected
        assert "--no-enable-prefix-caching" in words
        assert "--enforce-eager" not in words
        assert "VLLM_USE_AOT_COMPILE" not in environment
    asked = [option(words, "--model") for words, _ in stage.calls("bench")]
    assert [Path(model).name for model in asked[:4]] == [
        scheme for scheme in ALL_SCHEMES if scheme != "w8a8"
    ]


def test_vllm_knows_the_options_of_memory(stage: Stage) -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    parsed = parser.parse_args(CudaServing().options(3 * GIB, 5))
    assert (parsed.kv_cache_memory_bytes, parsed.gpu_memory_utilization) == (3 * GIB, 0.18)


@pytest.mark.parametrize("servers", range(1, 9))
def test_shares_fit_together(stage: Stage, servers: int) -> None:
    share = float(option(CudaServing().options(GIB, servers), "--gpu-memory-utilization"))
    assert 0 < share * servers <= serve_device_cuda.TOGETHER


@pytest.mark.parametrize("answer", ["[N/A]", "[Not Supported]"])
def test_a_driver_that_tells_nothing_of_processes_leaves_the_difference_on_the_device(
    stage: Stage, answer: str
) -> None:
    stage.nvidia_smi(answer)
    (stage.folder / "pids").write_text(f"{os.getpid()}\n")
    assert CudaServing().watch()(os.getpid()) == {"gpu_bytes": 3 * GIB, "gpu_bytes_of": "device"}


def test_only_the_servers_own_processes_count(stage: Stage) -> None:
    """A container sees no processes, or a machine has no nvidia-smi: that is not a use of
    nothing."""
    (stage.folder / "pids").write_text(f"{os.getpid()}\n{os.getppid()}\n")
    assert serve_device_cuda.bytes_of({os.getpid()}) == 2048 << 20
    assert serve_device_cuda.bytes_of({os.getpid(), os.getppid()}) == 4096 << 20
    assert serve_device_cuda.bytes_of({2**30}) is None
    stage.program(
        "nvidia-smi",
        "#!/bin/sh\necho 'NVIDIA-SMI has failed, because it could not talk to the"
        " driver'\nexit 9\n",
    )
    assert serve_device_cuda.bytes_of({os.getpid()}) is None


def test_without_nvidia_smi_nothing_is_known_of_processes(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(stage.folder / "empty"))
    assert serve_device_cuda.bytes_of({os.getpid()}) is None


def test_memory_of_a_killed_server_is_waited_for(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings = iter([9, 7, 2, 2, 5])
    monkeypatch.setattr(serve_device_cuda, "used_bytes", lambda: next(readings))
    monkeypatch.setattr(serve_device_cuda, "SETTLE_SECONDS", 0)
    monkeypatch.setattr(serve_device_cuda, "SETTLE_READINGS", 10)
    assert serve_device_cuda.settled_bytes() == 2


@pytest.mark.parametrize(
    ("minutes", "started", "left_out"),
    [("0", 0, len(ALL_SCHEMES) + len(serve.QUICK_CELLS)), ("60", len(ALL_SCHEMES), 0)],
)
def test_what_the_time_does_not_last_for_is_named(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, minutes: str, started: int, left_out: int
) -> None:
    (stage.folder / "calls").touch()
    assert (
        run(monkeypatch, "--models", MODEL, "--quick", "--rounds", "1", "--minutes", minutes) == 0
    )
    report = json.loads(stage.report_file.read_text())
    assert (len(stage.calls("serve")), len(report["left_out"])) == (started, left_out)


def test_servers_stop_starting_before_cells_do(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("common.time.monotonic", lambda: now)
    schedule = Schedule(10)
    now = 60 * 10 * serve.STARTS_SHARE + 1
    assert not schedule.allows("a server", serve.STARTS_SHARE)
    assert schedule.allows("a cell")
    assert schedule.left_out == ["a server"]


def test_a_report_of_another_gpu_is_not_gone_on_with(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = stage.folder / "named.json"
    words = ("--models", MODEL, "--quick", "--rounds", "1", "--minutes", "0", "--output", str(file))
    assert run(monkeypatch, *words) == 0
    report = json.loads(file.read_text())
    file.write_text(json.dumps(report | {"machine": report["machine"] | {"gpu": "NVIDIA Other"}}))
    assert run(monkeypatch, *words) == 1
    assert "NVIDIA Other" in capsys.readouterr().err


def test_help_says_what_the_device_changes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit, match="0"):
        run(monkeypatch, "--help")
    said = capsys.readouterr().out
    assert "{cpu,cuda}" in said
    assert "no server after 60% of it" in said


def test_llama_cpp_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, "--schemes", "bf16", "q4_0", "q8_0")
    assert "--schemes q4_0 q8_0: llama.cpp is run on CPUs only" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("problems", "reason"),
    [([], "vllm: expected its CUDA wheel"), (["no kernels for sm_75"], "no kernels for sm_75")],
)
def test_what_is_missing_is_said_and_ends_with_status_2(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    problems: list[str],
    reason: str,
) -> None:
    monkeypatch.setattr(gpu_ready, "problems", lambda: problems)
    monkeypatch.setattr(gpu_ready, "has_cuda_vllm", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch)
    said = capsys.readouterr().err
    assert f"serve.py --device cuda: cannot run here. {reason}" in said
    assert "SMOOTHROT_CUDA=1" in said


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built for CUDA")
def test_the_command_itself_refuses_a_machine_without_a_gpu() -> None:
    command = [sys.executable, serve.__file__, "--device", "cuda"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "expected a CUDA build, got one without CUDA" in done.stderr


def test_four_bit_activations_are_multiplied_at_the_int4_rate_where_there_is_one() -> None:
    config = CONFIG | {"num_key_value_heads": 8, "vocab_size": 1}
    int8, int4 = Floors(1e30, 1e9), Floors(1e30, 1e9, 4e9)
    busy = {
        scheme: serve.floor(scheme, config, Cell(1, 64), int4)["ttft_floor_ms"]
        for scheme in ("w4a4", "w4a8")
    }
    assert busy["w4a8"] == pytest.approx(4 * busy["w4a4"])
    assert serve.floor("w4a4", config, Cell(1, 64), int8)["ttft_floor_ms"] == busy["w4a8"]


def test_the_gpus_own_floors_are_measured_on_it_and_their_memory_given_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked, used, emptied = [], [], []
    real = torch.device

    class Probe(FakeGpu):
        def floors(self) -> Floors:
            used.append(torch.empty(0).device.type)
            return super().floors()

    def stand_in(name: str) -> torch.device:
        asked.append(name)
        return real("meta")

    monkeypatch.setattr(torch, "device", stand_in)
    monkeypatch.setattr(serve_device_cuda, "CudaDevice", Probe)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    assert CudaServing().floors() == Floors(3e12, 5e14, None)
    assert (asked[0], used, emptied) == ("cuda", ["meta"], [True])  # torch itself asks for more
    assert torch.empty(0).device.type == "cpu"


def test_a_cpu_serves_as_before() -> None:
    device = serve_devices.open_device("cpu")
    assert device.options(3 * GIB, 5) == []
    assert device.environment(3 * GIB) == {
        "VLLM_CPU_KVCACHE_SPACE": "3",
        "VLLM_USE_AOT_COMPILE": "0",
    }
    assert (device.watch()(os.getpid()), device.output) == ({}, None)
