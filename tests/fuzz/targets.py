# SPDX-License-Identifier: Apache-2.0
"""What is fuzzed: each way by which a file of others enters the product, with the files it
starts from."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mutations
import torch
from packers import (
    awq,
    awq_config,
    compressed,
    compressed_config,
    compressed_fp8,
    compressed_fp8_config,
    gptq,
    gptq_config,
    pack_linears,
    pack_mxfp4,
)
from safetensors.torch import save_file
from tiny_models import FAMILIES, OWN_SIZES, byte_tokenizer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from smoothrot_offline.check.inspect import inspect, open_converted
from smoothrot_offline.check.verify import verify
from smoothrot_offline.cli import app
from smoothrot_offline.config import make_config, make_schema
from smoothrot_offline.convert import convert
from smoothrot_offline.output.directory import JOURNAL_NAME, ResumableDirectory, write_part
from smoothrot_offline.output.journal import Journal
from smoothrot_offline.report.model import SmoothRotHfConfig, load_model
from smoothrot_offline.source.checkpoint import check_source, file_digest, open_checkpoint
from smoothrot_offline.source.resolve import SUPPORTED, resolve
from smoothrot_offline.source.text import adds_bos, family_needs_bos, read_text, tokenize
from smoothrot_offline.source.tokenizers import load_tokenizer
from smoothrot_offline.transform.draft import convert_head
from smoothrot_offline.transform.lora import convert_adapter
from smoothrot_offline.transform.record import read_transform
from smoothrot_vllm.errors import SmoothRotError
from smoothrot_vllm.format import TRANSFORM_NAME, check_tensor_parallel, parse_schema
from smoothrot_vllm.plugin.headers import check_adapter, check_shards

SIZES: dict[str, Any] = {
    "vocab_size": len(byte_tokenizer()),
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 0,
}
SERVED_SIZES = {
    **{
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    **{"num_key_value_heads": 2, "max_position_embeddings": 512},
}
"""What the other families of tiny_models have sizes of their own for."""
CANARY_CODE = (
    "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nclass Canary: pass\n"
)
IDENTITY: dict[str, dict[str, Any]] = {
    "source": {"config.json": "0" * 64},
    "options": {"seed": 0},
    "machine": {"workers": 1},
}
OPTIONS = make_config(scales="none", lm_head_bits=8, group_size=32)
PACKED = {
    "gptq": (gptq_config(group_size=8), gptq(group_size=8, symmetric=True, ordered=True)),
    "awq": (awq_config(8), awq(8)),
    "compressed": (compressed_config(4, 8, False), compressed(4, 8, False)),
    "fp8": (compressed_fp8_config("channel"), compressed_fp8("channel")),
}
"""What sources with packed weights say of them, and what makes those, by folder."""
Files = dict[str, bytes]


class BugReported(Exception):
    """A command answered a file with the message for errors of its own."""


def prepare(root: Path) -> None:
    """Make the files that every target starts from: a source, its conversion, an adapter, a
    journal, texts."""
    torch.manual_seed(0)
    root.mkdir()
    source = root / "source"
    model = AutoModelForCausalLM.from_config(FAMILIES["llama"](**SIZES))
    model.bfloat16().save_pretrained(source, max_shard_size="20KB")
    byte_tokenizer().save_pretrained(source)
    (source / "special_tokens_map.json").write_text(
        '{"bos_token": "<|begin|>", "eos_token": {"content": "<|end|>"}}'
    )
    (source / "canary.py").write_text(CANARY_CODE)
    # What opening this as a pickle would do.
    (source / "pytorch_model.bin").write_bytes(
        b"cos\nsystem\n(S'touch " + str(source / "ran").encode() + b"'\ntR."
    )
    for folder, packing in PACKED.items():
        shutil.copytree(source, root / folder, ignore=shutil.ignore_patterns("canary.py"))
        pack_linears(root / folder, *packing)
    mixture = FAMILIES["mixtral"](**SIZES | {"num_local_experts": 2, "num_hidden_layers": 2})
    experts = AutoModelForCausalLM.from_config(mixture).bfloat16()
    experts.save_pretrained(root / "fused", save_original_format=False, max_shard_size="20KB")
    mixture = FAMILIES["gpt_oss"](**SIZES | OWN_SIZES["gpt_oss"] | {"num_local_experts": 2})
    experts = AutoModelForCausalLM.from_config(mixture).bfloat16()
    experts.save_pretrained(root / "mxfp4", max_shard_size="20KB")
    pack_mxfp4(root / "mxfp4")
    convert(source, root / "converted", OPTIONS)
    shutil.copy(source / "canary.py", root / "converted")
    (root / "configs").mkdir()
    for family, kind in FAMILIES.items():
        architecture = SUPPORTED[kind.model_type].class_name
        config = kind(
            **SIZES | SERVED_SIZES | OWN_SIZES.get(family, {}), architectures=[architecture]
        )
        config.to_json_file(root / f"configs/{family}.json")
    shutil.copy(root / "configs/llama.json", root / "configs/config.json")
    (root / "schema").mkdir()
    schema = json.loads((root / "converted/config.json").read_text())["quantization_config"]
    schema["overrides"] = {
        "model.layers.0.mlp.up_proj": {
            "weights": {"bits": 8},
            "activations": {"bits": 8, "clip": 1.0},
        }
    }
    (root / "schema/config.json").write_text(json.dumps({"quantization_config": schema}))
    (root / "adapter").mkdir()
    prefix = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    factors = {f"{prefix}A.weight": torch.ones(2, 32), f"{prefix}B.weight": torch.ones(32, 2)}
    save_file(factors, root / "adapter/adapter_model.safetensors")
    (root / "adapter/adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]})
    )
    (root / "head").mkdir()
    tensors = {"fc.weight": torch.ones(32, 64), "layers.0.mlp.up_proj.weight": torch.ones(96, 32)}
    save_file(tensors, root / "head/model.safetensors")
    shutil.copy(source / "config.json", root / "head")
    (root / "texts").mkdir()
    (root / "texts/plain.txt").write_text(
        "Some text of the kind that models read.\nAnd é 漢字.\n" * 3
    )
    (root / "texts/lines.jsonl").write_text('{"text": "one"}\n\n{"text": "two é"}\n')
    _journal(root / "out.partial", (root / "converted/smoothrot_manifest.json").read_bytes())


def _journal(folder: Path, manifest: bytes) -> None:
    record = json.loads(manifest)["layers"][0]
    folder.mkdir()
    part = write_part(folder, 1, 3, {"a": torch.ones(2)})
    save_file({"tokens": torch.ones(1, 2)}, folder / "resume-decisions.safetensors")
    kept = {
        "file": "resume-decisions.safetensors",
        "sha256": file_digest(folder / "resume-decisions.safetensors"),
    }
    study: dict[str, Any] = {"smoothing": None, "clips": {}, "sensitivity": {}, "experts": []}
    facts = {
        "seed": 0,
        "studies": [study],
        "learned": None,
        "schema": parse_schema({"format_version": 2}).model_dump(),
    }
    entries = [
        {"identity": IDENTITY},
        {"decisions": {**facts, "sign_losses": {}}, **kept},
        {
            "tensors": {name: tensor.model_dump() for name, tensor in part.items()},
            "layer": record,
            "hidden": kept,
        },
    ]
    (folder / JOURNAL_NAME).write_text("".join(json.dumps(entry) + "\n" for entry in entries))


@dataclass
class Target:
    """One kind of input.

    ``share`` is the part of all inputs that it gets: its own speed decides. ``folder`` holds what
    it starts from, ``make`` draws the files of a case from that, ``run`` reads them from a folder;
    only errors of the project's own may come out.
    """

    name: str
    share: float
    folder: str
    make: Callable[[Files, random.Random], Files]
    run: Callable[[Path], None]
    originals: Files = field(default_factory=dict)

    def load(self, root: Path) -> Path:
        """The folder, its files read."""
        folder = root / self.folder
        self.originals = {
            file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.is_file()
        }
        return folder


def _one_of(*patterns: str, hostile: bool = True) -> Callable[[Files, random.Random], Files]:
    """A case that changes one of the files of some patterns."""

    matching: dict[tuple[str, ...], list[list[str]]] = {}

    def make(originals: Files, rng: random.Random) -> Files:
        names = tuple(originals)
        if names not in matching:
            matching[names] = [
                [name for name in names if Path(name).match(pattern)] for pattern in patterns
            ]
        name = rng.choice(rng.choice(matching[names]))
        return {name: _edited(name, originals[name], rng, hostile)}

    return make


def _any_family(originals: Files, rng: random.Random) -> Files:
    """A changed configuration of one of the families."""
    return {
        "config.json": mutations.edited_json(
            originals[rng.choice(list(originals))], rng, hostile=True
        )
    }


def _edited(name: str, data: bytes, rng: random.Random, hostile: bool) -> bytes:
    if name.endswith((".safetensors", ".st")):
        return mutations.edited_safetensors(data, rng)
    if name.endswith(".json"):
        return mutations.edited_json(data, rng, hostile)
    if name.endswith(".jsonl"):
        lines = data.splitlines(keepends=True)
        at = rng.randrange(len(lines))
        if rng.randrange(4) and lines[at].strip():
            lines[at] = mutations.edited_json(lines[at], rng) + b"\n"
            return b"".join(lines)
    return mutations.edited_bytes(data, rng)


def _quietly(*calls: Callable[[], object]) -> None:
    """Each of them, whatever the others refuse."""
    refusals = []
    for call in calls:
        try:
            call()
        except SmoothRotError as error:
            refusals.append(error)
    if refusals:
        raise refusals[0]


def _config_of(folder: Path) -> Any:
    # As vLLM and transformers hand it over: through Python's json, without the door.
    content = json.loads((folder / "config.json").read_bytes())
    return content.get("quantization_config") if isinstance(content, dict) else None


def run_schema(folder: Path) -> None:
    try:
        config = _config_of(folder)
    except (ValueError, RecursionError):
        return
    if isinstance(config, dict):
        schema = parse_schema(config)
        schema.scheme("model.layers.0.mlp.up_proj")
        check_tensor_parallel(schema, 2)


def run_plugin(folder: Path) -> None:
    from smoothrot_vllm.plugin.quant_config import SmoothRotConfig

    try:
        config = _config_of(folder)
    except (ValueError, RecursionError):
        return
    if isinstance(config, dict):
        config.pop("quant_method", None)
        _quietly(
            lambda: SmoothRotHfConfig(**{str(key): value for key, value in config.items()}),
            lambda: SmoothRotConfig.from_config(config).maybe_update_config(str(folder)),
        )


def run_model_config(folder: Path) -> None:
    try:
        content = json.loads((folder / "config.json").read_bytes())
    except (ValueError, RecursionError):
        return
    if isinstance(content, dict):
        spec = resolve(content, ["mtp."])
        make_schema(spec, OPTIONS)
        spec.source_tensors()


def run_source(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    check_source(
        checkpoint, resolve(checkpoint.config).source_tensors(), ignorable=["lm_head.weight"]
    )
    checkpoint.load(checkpoint.tensors)


def run_converted(folder: Path) -> None:
    _quietly(
        lambda: check_shards(folder),
        lambda: open_converted(folder),
        lambda: inspect(folder),
        lambda: verify(folder),
    )


def run_transform(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_bytes())
    config["quantization_config"]["transform_sha256"] = file_digest(folder / TRANSFORM_NAME)
    (folder / "config.json").write_text(json.dumps(config))
    try:
        read_transform(folder)
    finally:
        _restore(TRANSFORM, folder, "config.json")


def run_adapter(folder: Path) -> None:
    with _whole_or_none(folder, "adapter_config.json", "adapter_model.safetensors") as out:
        _quietly(
            lambda: check_adapter(folder, "0" * 64),
            lambda: convert_adapter(folder, out, folder.with_name("converted")),
        )


def run_head(folder: Path) -> None:
    with _whole_or_none(folder, "config.json", "model.safetensors") as out:
        convert_head(folder, out, folder.with_name("converted"))


@contextmanager
def _whole_or_none(folder: Path, *files: str) -> Iterator[Path]:
    """Where an output of these files is made; nothing else is left behind."""
    out = folder.with_name(f"{folder.name}-out")
    try:
        yield out
    finally:
        left = [path.name for path in folder.parent.iterdir() if path.name.startswith(out.name)]
        if out.is_dir():
            assert sorted(file.name for file in out.iterdir()) == list(files)
            shutil.rmtree(out)
            left.remove(out.name)
        assert not left, f"half an output: {left}"


def run_journal(folder: Path) -> None:
    stranger = folder.with_name("stranger")
    stranger.write_text("not the conversion's")
    spec = resolve({"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SIZES})
    with ResumableDirectory(folder.with_name("out")) as directory:
        directory.resumed = True
        journal = Journal(directory, IDENTITY, 3)
        journal.load_hidden()
        if journal.decided:
            journal.load_decisions(spec, OPTIONS)
    assert stranger.exists(), "a journal removed a file outside its folder"


def run_texts(folder: Path) -> None:
    _quietly(*(lambda file=file: read_text(file) for file in sorted(folder.iterdir())))


def run_tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    tokenize(tokenizer, "Some text, é 漢字 <|end|>", special_tokens=True)
    adds_bos(tokenizer)
    family_needs_bos(folder)


def run_load(folder: Path) -> None:
    load_model(folder, torch.float32)(torch.tensor([[1, 2, 3]]))


def run_commands(folder: Path) -> None:
    """The commands that read a directory, as a user calls them."""
    root = folder.parent
    commands = (
        [
            "plan",
            "--preset",
            "fast",
            "--calib",
            str(root / "texts/plain.txt"),
            "--json",
            str(folder),
        ],
        [
            "eval",
            "--text",
            str(root / "texts/plain.txt"),
            "--seqlen",
            "16",
            "--limit-chunks",
            "1",
            "--json",
            str(folder),
        ],
        ["verify", "--json", str(folder)],
        ["inspect", str(folder)],
        [
            "report",
            "--no-speed",
            "--text",
            str(root / "texts/plain.txt"),
            "--seqlen",
            "32",
            "--json",
            str(folder),
        ],
    )
    for command in commands:
        result = CliRunner().invoke(app, command)
        if (
            "bug" in result.stderr
            or result.exit_code not in (0, 1)
            or not isinstance(result.exception, SystemExit | None)
        ):
            raise BugReported(
                f"{command}: {result.exit_code}: {result.stderr[-600:]} {result.exception!r}"
            ) from result.exception


def _restore(target: Target, folder: Path, name: str) -> None:
    (folder / name).write_bytes(target.originals[name])


SOURCE_FILES = ("config.json", "*.index.json", "*.safetensors")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "config.json",
)
CONVERTED_FILES = ("config.json", "*.index.json", "*.safetensors", "smoothrot_manifest.json")
TRANSFORM = Target("transform", 0.005, "converted", _one_of("*.st"), run_transform)
TARGETS = (
    Target(
        "quantization_config", 0.54, "schema", _one_of("config.json", hostile=False), run_schema
    ),
    Target("plugin", 0.02, "converted", _one_of("config.json", hostile=False), run_plugin),
    Target("model_config", 0.08, "configs", _any_family, run_model_config),
    Target("source", 0.01, "source", _one_of(*SOURCE_FILES), run_source),
    *(
        Target(f"source_{folder}", 0.01, folder, _one_of(*SOURCE_FILES), run_source)
        for folder in (*PACKED, "fused", "mxfp4")
    ),
    Target("converted", 0.01, "converted", _one_of(*CONVERTED_FILES), run_converted),
    TRANSFORM,
    Target("adapter", 0.01, "adapter", _one_of("*.json", "*.safetensors"), run_adapter),
    Target("draft_head", 0.01, "head", _one_of("*.json", "*.safetensors"), run_head),
    Target(
        "journal", 0.02, "out.partial", _one_of("*.jsonl", "*.jsonl", "*.safetensors"), run_journal
    ),
    Target("calibration_text", 0.2587, "texts", _one_of("*.txt", "*.jsonl"), run_texts),
    Target("tokenizer", 0.004, "source", _one_of(*TOKENIZER_FILES), run_tokenizer),
    Target(
        "load_source", 0.002, "source", _one_of(*SOURCE_FILES, "generation_config.json"), run_load
    ),
    Target("load_converted", 0.0009, "converted", _one_of(*CONVERTED_FILES), run_load),
    Target(
        "commands_source", 0.0002, "source", _one_of(*SOURCE_FILES, *TOKENIZER_FILES), run_commands
    ),
    Target("commands_converted", 0.0002, "converted", _one_of(*CONVERTED_FILES), run_commands),
)
