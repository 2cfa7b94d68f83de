# SPDX-License-Identifier: Apache-2.0
"""What vLLM's engine arguments and requests do to a converted model: the reference's answers, or a
refusal by name.

docs/compat.md has a row for each argument.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_forward import SAFE_MARGIN, STARTS, Reference
from stored import edit_file, file_of, in_one_file, load_weights
from transformers import AutoTokenizer

pytestmark = [pytest.mark.serve, pytest.mark.timeout(900)]

CONVERSION = ("--activation-bits", "8", "--lm-head-bits", "8")
TOKENS = 6
ENGINE = Path(__file__).with_name("engine_in_process.py")
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}
ROPE = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
DOWN = "model.layers.1.mlp.down_proj"
UP = "model.layers.0.mlp.up_proj"


@dataclass
class Case:
    """A model (``converted``, ``source`` and so on, see :func:`models`), arguments, and what is
    done with the engine."""

    model: str = "converted"
    use: str = "tokens"
    arguments: dict[str, Any] = field(default_factory=dict)


# Each gives what the reference gives.
SAME_TOKENS: dict[str, dict[str, Any]] = {
    # Of these none may change an answer.
    "loaded otherwise, scheduled in pieces": {
        "load_format": "safetensors",
        "safetensors_load_strategy": "eager",
        "cpu_offload_gb": 0.1,
        "linear_backend": "torch",
        "enable_chunked_prefill": True,
        "max_num_batched_tokens": 48,
        "max_num_seqs": 3,
        "block_size": 32,
        "enable_prefix_caching": False,
        "scheduling_policy": "priority",
        "async_scheduling": False,
        "seed": 3,
    },
    "load format hf, safetensors prefetched": {
        "load_format": "hf",
        "safetensors_load_strategy": "prefetch",
    },
    "transformers' model code": {"model_impl": "transformers"},
    "KV cache kept in files": {
        "kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"},
    },
    "drafts of a draft model": {
        "speculative_config": {
            "method": "draft_model",
            "model": "source",
            "num_speculative_tokens": 3,
        },
    },
    # The last: vLLM 0.32 makes no second engine in a process that had one with this.
    "drafts of n-grams": {
        "speculative_config": {
            "method": "ngram",
            "num_speculative_tokens": 3,
            "prompt_lookup_max": 3,
        },
    },
}
RESIDUAL = "is rotated, and the final norm's weight lies in the output head"
DRAFTS = {
    "medusa": {"method": "medusa", "model": "medusa", "num_speculative_tokens": 1},
    "EAGLE": {"method": "eagle", "model": "eagle", "num_speculative_tokens": 1},
    "EAGLE-3": {"method": "eagle3", "model": "eagle3", "num_speculative_tokens": 1},
    "hidden states": {
        "method": "extract_hidden_states",
        "num_speculative_tokens": 1,
        "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": [0, 1]}},
    },
}
REFUSED: dict[str, tuple[Case, str]] = {
    "embeddings": (
        Case(arguments={"runner": "pooling", "convert": "embed"}),
        f"ConfigError: --runner pooling: .*{RESIDUAL}",
    ),
    "embeddings, 16-bit head": (
        Case("head16", arguments={"runner": "pooling", "convert": "embed"}),
        f"ConfigError: --runner pooling: .*{RESIDUAL}",
    ),
    "classification": (
        Case(arguments={"runner": "pooling", "convert": "classify"}),
        "ConfigError: --runner pooling: .*convert classify",
    ),
    "prompt embeddings": (
        Case(arguments={"enable_prompt_embeds": True}),
        f"ConfigError: --enable-prompt-embeds: .*{RESIDUAL}",
    ),
    **{
        f"drafts of {name}": (
            Case(arguments={"speculative_config": draft}),
            (
                rf"ConfigError: --speculative-config: .*got {draft['method']}: this method reads"
                r" hidden states"
            ),
        )
        for name, draft in DRAFTS.items()
    },
    "hidden states to a connector": (
        Case(
            arguments={
                "kv_transfer_config": {
                    "kv_connector": "ExampleHiddenStatesConnector",
                    "kv_role": "kv_producer",
                }
            }
        ),
        "ConfigError: --kv-transfer-config: .*got ExampleHiddenStatesConnector",
    ),
    **{
        f"load format {name}": (
            Case(arguments={"load_format": name}),
            f"ConfigError: --load-format: .*got {name}: ",
        )
        for name in ("sharded_state", "runai_streamer_sharded", "mistral", "pt", "npcache")
    },
    **{
        f"load format {name}": (
            Case(arguments={"load_format": name}),
            f"ValueError: Load format `{name}` is not supported",
        )
        for name in ("bitsandbytes", "gguf")
    },
    "files left out": (
        Case(arguments={"ignore_patterns": "*00001*"}),
        r"ConfigError: --ignore-patterns: .*got \*00001\*",
    ),
    "a head that is tied": (
        Case("head16", arguments={"hf_overrides": {"tie_word_embeddings": True}}),
        "ConfigError: --hf-overrides: .*got tie_word_embeddings",
    ),
    "another model's configuration": (
        Case(arguments={"hf_config_path": "clipped"}),
        "ConfigError: --hf-config-path: ",
    ),
    "quantized once more": (
        Case(arguments={"quantization_config": {"linear": {"weight": "fp8_per_tensor_dynamic"}}}),
        "ConfigError: --quantization-config: ",
    ),
    **{
        f"KV cache in {name}": (
            Case(arguments={"kv_cache_dtype": name}),
            f"ConfigError: --kv-cache-dtype: .*got {name}: ",
        )
        for name in ("int4_per_token_head", "bfloat16", "turboquant_4bit_nc")
    },
    "weights sent by a trainer": (
        Case(arguments={"weight_transfer_config": {"backend": "nccl"}}),
        "ConfigError: --weight-transfer-config: ",
    ),
    "longer than the source": (
        Case(arguments={"max_model_len": 1024}),
        r"ValidationError: .*User-specified max_model_len \(1024\) is greater",
    ),
    "sleep": (
        Case(arguments={"enable_sleep_mode": True}),
        "ValidationError: .*Sleep mode is not supported",
    ),
    **{
        name: (Case(name), message)
        for name, message in {
            "truncated shard": (
                r"model-0000\d-of-00004\.safetensors: expected a whole safetensors file"
            ),
            "unknown format version": (r"quantization_config\.format_version: expected 2, got 99"),
            "missing codes": (
                rf"model-0000\d-of-00004\.safetensors: expected tensor {UP}\.weight_packed"
            ),
            "missing norm": (
                r"model-00004-of-00004\.safetensors: expected tensor model\.norm\.weight"
            ),
        }.items()
    },
    "the method for a 16-bit model": (
        Case("source", arguments={"quantization": "smoothrot"}),
        "--quantization smoothrot: expected a converted model",
    ),
}


def edited(source: Path, out: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """A copy with other tensors, whose index lists them."""
    shutil.copytree(source, out)
    tensors = load_weights(out)
    edit(tensors)
    in_one_file(out, tensors)
    (out / "smoothrot_manifest.json").unlink()
    return out


def with_config(source: Path, out: Path, **changes: Any) -> Path:
    """A copy with other values in config.json."""
    shutil.copytree(source, out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | changes))
    return out


def truncated(source: Path, out: Path) -> Path:
    """A copy whose weights are cut in half."""
    shutil.copytree(source, out)
    file = file_of(out, f"{UP}.weight_packed")
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    return out


def lacking(source: Path, out: Path, name: str) -> Path:
    """A copy whose index and manifest list a tensor that the file lacks."""
    shutil.copytree(source, out)
    edit_file(out, name, lambda tensors: tensors.pop(name))
    return out


def swap_layers(tensors: dict[str, torch.Tensor]) -> None:
    first, second = (f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1))
    for suffix in ("_packed", "_scale"):
        tensors[first + suffix], tensors[second + suffix] = (
            tensors[second + suffix],
            tensors[first + suffix],
        )


def drop_linear(tensors: dict[str, torch.Tensor]) -> None:
    for suffix in ("_packed", "_scale"):
        del tensors[f"{DOWN}.weight{suffix}"]


@pytest.fixture(scope="module")
def models(
    tiny_converted: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Directories by the names that cases call them."""
    folder = tmp_path_factory.mktemp("models")
    converted = tiny_converted("llama", *CONVERSION)
    quantization = json.loads((converted / "config.json").read_text())["quantization_config"]
    source = converted.parent / "source"
    gemma = tiny_converted("gemma3", *CONVERSION)
    online = tiny_converted("llama", *CONVERSION, "--weight-bits", "8", "--residual", "online")
    llama = {
        "model_type": "llama",
        "hidden_size": 128,
        "vocab_size": 261,
        "num_attention_heads": 4,
        "num_hidden_layers": 1,
    }
    drafts: dict[str, dict[str, Any]] = {
        "eagle": llama | {"architectures": ["EagleLlamaForCausalLM"], "intermediate_size": 192},
        "eagle3": (
            llama
            | {
                "architectures": ["LlamaForCausalLMEagle3"],
                "intermediate_size": 192,
                "draft_vocab_size": 261,
            }
        ),
        "medusa": {"model_type": "medusa", "hidden_size": 128, "vocab_size": 261, "num_heads": 1},
    }
    for name, config in drafts.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
    return {
        "converted": converted,
        "source": source,
        "head16": tiny_converted("llama", "--activation-bits", "8"),
        "online": online,
        "gemma": gemma,
        "gemma source": gemma.parent / "source",
        "stretched": with_config(converted, folder / "stretched", rope_parameters=ROPE),
        "swapped": edited(converted, folder / "swapped", swap_layers),
        "without a scale": edited(
            converted, folder / "lacks", lambda tensors: tensors.pop(f"{DOWN}.weight_scale")
        ),
        "without a linear": edited(converted, folder / "lacks more", drop_linear),
        "clipped": with_config(
            converted,
            folder / "clipped",
            quantization_config=quantization | {"activations": {"bits": 8, "clip": 0.5}},
        ),
        "truncated shard": truncated(converted, folder / "truncated"),
        "unknown format version": with_config(
            converted,
            folder / "version",
            quantization_config=quantization | {"format_version": 99},
        ),
        "missing codes": lacking(converted, folder / "codes", f"{UP}.weight_packed"),
        "missing norm": lacking(converted, folder / "norm", "model.norm.weight"),
        "sharded": folder / "sharded",
        **{name: folder / name for name in drafts},
    }


@pytest.fixture(scope="module")
def prompts(models: dict[str, Path]) -> list[list[int]]:
    """Some whose continuation is no close call, the first longer than a step of the scheduler
    takes."""
    tokenizer, reference = (
        AutoTokenizer.from_pretrained(models["converted"]),
        Reference(models["converted"]),
    )
    short = (tokenizer(f"{start} {number}").input_ids for number in range(20) for start in STARTS)
    long = (tokenizer(f"{start} " * 8).input_ids[:100] for start in STARTS)
    chosen = [
        list(
            islice(
                (prompt for prompt in some if reference.greedy(prompt, TOKENS).is_determined), count
            )
        )
        for some, count in ((long, 1), (short, 4))
    ]
    assert [len(some) for some in chosen] == [
        1,
        4,
    ], "too few prompts without a close call: choose others"
    return chosen[0] + chosen[1]


def cases(
    models: dict[str, Path], prompts: list[list[int]], kept: Path
) -> dict[str, tuple[Case, Any]]:
    """Every engine that is made, and what its prompts are."""
    pooled = {"runner": "pooling", "convert": "embed"}
    embedded = {"source": str(models["gemma source"]), "scale": 160**0.5, "prompts": prompts[1:]}
    plain = {"source": str(models["source"]), "scale": 1.0, "prompts": prompts[1:]}
    names = ["swapped", "converted", "clipped", "source", "without a scale"]
    reloaded = {"prompts": prompts, "directories": {name: str(models[name]) for name in names}}
    left = reloaded | {"directories": {"without a linear": str(models["without a linear"])}}
    first: dict[str, tuple[Case, Any]] = {
        "requests": (Case(use="requests"), prompts[1:]),
        "twice": (
            Case(
                use="twice",
                arguments={
                    "enable_prefix_caching": True,
                    "override_generation_config": {"temperature": 0.5, "top_p": 0.25},
                },
            ),
            prompts,
        ),
        "stretched": (
            Case(arguments={"hf_overrides": {"rope_parameters": ROPE}, "max_model_len": 1024}),
            prompts,
        ),
        "reloads": (Case(use="reloads"), reloaded),
        "reload of less": (Case(use="reloads"), left),
        "saved": (Case(use="saved_sharded"), str(models["sharded"])),
        "made up": (Case(arguments={"load_format": "dummy"}), prompts),
        "the draft is converted": (
            Case(
                "source",
                arguments={
                    "speculative_config": {
                        "method": "draft_model",
                        "model": str(models["converted"]),
                        "num_speculative_tokens": 3,
                    }
                },
            ),
            prompts,
        ),
        "source": (Case("source"), prompts),
        "gemma, embeddings": (Case("gemma", "embeddings", pooled), prompts),
        "gemma source, embeddings": (Case("gemma source", "embeddings", pooled), prompts),
        "online, embeddings": (Case("online", "embeddings", pooled), prompts),
        "source, embeddings": (Case("source", "embeddings", pooled), prompts),
        "online, prompt embeddings": (
            Case("online", "embedded_prompts", {"enable_prompt_embeds": True}),
            plain,
        ),
        "gemma, prompt embeddings": (
            Case("gemma", "embedded_prompts", {"enable_prompt_embeds": True}),
            embedded,
        ),
        **{
            name: (Case(use="first_logprobs", arguments={"max_logprobs": -1, **arguments}), prompts)
            for name, arguments in ROUNDED.items()
        },
    }
    same = {name: (Case(arguments=arguments), prompts) for name, arguments in SAME_TOKENS.items()}
    same["KV cache kept in files"][0].arguments["kv_transfer_config"][
        "kv_connector_extra_config"
    ] = {"shared_storage_path": str(kept)}
    return first | {name: (case, prompts) for name, (case, _) in REFUSED.items()} | same


ROUNDED = {
    "half": {"dtype": "float16"},
    "bfloat16": {"dtype": "bfloat16"},
    "KV cache in fp8": {"kv_cache_dtype": "fp8"},
}


@pytest.fixture(scope="module")
def results(
    models: dict[str, Path], prompts: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """What came of each case: see the engine's script."""
    folder = tmp_path_factory.mktemp("results")
    models["sharded"].mkdir()
    given = {
        name: {
            "model": str(models[case.model]),
            "use": case.use,
            "arguments": placed(case.arguments, models),
            "data": data,
        }
        for name, (case, data) in cases(models, prompts, folder).items()
    }
    command = [sys.executable, str(ENGINE), str(folder / "results.json")]
    done = subprocess.run(
        command,
        input=json.dumps(given),
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        timeout=850,
    )
    assert (folder / "results.json").exists(), done.stdout[-2000:] + done.stderr[-4000:]
    found: dict[str, dict[str, Any]] = json.loads((folder / "results.json").read_text())
    return found


def placed(arguments: dict[str, Any], models: dict[str, Path]) -> dict[str, Any]:
    """Arguments with directories in place of their names."""
    if (other := arguments.get("hf_config_path")) is not None:
        return arguments | {"hf_config_path": str(models[other])}
    draft = arguments.get("speculative_config", {})
    if draft.get("model") not in models:
        return arguments
    return arguments | {"speculative_config": draft | {"model": str(models[draft["model"]])}}


def found(results: dict[str, dict[str, Any]], name: str) -> Any:
    """What a case that must work gave."""
    assert "found" in results[name], results[name]["error"]
    return results[name]["found"]


@pytest.fixture(scope="module")
def reference(models: dict[str, Path]) -> Reference:
    return Reference(models["converted"])


@pytest.fixture(scope="module")
def expected(reference: Reference, prompts: list[list[int]]) -> list[list[int]]:
    return [reference.greedy(prompt, TOKENS).tokens for prompt in prompts]


@torch.inference_mode()
def logprobs_of(reference: Reference, sequence: list[int]) -> torch.Tensor:
    """Log-probabilities ``(length, vocabulary)`` of what follows each token."""
    found: torch.Tensor = (
        reference.model(torch.tensor([sequence])).logits[0].float().log_softmax(-1)
    )
    return found


@pytest.mark.parametrize("name", SAME_TOKENS)
def test_arguments_that_change_no_answer(
    results: dict[str, dict[str, Any]], expected: list[list[int]], name: str
) -> None:
    assert found(results, name) == expected


@pytest.mark.parametrize("name", REFUSED)
def test_arguments_that_are_refused(results: dict[str, dict[str, Any]], name: str) -> None:
    assert "error" in results[name], results[name]["found"]
    assert re.search(REFUSED[name][1], results[name]["error"], re.DOTALL), results[name]["error"]


def test_prompts_that_the_prefix_cache_knows_are_continued_alike(
    results: dict[str, dict[str, Any]], expected: list[list[int]]
) -> None:
    assert found(results, "twice")["tokens"] == expected


def test_sampling_defaults_are_the_overridden_ones(results: dict[str, dict[str, Any]]) -> None:
    assert found(results, "twice")["default"] == {"temperature": 0.5, "top_p": 0.25}


def test_overridden_rope_and_length_give_what_that_configuration_gives(
    results: dict[str, dict[str, Any]],
    models: dict[str, Path],
    prompts: list[list[int]],
    expected: list[list[int]],
) -> None:
    stretched = Reference(models["stretched"])
    compared = 0
    for prompt, tokens in zip(prompts, found(results, "stretched"), strict=True):
        if (greedy := stretched.greedy(prompt, TOKENS)).is_determined:
            assert tokens == greedy.tokens
            compared += 1
    assert compared >= 2
    assert found(results, "stretched") != expected


def test_made_up_weights_need_no_checkpoint(
    results: dict[str, dict[str, Any]], expected: list[list[int]]
) -> None:
    assert [len(tokens) for tokens in found(results, "made up")] == [TOKENS] * len(expected)
    assert found(results, "made up") != expected


def test_a_converted_draft_changes_no_answer_of_the_source(
    results: dict[str, dict[str, Any]],
) -> None:
    assert found(results, "the draft is converted") == found(results, "source")


def test_sampled_tokens_have_the_logprobs_of_the_reference(
    results: dict[str, dict[str, Any]], reference: Reference, prompts: list[list[int]]
) -> None:
    differences = []
    for prompt, samples in zip(prompts[1:], found(results, "requests")["sampled"], strict=True):
        assert len({tuple(sample["tokens"]) for sample in samples}) > 1
        for sample in samples:
            scores = logprobs_of(reference, prompt + sample["tokens"])[len(prompt) - 1 : -1]
            wanted = scores.gather(1, torch.tensor(sample["tokens"])[:, None])[:, 0]
            differences.append((wanted - torch.tensor(sample["logprobs"])).abs())
    assert torch.cat(differences).median() < 1e-5
    assert torch.cat(differences).max() < SAFE_MARGIN


def test_prompt_logprobs_are_those_of_the_reference(
    results: dict[str, dict[str, Any]], reference: Reference, prompts: list[list[int]]
) -> None:
    differences = []
    for prompt, logprobs in zip(
        prompts[1:], found(results, "requests")["prompt_logprobs"], strict=True
    ):
        wanted = logprobs_of(reference, prompt)[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[
            :, 0
        ]
        differences.append((wanted - torch.tensor(logprobs)).abs())
    assert torch.cat(differences).median() < 1e-5
    assert torch.cat(differences).max() < SAFE_MARGIN


def test_beam_search_finds_the_beams_of_the_reference(
    results: dict[str, dict[str, Any]], reference: Reference, prompts: list[list[int]]
) -> None:
    for prompt, tokens in zip(prompts[1:], found(results, "requests")["beams"], strict=True):
        beams: list[tuple[float, list[int]]] = [(0.0, [])]
        for _ in range(3):
            scores = [
                (score, beam, logprobs_of(reference, prompt + beam)[-1].topk(6))
                for score, beam in beams
            ]
            longer = [
                (s + float(v), [*b, int(t)])
                for s, b, top in scores
                for v, t in zip(*top, strict=True)
            ]
            beams = sorted(longer, reverse=True)[:3]
        assert tokens == beams[0][1]


def test_structured_output_takes_the_likelier_choice(
    results: dict[str, dict[str, Any]],
    models: dict[str, Path],
    reference: Reference,
    prompts: list[list[int]],
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models["converted"])
    (yes,), (no,) = (tokenizer(letter).input_ids for letter in "yn")
    scores = [logprobs_of(reference, prompt)[-1] for prompt in prompts[1:]]
    assert found(results, "requests")["chosen"] == [
        "yes" if score[yes] > score[no] else "no" for score in scores
    ]


@pytest.mark.parametrize("name", ROUNDED)
def test_coarser_arithmetic_stays_near_the_reference(
    results: dict[str, dict[str, Any]], reference: Reference, prompts: list[list[int]], name: str
) -> None:
    if "requires x86 with AVX-512" in (error := results[name].get("error", "")):
        pytest.skip(f"vLLM on this CPU: {error}")
    for prompt, step in zip(prompts, found(results, name), strict=True):
        wanted = logprobs_of(reference, [*prompt, step["first"]])[-1]
        # In probability, of 1: half and bfloat16 give 0.02, an 8-bit cache 0.06.
        assert (wanted.exp() - torch.tensor(step["logprobs"]).exp()).abs().sum() / 2 < 0.1


def test_reloaded_weights_answer_as_theirs_or_not_at_all(
    results: dict[str, dict[str, Any]],
    models: dict[str, Path],
    prompts: list[list[int]],
    expected: list[list[int]],
) -> None:
    after = found(results, "reloads")
    assert after[""] == after["converted"] == expected
    # Of other weights for the same prompts, fewer tokens are no close call.
    swapped = Reference(models["swapped"])
    firsts = [swapped.greedy(prompt, 2) for prompt in prompts]
    compared = [
        (got[:2], wanted.tokens)
        for got, wanted in zip(after["swapped"], firsts, strict=True)
        if wanted.is_determined
    ]
    assert len(compared) >= 2
    assert all(got == wanted for got, wanted in compared)
    assert after["swapped"] != expected
    # Refused before anything is touched: the server goes on.
    assert re.search(
        r"^ConfigError: reload_weights: .*quantization_config\.activations: expected .*clip=1\.0",
        after["clipped"],
    )
    assert re.search(
        "^ConfigError: reload_weights: .*expected quant_method .smoothrot., got None",
        after["source"],
    )
    assert after["clipped, after"] == after["source, after"] == expected
    assert re.search(
        rf"^CheckpointError: .*none named {DOWN}\.weight_scale \(1 missing\)",
        after["without a scale"],
    )
    assert "weights were not wholly loaded again" in after["without a scale, after"]


def test_a_reload_that_leaves_a_layer_as_it_was_is_refused(
    results: dict[str, dict[str, Any]],
) -> None:
    after = found(results, "reload of less")
    assert re.search(
        rf"^CheckpointError: reload_weights: .*got none of {DOWN} \(1 missing\)",
        after["without a linear"],
    )
    assert "weights were not wholly loaded again" in after["without a linear, after"]


def test_a_servers_own_copy_is_refused_where_it_is_loaded(
    results: dict[str, dict[str, Any]],
) -> None:
    assert found(results, "saved") == ["model-rank-0-part-0.safetensors"]
    assert (
        "--load-format: not with this converted model, got sharded_state"
        in results["load format sharded_state"]["error"]
    )


@pytest.mark.parametrize(
    ("ours", "source", "least"),
    [("gemma", "gemma source", 0.9), ("online", "source", 0.99)],
    ids=["gemma", "online"],
)
def test_models_with_the_sources_residual_stream_give_its_embeddings(
    results: dict[str, dict[str, Any]], ours: str, source: str, least: float
) -> None:
    got, wanted = (torch.tensor(found(results, f"{name}, embeddings")) for name in (ours, source))
    assert torch.nn.functional.cosine_similarity(got, wanted).min() > least


@pytest.mark.parametrize("model", ["gemma", "online"])
def test_models_with_the_sources_residual_stream_take_its_embeddings(
    results: dict[str, dict[str, Any]], model: str
) -> None:
    answers = found(results, f"{model}, prompt embeddings")
    assert answers["embeds"] == answers["tokens"]
