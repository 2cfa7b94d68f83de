# SPDX-License-Identifier: Apache-2.0
"""The converter on a simulated GPU: nothing heavy stays on the CPU, no tensors of two devices
meet, the bits are the CPU's."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from simulated_gpu import CPU, GPU, NAME, SimulatedGpu, simulated_gpu
from tiny_models import SHORT_TEXT, save_tiny_model
from typer.testing import CliRunner, Result

import smoothrot_offline.check.admit
import smoothrot_offline.decide.stages
import smoothrot_offline.rounding.sequential
from smoothrot_offline.check.verify import verify
from smoothrot_offline.cli import app
from smoothrot_offline.config import AnalysisConfig, make_config
from smoothrot_offline.convert import convert
from smoothrot_offline.device import choose_device, computing_on
from smoothrot_offline.output.directory import JOURNAL_NAME
from smoothrot_offline.output.manifest import read_manifest
from smoothrot_offline.report.analyze import analyze
from smoothrot_offline.report.evaluate import evaluate_perplexity
from smoothrot_vllm import ops, reference
from smoothrot_vllm.errors import ConfigError, DeviceMemoryError, ResumeError

MakeModel = Callable[..., Path]
SMALL = {"calib_samples": 3, "calib_seqlen": 16}
SMALLER = {"num_hidden_layers": 1}
GROUPS = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "rtn": ("llama", {}, {"scales": "none"}),
    "rtn, groups, 4-bit head": (
        "llama",
        GROUPS,
        {"scales": "quantile", "group_size": 32, "lm_head_bits": 4},
    ),
    "gptq, smoothed norms, 8-bit head": (
        "qwen2",
        {},
        {"rounding": "gptq", "smooth_norms": True, "lm_head_bits": 8},
    ),
    "gptaq, search, clips, mixed precision": (
        "llama",
        {},
        {
            "rounding": "gptaq",
            "scales": "search",
            "clip_search": True,
            "keep_8bit": 0.2,
            "act_order": False,
        },
    ),
    "by the model's loss": ("qwen2", {}, {"rounding": "gptaq", "hessian": "model"}),
    "learned scales and rotations": (
        "llama",
        {},
        {"scales": "learned", "rotations": "learned", "rotation_steps": 2, "smooth_norms": True},
    ),
    "sign seeds": ("phi3", {}, {"sign_seeds": 2, "smooth_norms": True}),
    "online rotation": (
        "gemma3",
        {},
        {"rounding": "gptq", "rotations": "learned", "rotation_steps": 2},
    ),
    "keys and values shared": (
        "gemma4",
        {},
        {"rounding": "gptaq", "keep_8bit": 0.2, "smooth_norms": True},
    ),
    "experts": ("mixtral", SMALLER, {"rounding": "gptaq", "clip_search": True, "keep_8bit": 0.1}),
    "not rotated": ("gemma2", {}, {"rotate": False, "rounding": "gptq", "smooth_norms": True}),
}


@pytest.fixture(autouse=True)
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of one dtype on either device, whatever the hardware multiplies fastest."""
    monkeypatch.setattr("smoothrot_offline.learn.decoder.product_dtype", lambda _: torch.float32)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimulatedGpu]:
    with simulated_gpu(monkeypatch) as found:
        yield found


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    files = [file for file in directory.iterdir() if file.suffix in (".safetensors", ".st")]
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def content(directory: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in directory.iterdir()
    }


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def stop_at(layer: int) -> Callable[[str, int, int], None]:
    def progress(message: str, _done: int, _total: int) -> None:
        if message.startswith(f"layer {layer + 1} "):
            raise KeyboardInterrupt

    return progress


def test_the_simulation_refuses_what_a_gpu_refuses(gpu: SimulatedGpu) -> None:
    here, there = torch.ones(4, 4), torch.ones(4, 4, device="cuda")
    assert (here.device, there.device, (there + 1).device, there.cpu().device) == (
        CPU,
        GPU,
        GPU,
        CPU,
    )
    assert [
        there.to(here).device,
        here.to(there).device,
        here.to(there.device, torch.float64).device,
    ] == [CPU, GPU, GPU]
    mixes: list[Callable[[], object]] = [
        lambda: here + there,
        lambda: there @ here,
        lambda: torch.cat([here, there]),
        lambda: there[torch.arange(2)],
        lambda: torch.nn.Linear(4, 4)(there),
        lambda: there.__setitem__(torch.arange(2), there[:2]),
        lambda: torch.where(there > 0, there, here),
    ]
    for mix in mixes:
        with pytest.raises(RuntimeError, match="at least two devices"):
            mix()
    with pytest.raises(TypeError, match=r"Tensor.cpu"):
        there.numpy()
    with pytest.raises(NotImplementedError, match="CUDA"):
        ops.quant(there, 1.0, 4)
    here[:2] = there[:2] + 1
    assert there.add(torch.tensor(1.0)).tolist() == [[2.0] * 4] * 4
    assert here.sum() == 24
    assert gpu.products == {}


@pytest.fixture
def unproven(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small model of a proof runs on the CPU wherever the conversion does."""
    monkeypatch.setattr(smoothrot_offline.check.admit, "prove", lambda _: None)


@pytest.mark.usefixtures("unproven")
@pytest.mark.parametrize("case", CASES)
def test_a_conversion_has_the_bits_of_the_cpus(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    family, sizes, options = CASES[case]
    source, config = make_model(family, **sizes), make_config(**SMALL | options)
    if case == "experts":
        # To write a text, transformers runs its own experts, on a GPU by calls that the CPU has no
        # code for.
        tokens = torch.randint(96, (3, 16), generator=torch.Generator().manual_seed(0))
        monkeypatch.setattr(smoothrot_offline.decide.stages, "load_calibration", lambda *_: tokens)
    convert(source, tmp_path / "cpu", config)
    with simulated_gpu(monkeypatch) as gpu:
        convert(source, tmp_path / "gpu", config, device=GPU)
    expected, found = tensors(tmp_path / "cpu"), tensors(tmp_path / "gpu")
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    on_cpu, on_gpu = read_manifest(tmp_path / "cpu"), read_manifest(tmp_path / "gpu")
    assert (on_cpu.device, on_gpu.device) == ("cpu", f"cuda {NAME}")
    assert on_gpu.model_copy(update={"device": "cpu"}) == on_cpu
    assert verify(tmp_path / "gpu").ok
    # Of the size of a head: the Hadamard matrices that learning starts from.
    assert gpu.products["cpu"] == (on_gpu.config.learns_rotations and len(on_gpu.layers))
    assert gpu.products["gpu"] >= 20 * len(on_gpu.layers)


def test_an_interrupted_conversion_goes_on_only_on_its_device(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, config = (
        make_model(),
        make_config(**SMALL, rounding="gptaq", rotations="learned", rotation_steps=1),
    )
    for name, device in (("cpu", CPU), ("gpu", GPU)):
        with simulated_gpu(monkeypatch), pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / name, config, stop_at(2), device=device)
    with (
        simulated_gpu(monkeypatch),
        pytest.raises(
            ResumeError, match=f"machine: device: .* had 'cpu', this one has 'cuda {NAME}'"
        ),
    ):
        convert(source, tmp_path / "cpu", config, device=GPU)
    with pytest.raises(ResumeError, match=r"machine: device: .* this one has 'cpu'"):
        convert(source, tmp_path / "gpu", config)
    with simulated_gpu(monkeypatch):
        assert convert(source, tmp_path / "gpu", config, device=GPU).resumed_layers == 2
        convert(source, tmp_path / "whole", config, device=GPU)
    assert content(tmp_path / "gpu") == content(tmp_path / "whole")


@pytest.mark.usefixtures("unproven")
def test_eval_and_analyze_have_the_cpus_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_tiny_model(tmp_path / "model", "llama")
    (tmp_path / "text").write_text(SHORT_TEXT.read_text(encoding="utf-8")[:400])
    convert(source, tmp_path / "converted", make_config(scales="none", activation_bits=8))
    options = AnalysisConfig(
        calib=str(tmp_path / "text"),
        calib_samples=2,
        calib_seqlen=16,
        layers=(1,),
        policies=("learned",),
    )
    expected = [
        evaluate_perplexity(tmp_path / name, tmp_path / "text", 64, 1)
        for name in ("model", "converted")
    ]
    analysis, _ = analyze(source, tmp_path / "cpu", options)
    with simulated_gpu(monkeypatch) as gpu:
        found = [
            evaluate_perplexity(tmp_path / name, tmp_path / "text", 64, 1, device=GPU)
            for name in ("model", "converted")
        ]
        assert analyze(source, tmp_path / "gpu", options, device=GPU)[0] == analysis
    # A converted directory runs on the ops' definitions there, whose float sums come in another
    # order.
    assert [result.nll for result in found] == pytest.approx(
        [result.nll for result in expected], rel=1e-5
    )
    assert found[0].nll == expected[0].nll
    assert gpu.products["cpu"] == 0


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"),
            "out of memory",
        ),
        (
            RuntimeError(
                "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
            ),
            "ALLOC_FAILED when .*",
        ),
    ],
)
def test_used_up_memory_names_the_cpu_and_keeps_the_work(
    make_model: MakeModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    kept: str,
) -> None:
    quantize = smoothrot_offline.rounding.sequential.quantize_gptq

    def too_large(*arguments: Any, name: str, **options: Any) -> Any:
        if "layers.1" in name:
            raise error
        return quantize(*arguments, name=name, **options)

    monkeypatch.setattr(smoothrot_offline.rounding.sequential, "quantize_gptq", too_large)
    with (
        simulated_gpu(monkeypatch),
        pytest.raises(DeviceMemoryError, match=f"{NAME}.*{kept}. Free the GPU .* --device cpu"),
    ):
        convert(make_model(), tmp_path / "out", make_config(**SMALL, rounding="gptq"), device=GPU)
    assert (tmp_path / "out.partial" / JOURNAL_NAME).is_file()
    assert not torch.are_deterministic_algorithms_enabled()


def test_another_error_on_a_gpu_stays_what_it_is(gpu: SimulatedGpu) -> None:
    with pytest.raises(RuntimeError, match="illegal address"), computing_on(GPU):
        raise RuntimeError("CUDA error: illegal address")


def test_a_gpu_computes_in_full_float32_and_repeatably(
    gpu: SimulatedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    torch.set_float32_matmul_precision("high")
    try:
        with computing_on(GPU):
            assert torch.get_float32_matmul_precision() == "highest"
            assert torch.are_deterministic_algorithms_enabled()
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    assert not torch.are_deterministic_algorithms_enabled()


def test_definitions_of_the_ops_take_tensors_of_any_device(gpu: SimulatedGpu) -> None:
    x, weight = torch.linspace(-1, 1, 64, device=GPU).reshape(2, 32), torch.ones(32, device=GPU)
    assert reference.rms_norm_quant(x, weight, 1e-6, 0.9, 4)[0].device == GPU
    codes, scale, group_scale = (
        torch.ones(2, 64, 16, dtype=torch.uint8, device=GPU),
        torch.ones(2, 64, 1, device=GPU),
        torch.ones(2, 64, 1, dtype=torch.uint8, device=GPU),
    )
    chosen = torch.zeros(2, 1, dtype=torch.int64, device=GPU)
    linear = (codes, scale, group_scale)
    once = torch.ones(2, 1, device=GPU)
    assert reference.experts(x, once, chosen, linear, linear, 32, 0.9, 8, 4).device == GPU
    stored = reference.pack_group_scale(group_scale)
    assert reference.unpack_group_scale(stored, 1).device == GPU


def test_auto_is_the_gpu_where_there_is_one(gpu: SimulatedGpu) -> None:
    assert [choose_device(option).device for option in ("auto", "cpu", "cuda", "cuda:0")] == [
        GPU,
        CPU,
        GPU,
        GPU,
    ]
    assert choose_device("auto").described == f"cuda:0 ({NAME}), the first GPU"
    assert choose_device("auto", workers=2).described == "cpu, as --workers 2 work on it"
    with pytest.raises(ConfigError, match=r"--device cuda:1: expected GPU 1 .* got 1 of them"):
        choose_device("cuda:1")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("cuda", "expected GPU 0 .* got 0 of them .* use --device cpu"),
        ("gpu", "expected auto, cpu, cuda or"),
    ],
)
@pytest.mark.parametrize("command", ["run", "plan", "eval", "analyze"])
def test_a_device_that_is_not_there_is_refused(
    make_model: MakeModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    option: str,
    message: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    rest = {
        "run": [tmp_path / "out"],
        "plan": [],
        "eval": ["--text", SHORT_TEXT],
        "analyze": [tmp_path / "out"],
    }[command]
    result = invoke(command, make_model(), *rest, "--device", option)
    assert result.exit_code == 1
    assert re.search(f"--device {option}: {message}", result.stderr)


def test_commands_say_which_device_they_chose(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_model()
    options = ("--preset", "none", "--scales", "none")
    with simulated_gpu(monkeypatch):
        result = invoke("run", source, tmp_path / "out", *options)
        assert (
            result.exit_code,
            result.stderr.count(f"device: cuda:0 ({NAME}), the first GPU\n"),
        ) == (0, 1)
        assert read_manifest(tmp_path / "out").device == f"cuda {NAME}"
        shown = invoke("plan", source, *options).stdout
        assert f"device: cuda:0 ({NAME}); memory and time below are those of the CPU" in " ".join(
            shown.split()
        )
        refused = invoke(
            "run", source, tmp_path / "other", *options, "--workers", 2, "--device", "cuda"
        )
        assert "--workers 2: expected 1 with --device cuda:0" in refused.stderr
        assert not (tmp_path / "other").exists()
        assert (
            json.loads(invoke("plan", source, *options, "--device", "cpu", "--json").stdout)[
                "device"
            ]
            == "cpu"
        )
