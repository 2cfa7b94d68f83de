# SPDX-License-Identifier: Apache-2.0
"""Calibration tokens: from a text file, from text the model writes itself, or from a hub data set."""

import re
from pathlib import Path

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from smoothrot_offline.checkpoint import Checkpoint, fetch_side_files
from smoothrot_offline.device import CPU
from smoothrot_offline.foreign_models import foreign_errors, load_config
from smoothrot_offline.foreign_tokenizers import load_tokenizer
from smoothrot_offline.model import load_model
from smoothrot_vllm.errors import ConfigError
from smoothrot_vllm.foreign_files import parse_json

GENERATED = "generated"
_GENERATION_BATCH = 32
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
# Families trained with <bos> before every text that fall apart without it; exported tokenizers do not always add it.
_BOS_FAMILIES = ("gemma",)


def check_text(checkpoint: Checkpoint, calib: str) -> None:
    """Refuse a text that the model cannot read, and one that it is to write but cannot be run for as it is stored.

    Raises:
        ConfigError: its weights are FP8.
        CheckpointError: its tokenizer, which a text needs, does not load.
    """
    if calib != GENERATED:
        load_tokenizer(checkpoint.path if checkpoint.path.is_dir() else fetch_side_files(str(checkpoint.path)))
    if calib == GENERATED and checkpoint.scales:
        raise ConfigError(
            f"--calib {GENERATED}: expected a model that transformers runs on a CPU, got FP8 weights, which are only read a "
            "layer at a time. Give a text file."
        )


def load_calibration(
    spec: str, model_dir: str | Path, samples: int, seqlen: int, seed: int, device: torch.device = CPU
) -> torch.Tensor:
    """Calibration windows as int64 tokens ``(samples, seqlen)``, the same for the same arguments.

    Windows of a text start at seeded random offsets, and with ``<bos>`` for models whose tokenizer or family puts it
    before every text. ``generated`` samples from the model's own distribution (temperature 1), going on with a new
    document after each end-of-text as in its training data.

    Args:
        spec: path of a UTF-8 text or of a ``.jsonl`` with a ``text`` field; ``generated``; or ``ID`` or ``ID:CONFIG`` of a
            hub data set with a ``text`` column, of whose train split the first documents are read.
        model_dir: directory of the model that is calibrated: its tokenizer, and for ``generated`` its weights.
        samples: number of windows.
        seqlen: tokens in each.
        seed: of the offsets or of the sampling.
        device: where the model runs, as a whole, for ``generated``; the tokens are on the CPU.

    Raises:
        ConfigError: no such file or data set, fewer tokens than one window, or ``samples`` or ``seqlen`` out of range.
        CheckpointError: the model directory has no usable tokenizer or weights.
    """
    if samples < 1 or seqlen < 2:
        raise ConfigError(f"calibration: expected --calib-samples >= 1 and --calib-seqlen >= 2, got {samples} and {seqlen}.")
    if spec == GENERATED:
        return _generate(model_dir, samples, seqlen, seed, device)
    tokenizer = load_tokenizer(model_dir)
    if Path(spec).is_file():
        tokens = tokenize(tokenizer, read_text(spec))
    elif _HUB_ID.fullmatch(spec):
        tokens = _tokenize_dataset(tokenizer, spec, 2 * samples * seqlen)
    else:
        raise ConfigError(f"--calib {spec}: expected a text file, a hub data set id or {GENERATED!r}; there is no such file.")
    bos = tokenizer.bos_token_id if adds_bos(tokenizer) or family_needs_bos(model_dir) else None
    return _draw_windows(tokens, spec, samples, seqlen, seed, bos)


def read_text(path: str | Path) -> str:
    """A whole text, line ends untouched, or the ``text`` fields of a ``.jsonl`` joined with spaces.

    Raises:
        ConfigError: the file cannot be read, is not UTF-8, or a line of a ``.jsonl`` has no ``text``.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8")
        if path.suffix == ".jsonl":
            return " ".join(parse_json(line.encode())["text"] for line in text.split("\n") if line.strip())
        return text
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: expected a readable UTF-8 text, or a .jsonl of objects with a 'text' field; got {error!r}."
        ) from error


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str, special_tokens: bool = False) -> torch.Tensor:
    """Int64 tokens ``(n,)`` of the whole text at once, with what the tokenizer puts around a text if asked."""
    with foreign_errors(f"{tokenizer.name_or_path}: its tokenizer fails on the text", "Fetch the tokenizer again."):
        return torch.tensor(tokenizer(text, add_special_tokens=special_tokens, verbose=False).input_ids, dtype=torch.int64)


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer itself begins a text with ``<bos>``."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenize(tokenizer, "a", special_tokens=True)[:1].tolist() == [bos]


def family_needs_bos(model_dir: str | Path) -> bool:
    """Whether the model is of a family that must see ``<bos>`` before every text, whatever its tokenizer does."""
    return load_config(model_dir).model_type.startswith(_BOS_FAMILIES)


def _draw_windows(tokens: torch.Tensor, spec: str, samples: int, seqlen: int, seed: int, bos: int | None) -> torch.Tensor:
    width = seqlen if bos is None else seqlen - 1
    if len(tokens) < width:
        raise ConfigError(
            f"--calib {spec}: expected at least {width} tokens for one window, got {len(tokens)}. "
            "Give a longer text or a smaller --calib-seqlen."
        )
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(tokens) - width + 1, (samples, 1), generator=generator)
    drawn = tokens[starts + torch.arange(width)]
    return drawn if bos is None else torch.cat((torch.full((samples, 1), bos), drawn), dim=1)


def _tokenize_dataset(tokenizer: PreTrainedTokenizerBase, spec: str, enough: int) -> torch.Tensor:
    """Tokens of the first documents of a hub data set, until there are ``enough`` or it ends."""
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"--calib {spec}: there is no such file, and reading a hub data set needs the 'datasets' package: "
            f"pip install datasets, or use a text file or {GENERATED!r}."
        ) from error
    name, _, config = spec.partition(":")
    found: list[torch.Tensor] = []
    try:
        for row in datasets.load_dataset(name, config or None, split="train", streaming=True):
            found.append(tokenize(tokenizer, row["text"]))
            if sum(map(len, found)) >= enough:
                break
    except Exception as error:  # the library raises whatever its network and file layers do
        raise ConfigError(
            f"--calib {spec}: there is no such file, and it cannot be read as a hub data set with a 'text' column: "
            f"{type(error).__name__}: {error}. Check the id and the network, or use a text file or {GENERATED!r}."
        ) from error
    return torch.cat(found) if found else torch.empty(0, dtype=torch.int64)


@torch.inference_mode()
def _generate(model_dir: str | Path, samples: int, seqlen: int, seed: int, device: torch.device) -> torch.Tensor:
    model = load_model(model_dir, device=device)
    start = model.config.bos_token_id if model.config.bos_token_id is not None else model.config.eos_token_id
    if not isinstance(start, int):
        raise ConfigError(
            f"--calib {GENERATED}: {model_dir}/config.json names neither a bos_token_id nor one eos_token_id to start from. "
            "Give a text file."
        )
    # No eos_token_id: generation runs through end-of-text into the next document.
    greedy = GenerationConfig(do_sample=False, max_new_tokens=seqlen - 1, pad_token_id=start)
    model.generation_config = greedy
    draw, batches = LogitsProcessorList([_Draw(seed)]), []
    for first in range(0, samples, _GENERATION_BATCH):
        prompt = torch.full((min(_GENERATION_BATCH, samples - first), 1), start, device=device)
        mask = torch.ones_like(prompt)
        found = model.generate(prompt, attention_mask=mask, generation_config=greedy, logits_processor=draw)
        batches.append(found.cpu())
    return torch.cat(batches)


class _Draw(LogitsProcessor):
    """Samples at temperature 1, and leaves only the token drawn to choose from. On the CPU: each device has its own generator."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        drawn = torch.multinomial(scores.float().cpu().softmax(dim=-1), 1, generator=self._generator)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn.to(scores.device), 0.0)
