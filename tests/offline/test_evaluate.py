# SPDX-License-Identifier: Apache-2.0
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from smoothrot_offline.device import CPU
from smoothrot_offline.report.evaluate import evaluate_perplexity, windows
from smoothrot_offline.source.text import load_calibration, read_text
from smoothrot_vllm.errors import CheckpointError, ConfigError

WORDS = [f"w{i}" for i in range(60)]
TEXT = " ".join(WORDS[(i * i + 3 * i) % 60] for i in range(101))
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def save_tokenizer(directory: Path, add_bos: bool) -> None:
    vocabulary = {"<unk>": 0, "<bos>": 1, "<eos>": 2} | {
        word: 3 + i for i, word in enumerate(WORDS)
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 1)]
        )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(directory)


def save_model(directory: Path, add_bos: bool = False, family: str = "llama") -> Path:
    torch.manual_seed(0)
    if family == "llama":
        LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(directory)
    else:
        Gemma3ForCausalLM(Gemma3TextConfig(**SIZES)).save_pretrained(directory)
    save_tokenizer(directory, add_bos)
    return directory


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT)
    return file


def test_perplexity_is_that_of_the_windows_one_by_one(model_dir: Path, text_file: Path) -> None:
    result = evaluate_perplexity(model_dir, text_file, seqlen=32)
    assert (result.chunks, result.tokens) == (4, 31 * 3 + 4)
    model = LlamaForCausalLM.from_pretrained(model_dir)
    ids = torch.tensor([3 + WORDS.index(word) for word in TEXT.split()])
    nll = 0.0
    for window in ids.split(32):
        log_probabilities = model(window[None]).logits[0].double().log_softmax(-1)
        nll -= sum(log_probabilities[i, token].item() for i, token in enumerate(window[1:]))
    assert result.perplexity == pytest.approx(math.exp(nll / result.tokens), rel=1e-5)


def test_limit_takes_the_first_windows_only(model_dir: Path, text_file: Path) -> None:
    limited = evaluate_perplexity(model_dir, text_file, seqlen=32, limit_chunks=2)
    assert (limited.chunks, limited.tokens) == (2, 62)
    assert limited.nll != evaluate_perplexity(model_dir, text_file, seqlen=32).nll


def test_tokenizer_that_adds_bos_adds_it_once(
    tmp_path: Path, text_file: Path, model_dir: Path
) -> None:
    result = evaluate_perplexity(save_model(tmp_path, add_bos=True), text_file, seqlen=32)
    assert (result.chunks, result.tokens, result.bos_in_each_chunk) == (4, 31 * 3 + 5, False)


def test_gemma_gets_bos_in_each_window(tmp_path: Path, text_file: Path) -> None:
    result = evaluate_perplexity(save_model(tmp_path, family="gemma3"), text_file, seqlen=32)
    assert (result.chunks, result.tokens, result.bos_in_each_chunk) == (4, 101, True)


@pytest.mark.parametrize(
    ("count", "lengths"), [(64, [32, 32]), (65, [32, 32]), (66, [32, 32, 2]), (1, []), (0, [])]
)
def test_windows_keep_every_tail_that_predicts_a_token(count: int, lengths: list[int]) -> None:
    assert [len(w) for w in windows(torch.arange(count), 32)] == lengths


@pytest.mark.parametrize("options", [{"seqlen": 1}, {"limit_chunks": 0}])
def test_options_out_of_range_are_refused(
    model_dir: Path, text_file: Path, options: dict[str, int]
) -> None:
    with pytest.raises(ConfigError, match="--seqlen >= 2"):
        evaluate_perplexity(model_dir, text_file, **options)


def test_text_of_one_token_is_refused(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("w1")
    with pytest.raises(ConfigError, match="at least 2 tokens"):
        evaluate_perplexity(model_dir, tmp_path / "short.txt")


def test_directory_without_tokenizer_is_refused(tmp_path: Path, text_file: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="tokenizer"):
        evaluate_perplexity(tmp_path, text_file)


def test_jsonl_documents_are_joined_and_line_ends_kept(tmp_path: Path) -> None:
    file = tmp_path / "docs.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in ("one\u2028two", "three")))
    assert read_text(file) == "one\u2028two three"
    (tmp_path / "crlf.txt").write_bytes(b"one\r\ntwo\n")
    assert read_text(tmp_path / "crlf.txt") == "one\r\ntwo\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\xfe", "expected UTF-8, got byte 0xff at position 0"),
        (b'{"body": "x"}', "line 1: .*'text'.*got keys body"),
        (b"[1]", "line 1: .*'text'.*got list"),
        (b"not json", "line 1: expected a JSON object"),
    ],
)
def test_unreadable_text_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"bad\.jsonl: {words}"):
        read_text(file)


def test_calibration_windows_are_runs_of_the_text_and_depend_on_the_seed(
    model_dir: Path, text_file: Path
) -> None:
    drawn = load_calibration(str(text_file), model_dir, samples=16, seqlen=10, seed=3)
    assert (drawn.shape, drawn.dtype) == ((16, 10), torch.int64)
    runs = {tuple(3 + WORDS.index(w) for w in TEXT.split()[i : i + 10]) for i in range(92)}
    assert {tuple(row.tolist()) for row in drawn} <= runs
    assert torch.equal(drawn, load_calibration(str(text_file), model_dir, 16, 10, seed=3))
    assert not torch.equal(drawn, load_calibration(str(text_file), model_dir, 16, 10, seed=4))


def test_calibration_windows_start_with_the_bos_that_the_tokenizer_adds(
    tmp_path: Path, text_file: Path
) -> None:
    drawn = load_calibration(
        str(text_file), save_model(tmp_path, add_bos=True), samples=8, seqlen=10, seed=0
    )
    assert (drawn[:, 0] == 1).all()
    assert (drawn[:, 1:] > 2).all()


def test_text_shorter_than_a_window_is_refused_but_one_window_is_enough(
    model_dir: Path, text_file: Path
) -> None:
    assert load_calibration(str(text_file), model_dir, 2, 101, seed=0).shape == (2, 101)
    with pytest.raises(ConfigError, match="at least 102 tokens for one window, got 101"):
        load_calibration(str(text_file), model_dir, 2, 102, seed=0)


def test_held_out_windows_are_of_the_end_that_no_other_touches(
    model_dir: Path, tmp_path: Path
) -> None:
    words = torch.randint(3, 63, (101,), generator=torch.Generator().manual_seed(0)).tolist()
    text_file = tmp_path / "text.txt"
    text_file.write_text(" ".join(WORDS[word - 3] for word in words))
    drawn = load_calibration(str(text_file), model_dir, 60, 10, 3, CPU, 20)
    begins = [i for row in drawn.tolist() for i in range(92) if words[i : i + 10] == row]
    assert len(begins) == len(drawn) == 80
    assert max(begins[:60]) + 10 <= min(begins[60:])
    assert len(set(begins[60:])) > 1
    assert load_calibration(str(text_file), model_dir, 1, 50, 0, CPU, 1).shape == (2, 50)
    wanted = "at least 102 tokens for one window and another that is held out, got 101"
    with pytest.raises(ConfigError, match=wanted):
        load_calibration(str(text_file), model_dir, 1, 51, 0, CPU, 1)


def test_generated_text_starts_at_bos_fills_windows_and_repeats_for_a_seed(model_dir: Path) -> None:
    state = torch.random.get_rng_state()
    drawn = load_calibration("generated", model_dir, samples=40, seqlen=12, seed=5)
    assert drawn.shape == (40, 12)
    assert (drawn[:, 0] == 1).all()
    assert len({tuple(row.tolist()) for row in drawn}) == 40
    assert torch.equal(drawn, load_calibration("generated", model_dir, 40, 12, seed=5))
    assert not torch.equal(drawn, load_calibration("generated", model_dir, 40, 12, seed=6))
    assert torch.equal(state, torch.random.get_rng_state())


def test_missing_file_and_unreachable_dataset_are_refused(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="there is no such file"):
        load_calibration("/nowhere/at all.txt", model_dir, 2, 8, seed=0)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ConfigError, match="pip install datasets"):
        load_calibration("owner/name", model_dir, 2, 8, seed=0)


def test_dataset_of_the_hub_is_read_as_far_as_needed(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    rows = ({"text": TEXT} for _ in range(1000))
    asked = []

    def load_dataset(*args: object, **options: object) -> Iterator[dict[str, str]]:
        asked.append((args, options))
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_calibration("owner/name:part", model_dir, 4, 25, seed=0).shape == (4, 25)
    assert asked == [(("owner/name", "part"), {"split": "train", "streaming": True})]
    assert sum(1 for _ in rows) == 998  # 2 of 1000 documents were enough for twice 4 x 25 tokens
