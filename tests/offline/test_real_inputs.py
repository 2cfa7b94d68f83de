# SPDX-License-Identifier: Apache-2.0
"""Sources, outputs and calibration data as people have them: converted with the right result, or
refused before any work."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import COMMAND, run_forked
from safetensors.torch import load_file, save_file
from stored import load_weights
from tiny_models import byte_tokenizer
from transformers import PreTrainedModel
from typer.testing import CliRunner, Result

from smoothrot_offline.check.admit import admit
from smoothrot_offline.check.plan import plan_conversion
from smoothrot_offline.check.verify import verify
from smoothrot_offline.cli import app
from smoothrot_offline.config import make_config
from smoothrot_offline.convert import convert
from smoothrot_offline.output.directory import OutputDirectory
from smoothrot_offline.presets import choose_preset
from smoothrot_offline.source.checkpoint import open_checkpoint
from smoothrot_offline.source.headers import side_files
from smoothrot_offline.source.resolve import resolve
from smoothrot_offline.source.text import load_calibration, read_text, start_token
from smoothrot_vllm.errors import ConfigError, SmoothRotError, UnsupportedModelError

MakeModel = Callable[..., Path]
WEIGHTS = "model.safetensors"
PLAIN = make_config(scales="none")
EMBEDDING = "model.embed_tokens.weight"
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(
    directory: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> None:
    tensors = change(load_file(directory / WEIGHTS))
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        directory / WEIGHTS,
        metadata={"format": "pt"},
    )


def assert_same_output(one: Path, other: Path) -> None:
    first, second = load_weights(one), load_weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def chatty(make_model: MakeModel) -> Path:
    """A model with a tokenizer of bytes that has a chat template."""
    source = make_model(vocab_size=264)
    byte_tokenizer().save_pretrained(source)
    return source


def _prefixed(prefix: str) -> Callable[[Path], None]:
    return lambda source: edit_weights(
        source, lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}
    )


def _base_model(source: Path) -> None:
    edit_weights(
        source,
        lambda tensors: {name.removeprefix("model."): tensor for name, tensor in tensors.items()},
    )


def _shard_without_index(source: Path) -> None:
    (source / WEIGHTS).rename(source / "model-00001-of-00001.safetensors")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_prefixed("_orig_mod."), "'_orig_mod.' is stripped"),
        (
            _prefixed("module._orig_mod."),
            "'module.' is stripped from them; the prefix '_orig_mod.'",
        ),
        (_base_model, "'model.' is put before them"),
        (_shard_without_index, None),
    ],
)
def test_layouts_of_tensors_convert_to_the_same_bytes(
    make_model: MakeModel, tmp_path: Path, change: Callable[[Path], None], named: str | None
) -> None:
    source = make_model(tie_word_embeddings=True)
    # With text that the model writes: it is run as transformers runs it, too.
    config = make_config(scales="max", calib_samples=2, calib_seqlen=8)
    convert(source, tmp_path / "plain", config)
    change(source)
    plan = plan_conversion(open_checkpoint(source), config)
    assert plan.refusals == []
    assert [note for note in plan.notes if named is not None and named in note] or named is None
    convert(source, tmp_path / "out", config)
    assert_same_output(tmp_path / "plain", tmp_path / "out")
    assert EMBEDDING in load_weights(tmp_path / "out")


def test_two_unindexed_files_with_one_tensor_are_refused(make_model: MakeModel) -> None:
    source = make_model()
    _shard_without_index(source)
    save_file({EMBEDDING: torch.zeros(96, 72)}, source / "stale.safetensors")
    with pytest.raises(SmoothRotError, match=rf"{EMBEDDING} is in more than one of .*stale"):
        open_checkpoint(source)


@pytest.mark.parametrize("changes", [{"architectures": ["LlamaModel"]}, {}])
def test_embedding_model_without_a_head_is_refused_as_one(
    make_model: MakeModel, changes: dict[str, Any]
) -> None:
    source = make_model()
    edit_weights(
        source,
        lambda tensors: {
            name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"
        },
    )
    _base_model(source)
    edit_config(source, **changes)
    with pytest.raises(SmoothRotError, match="embedding model"):
        admit(open_checkpoint(source), PLAIN)


def test_float64_source_converts_to_bfloat16_codes_of_its_values(
    make_model: MakeModel, tmp_path: Path
) -> None:
    source = make_model()
    convert(source, tmp_path / "plain", PLAIN)
    edit_weights(
        source, lambda tensors: {name: tensor.double() for name, tensor in tensors.items()}
    )
    convert(source, tmp_path / "out", PLAIN)
    assert_same_output(tmp_path / "plain", tmp_path / "out")
    assert verify(tmp_path / "out").ok


@pytest.mark.parametrize(
    ("auto_map", "served"),
    [
        (
            {
                "AutoConfig": "microsoft/Phi-3-mini-4k-instruct--configuration_phi3.Phi3Config",
                "AutoModelForCausalLM": (
                    "microsoft/Phi-3-mini-4k-instruct--modeling_phi3.Phi3ForCausalLM"
                ),
            },
            True,
        ),
        ({"AutoTokenizer": ["tokenization_x.X", None]}, True),
        ({"AutoModelForCausalLM": "someone/else--modeling_x.Phi3ForCausalLM"}, False),
        ({"AutoConfig": "configuration_x.Phi3Config"}, False),
    ],
)
def test_code_of_the_hub_that_transformers_has_itself_is_replaced(
    build_model: Callable[..., PreTrainedModel], auto_map: dict[str, Any], served: bool
) -> None:
    config = build_model("phi3").config.to_dict() | {"architectures": None, "auto_map": auto_map}
    if served:
        assert resolve(config).layers == 3
        return
    with pytest.raises(UnsupportedModelError, match="own Python code"):
        resolve(config)


def test_empty_directory_is_filled_in_place_as_a_mount_point_must_be(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = make_model(), tmp_path / "out"
    out.mkdir()
    (out / "lost+found").mkdir()
    inode = out.stat().st_ino
    convert(source, tmp_path / "other", PLAIN)
    monkeypatch.setattr(Path, "rename", _no_directory(Path.rename))

    def interrupted(_message: str, done: int, _total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, out, PLAIN, interrupted)
    assert not (out / "config.json").exists(), "nothing takes it for a model"
    assert convert(source, out, PLAIN).resumed_layers == 1
    assert out.stat().st_ino == inode
    assert verify(out).ok
    assert {path.name for path in out.iterdir()} - {"lost+found"} == {
        path.name for path in (tmp_path / "other").iterdir()
    }
    assert_same_output(tmp_path / "other", out)


def _no_directory(rename: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
    def strict(self: Path, target: Path) -> Path:
        assert not self.is_dir(), "a directory cannot be renamed to a mount point"
        return rename(self, target)

    return strict


def test_failure_in_an_empty_directory_leaves_it_empty(
    make_model: MakeModel, tmp_path: Path
) -> None:
    source, out = make_model(), tmp_path / "out"
    out.mkdir()
    edit_weights(
        source,
        lambda tensors: tensors | {"model.norm.weight": tensors["model.norm.weight"] * math.nan},
    )
    with pytest.raises(SmoothRotError, match="NaN"):
        convert(source, out, PLAIN)
    assert list(out.iterdir()) == []


def test_output_that_is_not_resumed_goes_into_an_empty_directory_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "rename", _no_directory(Path.rename))
    with OutputDirectory(tmp_path) as directory:
        directory.write_text("report.html", "page")
        directory.commit()
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_link_to_a_directory_is_followed(make_model: MakeModel, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    convert(make_model(), tmp_path / "out", PLAIN)
    assert (tmp_path / "out").is_symlink()
    assert verify(tmp_path / "disk").ok


def test_root_as_output_is_refused_by_name(make_model: MakeModel) -> None:
    result = invoke("run", make_model(), "/", "--preset", "none", "--scales", "none")
    assert result.exit_code == 1
    assert "error: /: expected no such path or an empty directory" in result.stderr
    assert "bug" not in result.stderr


def test_both_spellings_of_the_dtype_say_what_the_output_has(
    make_model: MakeModel, tmp_path: Path
) -> None:
    source = make_model(dtype=torch.float32)
    edit_config(source, dtype="float32", torch_dtype="float32")
    convert(source, tmp_path / "out", PLAIN)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["dtype"], config["torch_dtype"]) == ("bfloat16", "bfloat16")
    assert verify(tmp_path / "out").ok
    assert invoke("inspect", tmp_path / "out").exit_code == 0


def test_text_is_generated_from_a_list_of_ends_of_text(
    make_model: MakeModel, tmp_path: Path
) -> None:
    source = make_model("qwen2")
    edit_config(source, bos_token_id=None, eos_token_id=[7, 2])
    tokens = load_calibration("generated", source, 2, 8, 0)
    assert tokens[:, 0].tolist() == [7, 7]
    convert(source, tmp_path / "out", make_config(scales="max", calib_samples=2, calib_seqlen=8))
    assert verify(tmp_path / "out").ok


def test_text_is_generated_from_what_the_chat_template_begins_with(chatty: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(chatty)
    edit_config(chatty, bos_token_id=None, eos_token_id=None)
    spec = resolve(json.loads((chatty / "config.json").read_text()))
    assert start_token(spec.config, chatty) == tokenizer.convert_tokens_to_ids("<|user|>")


@pytest.mark.parametrize("key", ["bos_token_id", "eos_token_id"])
def test_start_token_outside_the_vocabulary_is_refused_by_plan(
    make_model: MakeModel, key: str
) -> None:
    source = make_model("qwen2")
    edit_config(source, **{"bos_token_id": None, "eos_token_id": None} | {key: 96})
    plan = plan_conversion(open_checkpoint(source), make_config(scales="max", calib_seqlen=8))
    assert len(plan.refusals) == 1
    assert f"{key}: expected a token of a vocabulary of 96, got 96" in plan.refusals[0]


@pytest.mark.parametrize("rounding", ["rtn", "gptq", "gptaq"])
def test_linears_of_zeros_convert_and_verify(
    make_model: MakeModel, tmp_path: Path, rounding: str
) -> None:
    source = make_model()
    linears = ("self_attn.o_proj", "mlp.down_proj", "mlp.up_proj", "self_attn.v_proj")
    zeros = [f"model.layers.1.{linear}.weight" for linear in linears]
    row = "model.layers.0.mlp.gate_proj.weight"

    def zero(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors[row][3] = 0
        return tensors | {name: torch.zeros_like(tensors[name]) for name in zeros}

    edit_weights(source, zero)
    options = (
        "--rounding",
        rounding,
        "--scales",
        "search",
        "--clip-search",
        "--calib-samples",
        "2",
        "--calib-seqlen",
        "8",
    )
    done = invoke("run", source, tmp_path / "out", "--preset", "none", "--smooth-norms", *options)
    assert done.exit_code == 0, done.stderr
    stored = load_weights(tmp_path / "out")
    assert all(
        bool(tensor.isfinite().all()) for tensor in stored.values() if tensor.is_floating_point()
    )
    checked = invoke("verify", tmp_path / "out", "--source", source)
    assert checked.exit_code == 0, checked.stderr


def test_linears_of_zeros_are_analyzed(make_model: MakeModel, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    source = make_model()
    zeros = [
        f"model.layers.1.{linear}.weight"
        for linear in ("self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
    ]
    edit_weights(
        source, lambda tensors: tensors | {name: torch.zeros_like(tensors[name]) for name in zeros}
    )
    done = invoke(
        "analyze", source, tmp_path / "analysis", "--calib-samples", 1, "--calib-seqlen", 16
    )
    assert done.exit_code == 0, done.stderr
    found = json.loads((tmp_path / "analysis/analysis.json").read_text())
    assert found["layers"][1]["inputs"]["down_proj"]["peak"]["magnitude"] == 0


def test_chats_are_rendered_by_the_chat_template(tmp_path: Path, chatty: Path) -> None:
    tokenizer = byte_tokenizer()
    expected = tokenizer.apply_chat_template(CHAT, tokenize=False)
    share_gpt = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    file = tmp_path / "chats.jsonl"
    file.write_text(
        "\n".join(json.dumps(line) for line in ({"messages": CHAT}, {"conversations": share_gpt}))
    )
    assert expected == "<|user|>Hi<|end|><|assistant|>Hello<|end|>"
    assert read_text(file, tokenizer) == 2 * expected
    convert(
        chatty,
        tmp_path / "out",
        make_config(scales="max", calib=str(file), calib_samples=2, calib_seqlen=8),
    )
    assert verify(tmp_path / "out").ok


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"messages": CHAT}, "expected a model with a chat template"),
        (
            {"messages": []},
            (
                "expected an object with a 'text', or with a list of messages or conversations; got"
                " keys messages"
            ),
        ),
        ({"prompt": "x"}, "got keys prompt"),
    ],
)
def test_chats_that_cannot_be_rendered_are_refused_by_plan(
    tmp_path: Path, chatty: Path, line: dict[str, Any], words: str
) -> None:
    (chatty / "chat_template.jinja").unlink()
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps(line))
    plan = plan_conversion(open_checkpoint(chatty), make_config(calib=str(file), calib_seqlen=8))
    assert len(plan.refusals) == 1
    assert "line 1: " in plan.refusals[0]
    assert words in plan.refusals[0]


def test_calibration_file_that_is_not_utf8_is_one_short_line(tmp_path: Path, chatty: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(b"nez \xe9 " * 100_000)
    result = invoke(
        "run", chatty, tmp_path / "out", "--preset", "none", "--calib", file, "--calib-seqlen", 8
    )
    assert result.exit_code == 1
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert "expected UTF-8, got byte 0xe9 at position 4" in error
    assert len(error) < 300


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda source, text: text.write_text("abc"), "at least 8 tokens"),
        (lambda source, text: (source / "tokenizer.json").unlink(), "tokenizer"),
        (
            lambda source, text: edit_config(source, max_position_embeddings=4),
            "context of 4 tokens",
        ),
        (lambda source, text: text.unlink(), "there is no such file"),
    ],
)
def test_plan_and_run_refuse_calibration_alike_and_before_any_work(
    tmp_path: Path,
    chatty: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Path, Path], object],
    words: str,
) -> None:
    text = tmp_path / "some text.txt"
    text.write_text("a long enough text of bytes")
    config = make_config(calib=str(text), calib_seqlen=8)
    assert plan_conversion(open_checkpoint(chatty), config).refusals == []
    damage(chatty, text)
    monkeypatch.setattr(
        "smoothrot_offline.convert.conversion_identity",
        lambda *_: pytest.fail("the source was hashed"),
    )
    (refusal,) = plan_conversion(open_checkpoint(chatty), config).refusals
    assert words in refusal
    with pytest.raises(SmoothRotError) as caught:
        convert(chatty, tmp_path / "out", config)
    assert str(caught.value) == refusal


def test_plan_refuses_a_tied_head_that_differs(make_model: MakeModel) -> None:
    source = make_model(tie_word_embeddings=True)
    edit_weights(source, lambda tensors: tensors | {"lm_head.weight": tensors[EMBEDDING] * 2})
    (refusal,) = plan_conversion(open_checkpoint(source), PLAIN).refusals
    assert "lm_head.weight differs from model.embed_tokens.weight" in refusal


def test_plan_of_a_refused_model_is_the_reason_alone(make_model: MakeModel) -> None:
    source = make_model()
    edit_config(source, hidden_act="gelu")
    result = invoke("plan", source)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert all(line.startswith("error: ") for line in result.stderr.splitlines() if line)
    facts = json.loads(invoke("plan", source, "--json").stdout)
    assert "hidden_act" in facts["refusals"][0]
    assert "preset" not in facts


def test_every_side_file_is_copied_and_what_is_left_is_said(
    make_model: MakeModel, tmp_path: Path
) -> None:
    source = make_model()
    copied = [
        "additional_chat_templates/tool_use.jinja",
        "preprocessor_config.json",
        "processor_config.json",
        "spiece.model",
        "vocab.bpe",
        "LICENSE.md",
    ]
    left = {"modeling_x.py": "code", "training_args.bin": "pickle", "model.gguf": "weights"}
    for name in [
        *copied,
        *left,
        ".gitattributes",
        ".cache/x.json",
        "onnx/model.onnx",
        "onnx/tokenizer.json",
    ]:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(name)
    found = side_files(source)
    assert found.left == left | {"onnx/": "a model of its own"}
    assert {str(file) for file in found.copied} == {*copied, "generation_config.json"}
    convert(source, tmp_path / "out", PLAIN)
    assert [(tmp_path / "out" / name).read_text() for name in copied] == copied
    assert not any(
        (tmp_path / "out" / name).exists() for name in [*left, ".gitattributes", ".cache", "onnx"]
    )
    assert verify(tmp_path / "out").ok
    (tmp_path / "out" / copied[0]).write_text("changed")
    assert any(copied[0] in problem for problem in verify(tmp_path / "out").problems)
    (note,) = admit(open_checkpoint(source), PLAIN).notes
    assert "not copied: " in note
    assert "modeling_x.py (code)" in note


def test_output_inside_the_source_does_not_copy_itself(make_model: MakeModel) -> None:
    source = make_model()
    convert(source, source / "first", PLAIN)
    convert(source, source / "second", PLAIN)
    assert {path.name for path in (source / "first").iterdir()} == {
        path.name for path in (source / "second").iterdir()
    }


def test_plan_says_the_fall_to_channels_and_small_hadamard_blocks(make_model: MakeModel) -> None:
    sizes: dict[str, Any] = {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 8}
    fits = open_checkpoint(make_model(name="fits", intermediate_size=512, **sizes))
    assert choose_preset("fast", {}, fits).notes == ()
    assert plan_conversion(fits, choose_preset("fast", {}, fits).config).notes == []
    source = make_model(intermediate_size=2 * 641, **sizes)
    facts = json.loads(
        invoke("plan", source, "--preset", "fast", "--calib-seqlen", 64, "--json").stdout
    )
    assert facts["refusals"] == []
    assert facts["config"]["group_size"] == -1
    fall, blocks = facts["notes"]
    assert (
        "fall from groups of 128 to one scale for each output channel: mlp.down_proj: 1282 inputs"
        in fall
    )
    assert "R4: 1282 channels are rotated in 641 blocks of 2" in blocks
    shown = invoke("plan", source, "--preset", "fast", "--calib-seqlen", 64).stdout
    assert f"note: {fall}\n" in shown, "not wrapped in a pipe"
    assert "FLOP" not in shown


def test_log_has_a_line_for_each_stage_with_the_total_and_the_time_left(
    make_model: MakeModel, tmp_path: Path
) -> None:
    source = make_model()
    out = tmp_path / ("a long name of a directory " * 5)
    options = ["--calib-samples", "2", "--calib-seqlen", "8"]
    done = run_forked(COMMAND, "run", source, out, "--preset", "none", *options)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if " steps, " in line]
    assert lines[0].startswith("0 of ")
    total = lines[0].split()[2]
    assert lines[0].endswith(": source digests")
    for stage in ("studying layer 2 of 3", "layer 1 of 3", "layer 3 of 3", "head and files"):
        (line,) = [line for line in lines if line.endswith(f": {stage}")]
        assert f" of {total} steps" in line
        assert " left: " in line
    assert lines[-1].endswith(": done")
    assert done.stdout.startswith(f"{out}: "), "a path is not split"
    assert "Loading weights" not in done.stderr
    assert "━" not in done.stderr


def test_refusal_in_a_log_leaves_no_bar(tmp_path: Path, chatty: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("x")
    failed = run_forked(COMMAND, "eval", chatty, "--text", text, "--device", "cpu")
    assert failed.returncode == 1
    (error,) = failed.stderr.splitlines()[1:]
    assert error.startswith(f"error: {text}: expected at least 2 tokens")


def test_evaluation_counts_each_window_up_to_the_last(tmp_path: Path, chatty: Path) -> None:
    from smoothrot_offline.report.evaluate import measure_perplexity, text_windows
    from smoothrot_offline.report.model import load_model

    text = tmp_path / "text.txt"
    text.write_text("some text of bytes")
    seen: list[tuple[int, int]] = []
    measure_perplexity(
        load_model(chatty),
        text_windows(chatty, text, seqlen=8),
        lambda _message, done, total: seen.append((done, total)),
    )
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_refusal_by_name_imports_neither_torch_nor_transformers(make_model: MakeModel) -> None:
    source = make_model()
    edit_config(source, model_type="gpt2", architectures=["GPT2LMHeadModel"])
    code = (
        "import sys\nfrom smoothrot_offline.cli import app\ntry:\n    app(['plan',"
        " sys.argv[1]])\nexcept SystemExit as end:\n    assert end.code == 1\nassert not {'torch',"
        " 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(source)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "GPT2LMHeadModel (model_type 'gpt2') is not supported" in done.stderr


@pytest.mark.parametrize("value", ["x" * 5000, None, [[["deep"]]]])
def test_wrong_types_in_the_configuration_are_typed_errors(
    make_model: MakeModel, value: object
) -> None:
    source = make_model()
    edit_config(source, bos_token_id=value, quantization_config=None)
    result = invoke("plan", source, "--preset", "none", "--calib-seqlen", 8)
    assert "bug" not in result.stderr


def test_calibration_option_that_is_neither_file_nor_id_is_refused_by_plan(chatty: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such file"):
        admit(
            open_checkpoint(chatty), make_config(calib=f"no such{os.sep}file here", calib_seqlen=8)
        )
