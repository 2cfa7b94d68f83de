# SPDX-License-Identifier: Apache-2.0
"""Files of others: their code is never run, their pickles never opened, and what is wrong with
them is said by name."""

import builtins
import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from stored import edit_file
from tiny_models import SHORT_TEXT, save_tiny_model
from typer.testing import CliRunner, Result

from benchmarks.support.compressed_tensors_models import write_peer
from smoothrot_offline.cli import app
from smoothrot_offline.report.model import load_model
from smoothrot_offline.source.checkpoint import file_digest, open_checkpoint
from smoothrot_offline.source.models import load_config
from smoothrot_offline.source.tokenizers import load_tokenizer
from smoothrot_offline.transform.record import read_transform
from smoothrot_vllm.errors import (
    CheckpointError,
    ConfigError,
    SmoothRotError,
    UnsupportedModelError,
)
from smoothrot_vllm.format import TRANSFORM_NAME
from smoothrot_vllm.plugin.headers import check_shards

CANARY = "canary.Canary"
CANARY_CODE = (
    "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nclass Canary: pass\n"
)
POINTER = (
    "version https://git-lfs.github.com/spec/v1\noid sha256:4665a5ea423c2713d436b5ee\nsize 12345\n"
)
TEXT_OPTIONS = ("--calib", SHORT_TEXT, "--calib-samples", "2", "--calib-seqlen", "16")
Edit = Callable[[Path], object]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("saved") / "model", "llama")


@pytest.fixture
def source(saved: Path, tmp_path: Path) -> Path:
    """A whole model with code beside it, which the test may damage."""
    directory = shutil.copytree(saved, tmp_path / "model")
    (directory / "canary.py").write_text(CANARY_CODE)
    return directory


def invoke(*arguments: object) -> Result:
    """A command as a user calls it who answers every question with yes."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input="y\n" * 20)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def commands(source: Path) -> dict[str, tuple[object, ...]]:
    """Every command that reads a source."""
    out = source.parent / "out"
    return {
        "plan": ("plan", "--preset", "none", *TEXT_OPTIONS, source),
        "run": ("run", "--preset", "none", *TEXT_OPTIONS, source, out),
        "eval": ("eval", "--text", SHORT_TEXT, "--seqlen", 32, "--limit-chunks", 2, source),
        "analyze": ("analyze", *TEXT_OPTIONS, source, source.parent / "analysis"),
        "report": (
            "report",
            "--no-speed",
            "--text",
            SHORT_TEXT,
            "--seqlen",
            32,
            "--limit-chunks",
            2,
            source,
        ),
    }


def refusal(result: Result) -> str:
    """The message of a command that refused."""
    assert result.exit_code == 1, result.output
    assert "bug" not in result.stderr, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    return errors[0]


@pytest.mark.parametrize("command", ["plan", "run", "eval", "report"])
@pytest.mark.parametrize(
    "auto_map",
    [{"AutoTokenizer": [CANARY, CANARY]}, {"AutoTokenizer": [None, CANARY]}, [CANARY, None]],
)
def test_code_of_a_tokenizer_is_never_run_nor_asked_about(
    source: Path, command: str, auto_map: Any
) -> None:
    edit(source / "tokenizer_config.json", auto_map=auto_map)
    result = invoke(*commands(source)[command])
    assert not (source / "ran").exists()
    assert "Do you wish to run" not in result.output
    # transformers has a class of its own that reads tokenizer.json, as vLLM does.
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("command", ["plan", "run", "eval", "report"])
@pytest.mark.parametrize("model_type", ["llama", "own_model"])
def test_code_of_a_model_is_never_run_nor_asked_about(
    source: Path, command: str, model_type: str
) -> None:
    edit(
        source / "config.json",
        auto_map={"AutoConfig": CANARY, "AutoModelForCausalLM": CANARY},
        model_type=model_type,
    )
    result = invoke(*commands(source)[command])
    assert not (source / "ran").exists()
    assert "Do you wish to run" not in result.output
    if model_type == "own_model" or command in ("plan", "run"):
        assert "own Python code" in refusal(result)
    else:
        assert result.exit_code == 0, result.output


def test_code_of_a_family_that_transformers_has_too_is_never_run(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "model", "phi3")
    (source / "modeling_phi3.py").write_text(CANARY_CODE)
    edit(source / "config.json", auto_map={"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"})
    result = invoke(*commands(source)["run"], "--scales", "max")
    assert not (source / "ran").exists()
    assert "Do you wish to run" not in result.output
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    "key", ["attn_implementation", "_attn_implementation", "_experts_implementation"]
)
def test_kernels_of_a_hub_are_refused(source: Path, key: str) -> None:
    edit(source / "config.json", **{key: "some-org/some-kernel"})
    with pytest.raises(
        UnsupportedModelError,
        match=f"config.json: {key}: .*'some-org/some-kernel', code of a hub repository",
    ):
        load_model(source)


def test_pickles_are_never_opened(source: Path) -> None:
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(
        b"cos\nsystem\n(S'touch " + str(source / "ran").encode() + b"'\ntR."
    )
    for command in commands(source).values():
        assert "which can run code when opened" in refusal(invoke(*command))
    edit(source / "config.json", transformers_weights="pytorch_model.bin")
    with pytest.raises(SmoothRotError):
        load_model(source)
    assert not (source / "ran").exists()


def test_a_local_directory_is_read_without_the_network(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def refuse(*arguments: Any, **_: Any) -> Any:
        asked.append(arguments)
        raise OSError("there is no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(builtins, "input", refuse)
    for words in commands(source).values():
        assert invoke(*words).exit_code == 0
    out = source.parent / "out"
    check_shards(out)
    for check in ("verify", "inspect"):
        assert invoke(check, out).exit_code == 0
    assert (
        invoke("eval", "--text", SHORT_TEXT, "--seqlen", 32, "--limit-chunks", 2, out).exit_code
        == 0
    )
    assert asked == []


@pytest.mark.parametrize(
    "file",
    [
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    ],
)
@pytest.mark.parametrize("command", ["plan", "run", "eval"])
def test_git_lfs_pointers_are_named_with_the_remedy(source: Path, file: str, command: str) -> None:
    (source / file).write_text(POINTER)
    message = refusal(invoke(*commands(source)[command]))
    assert f"{source / file}: expected the file itself, got a Git LFS pointer" in message
    assert "git lfs pull" in message


def test_git_lfs_pointer_of_an_index_is_named(source: Path) -> None:
    (source / "model.safetensors").unlink()
    (source / "model.safetensors.index.json").write_text(POINTER)
    for read in (open_checkpoint, check_shards):
        with pytest.raises(CheckpointError, match="git lfs pull"):
            read(source)


@pytest.mark.parametrize("command", ["plan", "run", "eval"])
def test_a_tokenizer_of_another_version_is_named_before_any_work(
    source: Path, command: str
) -> None:
    content = json.loads((source / "tokenizer.json").read_text())
    content["model"]["type"] = "ModelOfTheFuture"
    (source / "tokenizer.json").write_text(json.dumps(content))
    message = refusal(invoke(*commands(source)[command]))
    assert f"{source / 'tokenizer.json'}: the installed tokenizers" in message
    assert "does not read it" in message
    assert list(source.parent.iterdir()) == [source]


@pytest.mark.parametrize("command", ["plan", "run", "eval"])
def test_a_missing_sentencepiece_is_named_before_any_work(
    source: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (source / file).unlink()
    (source / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    hide_package(monkeypatch, "sentencepiece")
    message = refusal(invoke(*commands(source)[command]))
    assert (
        "tokenizer.model needs the package sentencepiece, which is not installed: pip install"
        " sentencepiece" in message
    )
    assert list(source.parent.iterdir()) == [source]


def hide_package(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Make a package look as if it were not installed, to us and to transformers."""
    from importlib.util import find_spec

    from transformers.utils import import_utils

    real, really = find_spec, builtins.__import__

    def found(name: str, *arguments: Any) -> Any:
        return None if name == package else real(name, *arguments)

    def imported(name: str, *arguments: Any, **options: Any) -> Any:
        if name == package or name.startswith(f"{package}."):
            raise ModuleNotFoundError(f"No module named '{package}'")
        return really(name, *arguments, **options)

    monkeypatch.setattr("smoothrot_offline.source.tokenizers.find_spec", found)
    monkeypatch.setattr(import_utils, f"is_{package}_available", lambda *_: False)
    monkeypatch.setattr(builtins, "__import__", imported)


def test_a_directory_without_a_tokenizer_says_so(source: Path) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (source / file).unlink()
    assert "expected tokenizer.json or tokenizer.model, found neither" in refusal(
        invoke(*commands(source)["plan"])
    )


@pytest.mark.parametrize("place", ["vocab", "added_tokens"])
def test_token_ids_that_would_fill_the_memory_are_refused(source: Path, place: str) -> None:
    content = json.loads((source / "tokenizer.json").read_text())
    if place == "vocab":
        content["model"]["vocab"]["a"] = 2**31
    else:
        content["added_tokens"][0]["id"] = 2**31
    (source / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(
        CheckpointError, match=r"tokenizer\.json: expected token ids up to \d+, got 2147483648"
    ):
        load_tokenizer(source)


@pytest.mark.parametrize(
    ("method", "package"),
    [
        ("gptq", "pip install gptqmodel optimum"),
        ("awq", "pip install gptqmodel"),
        ("bitsandbytes", "pip install bitsandbytes"),
    ],
)
@pytest.mark.parametrize("command", ["eval", "report"])
def test_models_of_other_methods_name_the_package_that_runs_them(
    source: Path, command: str, method: str, package: str
) -> None:
    edit(
        source / "config.json",
        quantization_config={
            "quant_method": method,
            "bits": 4,
            "group_size": 32,
            "load_in_4bit": True,
        },
    )
    message = refusal(invoke(*commands(source)[command]))
    assert f"quant_method '{method}'" in message
    assert package in message


def test_an_unknown_quantization_method_is_not_taken_for_none(source: Path) -> None:
    edit(source / "config.json", quantization_config={"quant_method": "nonsense"})
    with pytest.raises(
        ConfigError, match="expected a method that transformers has, got 'nonsense'"
    ):
        load_model(source)


def test_compressed_tensors_are_evaluated_and_reported(source: Path, tmp_path: Path) -> None:
    peer = tmp_path / "peer"
    (source / "special_tokens_map.json").write_text("{}")
    write_peer(source, peer, "w4a16")
    result = invoke(
        "report",
        "--no-speed",
        "--text",
        SHORT_TEXT,
        "--seqlen",
        64,
        "--limit-chunks",
        4,
        "--json",
        source,
        peer,
    )
    assert result.exit_code == 0, result.output
    plain, other = json.loads(result.stdout)["directories"]
    assert (plain["kind"], other["kind"]) == ("plain", "compressed-tensors")
    assert other["size"]["sixteen_bit_bytes"] == plain["size"]["sixteen_bit_bytes"]
    perplexities = [
        record["perplexity"][SHORT_TEXT.name]["perplexity"] for record in (plain, other)
    ]
    assert perplexities[0] != perplexities[1]
    assert abs(perplexities[1] / perplexities[0] - 1) < 0.5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_labels": 10**9}, "num_labels: expected 0 to 65536"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: expected 0 to 65536"),
        ({"num_hidden_layers": -1}, "num_hidden_layers: expected 0 to 65536"),
        ({"num_hidden_layers": 5000}, "num_hidden_layers: expected at most 20"),
        ({"hidden_size": 10**10}, "hidden_size: expected at most"),
        ({"hidden_size": 32768}, "expected a model of at most 8 weights for each of"),
        ({"num_hidden_layers": 1}, "has no place in LlamaForCausalLM"),
        ({"num_attention_heads": 0}, "does not read it"),
        ({"model_type": "no-such-type"}, "does not read it"),
        ({"quantization_config": {"bits": 4}}, "expected an object with a quant_method"),
    ],
)
def test_configurations_that_do_not_fit_the_weights_are_refused(
    source: Path, changes: dict[str, Any], words: str
) -> None:
    edit(source / "config.json", **changes)
    with pytest.raises(SmoothRotError, match=words):
        load_model(source)


def test_a_model_with_an_adapter_inside_is_refused(source: Path) -> None:
    (source / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds a LoRA adapter"):
        load_model(source)


def test_an_endless_text_of_a_tokenizer_is_no_reason_to_refuse(source: Path) -> None:
    edit(source / "tokenizer_config.json", model_max_length=1000000000000000019884624838656)
    assert load_tokenizer(source)("a").input_ids
    assert load_config(source).model_type == "llama"


@pytest.mark.parametrize(
    "command", [("plan",), ("eval", "--text", SHORT_TEXT), ("verify",), ("inspect",), ("report",)]
)
def test_a_path_that_the_system_refuses_is_no_bug(
    tmp_path: Path, command: tuple[object, ...]
) -> None:
    assert "x" * 300 in refusal(invoke(*command, tmp_path / ("x" * 300)))


@pytest.mark.parametrize(
    ("command", "options", "words"),
    [
        ("eval", ("--seqlen", 2**63), "expected --seqlen >= 2"),
        ("eval", ("--limit-chunks", 2**63), "--limit-chunks >= 1"),
        ("run", ("--scales", "max", "--calib-samples", 2**63), "calib_samples"),
        (
            "run",
            ("--scales", "max", "--calib-samples", 2**31 - 1),
            "expected more memory than the system gives",
        ),
        ("report", ("--seqlen", 2**63), "seqlen"),
        (
            "analyze",
            ("--layers", "0-1000000000000"),
            "expected layers of the model, got 1000000000000",
        ),
    ],
)
def test_counts_beyond_what_torch_counts_are_refused(
    source: Path,
    command: str,
    options: tuple[object, ...],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object) -> None:
        raise RuntimeError(
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8000000000000 bytes"
        )

    monkeypatch.setattr("smoothrot_offline.source.text._draw_windows", full)
    assert words in refusal(invoke(*commands(source)[command], *options))


@pytest.fixture(scope="module")
def converted_once(saved: Path) -> Path:
    out = saved.with_name("converted")
    assert invoke("run", "--preset", "none", "--scales", "none", saved, out).exit_code == 0
    return out


@pytest.fixture
def converted(converted_once: Path, tmp_path: Path) -> Path:
    """A converted model that the test may damage."""
    return shutil.copytree(converted_once, tmp_path / "converted")


def test_an_index_of_nothing_is_refused(converted: Path) -> None:
    (converted / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(CheckpointError, match="expected an object weight_map from tensor names"):
        open_checkpoint(converted)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.float64])
def test_scales_of_another_dtype_are_a_problem_by_name(converted: Path, dtype: torch.dtype) -> None:
    name = "model.layers.0.mlp.up_proj.weight_scale"
    file = edit_file(
        converted, name, lambda tensors: tensors.update({name: tensors[name].to(dtype)})
    )
    result = invoke("verify", converted)
    assert result.exit_code == 1
    assert f"tensor {name} in {file.name}: expected torch.float32" in result.stderr
    assert "bug" not in result.stderr
    if dtype != torch.float64:
        assert f"tensor {name}: expected dtype" in refusal(invoke("inspect", converted))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors, norm: tensors.pop(norm), "is missing"),
        (
            lambda tensors, norm: tensors.update({norm: tensors[norm][:-1].clone()}),
            "expected finite floats of shape",
        ),
        (lambda tensors, norm: tensors[norm].fill_(torch.nan), "expected finite floats of shape"),
        (lambda tensors, norm: tensors.update(stranger=tensors[norm].clone()), "none by this name"),
    ],
)
def test_a_transform_of_another_form_is_refused_by_tensor(
    converted: Path, change: Callable[..., object], words: str
) -> None:
    path = converted / TRANSFORM_NAME
    tensors = load_file(path)
    change(tensors, "model.layers.0.input_layernorm.weight")
    save_file(tensors, path)
    config = json.loads((converted / "config.json").read_text())
    config["quantization_config"]["transform_sha256"] = file_digest(path)
    (converted / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=words):
        read_transform(converted)
