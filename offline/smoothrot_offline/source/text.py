# SPDX-License-Identifier: Apache-2.0
"""Texts and calibration tokens: from a file, from the model itself, or from a hub data set."""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from smoothrot_offline.device import CPU
from smoothrot_offline.report.model import load_model
from smoothrot_offline.source.checkpoint import Checkpoint
from smoothrot_offline.source.models import foreign_errors, load_config
from smoothrot_offline.source.tokenizers import load_tokenizer
from smoothrot_vllm.errors import CheckpointError, ConfigError
from smoothrot_vllm.foreign_files import parse_json

_CHATS = ("messages", "conversations")
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}
"""What data sets in ShareGPT's form call the roles of OpenAI's."""


def read_text(path: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
    """A whole text, line ends untouched; or the documents of a ``.jsonl``.

    Those are its ``text`` fields, joined with spaces; or its chats (``messages`` with role and
    content, or ``conversations``, in ShareGPT's form too), rendered by the tokenizer's chat
    template, one after the other.

    Raises:
        ConfigError: the file cannot be read, is not UTF-8, has a line that is neither, or chats for
            a model without a template.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise ConfigError(
            f"{path}: expected a readable text file: {error.strerror or error}."
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: expected UTF-8, got byte 0x{error.object[error.start]:02x} at position"
            f" {error.start}. Convert it (iconv -t UTF-8)."
        ) from error
    if path.suffix != ".jsonl":
        return text
    documents, chats = [], 0
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            content = parse_json(line.encode())
        except ValueError as error:
            raise ConfigError(f"{path}: line {number}: expected a JSON object: {error}.") from error
        if isinstance(content, dict) and isinstance(content.get("text"), str):
            documents.append(content["text"])
        else:
            documents.append(_rendered(content, f"{path}: line {number}", tokenizer))
            chats += 1
    return ("" if chats else " ").join(documents)


def _rendered(content: Any, where: str, tokenizer: PreTrainedTokenizerBase | None) -> str:
    fields = content if isinstance(content, dict) else {}
    chat = next((fields[key] for key in _CHATS if isinstance(fields.get(key), list)), None)
    if not chat:
        got = f"keys {', '.join(fields)}" if fields else type(content).__name__
        raise ConfigError(
            f"{where}: expected an object with a 'text', or with a list of {' or '.join(_CHATS)};"
            f" got {got}."
        )
    if tokenizer is None or tokenizer.chat_template is None:
        raise ConfigError(
            f"{where}: expected a model with a chat template to render its messages by, got one"
            " without. Give a text instead, or a chat_template.jinja beside the tokenizer."
        )
    messages = [_message(turn, where) for turn in chat]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (
        Exception
    ) as error:  # a template raises what it likes, and what Jinja and Python raise for it
        raise ConfigError(
            f"{where}: the model's chat template refuses it: {' '.join(str(error).split())}."
        ) from error


def _message(turn: Any, where: str) -> dict[str, Any]:
    found = turn if isinstance(turn, dict) else {}
    role, content = found.get("role", found.get("from")), found.get("content", found.get("value"))
    if not isinstance(role, str) or content is None:
        raise ConfigError(
            f"{where}: expected a role and a content (or from and value) in each message, got"
            f" {str(turn)[:80]!r}."
        )
    others = {key: value for key, value in found.items() if key not in ("from", "value")}
    return others | {"role": _ROLES.get(role, role), "content": content}


GENERATED = "generated"
GENERATING_PASSES = 4.0
"""What generating a text takes, in passes of it: a token at a time, the weights are read from
memory for each."""
_GENERATION_BATCH = 32
_HELD_OUT_PART = 8
"""One in so many tokens of a text may be held out."""
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
# Families trained with <bos> before every text that fall apart without it; exported tokenizers do
# not always add it.
_BOS_FAMILIES = ("gemma",)


def check_calibration(
    checkpoint: Checkpoint,
    config: PreTrainedConfig,
    calib: str,
    seqlen: int,
    held_out: bool = False,
) -> None:
    """Refuse what :func:`load_calibration` would refuse, without running the model.

    What needs the tokenizer is left out for a checkpoint that is only known by its hub id.

    Raises:
        ConfigError: as :func:`load_calibration`; a token of the text, or the one that generation
            starts from, is outside the vocabulary; or a model that generates its text has
            packed weights.
        CheckpointError: the model directory has no usable tokenizer.
    """
    local = checkpoint.path.is_dir()
    if calib == GENERATED:
        if checkpoint.packing is not None:
            raise ConfigError(
                f"--calib {GENERATED}: expected a model that transformers runs on a CPU, got"
                f" {checkpoint.packing.title} weights, which are only read a layer at a time. Give"
                " a text file."
            )
        if local:
            start_token(config, checkpoint.path)
    elif Path(calib).is_file():
        if local:
            tokenizer = load_tokenizer(checkpoint.path)
            text = read_text(calib, tokenizer)
            # The beginning nearly always has enough tokens.
            windows = 2 if held_out else 1
            beginning = tokenize(tokenizer, text[: 64 * windows * seqlen])
            enough = len(beginning) >= windows * seqlen
            tokens = beginning if enough else tokenize(tokenizer, text)
            width = seqlen - (_bos(tokenizer, checkpoint.path) is not None)
            _check_windows(tokens, calib, width, windows)
            if int(tokens.max()) >= config.vocab_size:
                raise ConfigError(
                    f"--calib {calib}: expected tokens of a vocabulary of {config.vocab_size}, got"
                    f" token {int(tokens.max())}. Use the tokenizer of this model."
                )
    elif not _HUB_ID.fullmatch(calib):
        raise ConfigError(
            f"--calib {calib}: expected a text file, a hub data set id or {GENERATED!r}; there is"
            " no such file."
        )
    elif find_spec("datasets") is None:
        raise ConfigError(_without_datasets(calib))


def load_calibration(
    spec: str,
    model_dir: str | Path,
    samples: int,
    seqlen: int,
    seed: int,
    device: torch.device = CPU,
    held_out: int = 0,
) -> torch.Tensor:
    """Calibration windows as int64 tokens ``(samples + held_out, seqlen)``, the same for the same
    arguments.

    Windows of a text start at seeded random offsets, and with ``<bos>`` for models whose tokenizer
    or family puts it before every text; those held out are of the text's end, which the others
    leave alone. ``generated`` samples from the model's own distribution
    (temperature 1), going on with a new document after each end-of-text as in its training data.

    Args:
        spec: path of a text as :func:`read_text` takes it; ``generated``;
            or ``ID`` or ``ID:CONFIG`` of a hub data set with a ``text`` column, of whose train
            split the first documents are read.
        model_dir: directory of the model that is calibrated: its tokenizer, and for ``generated``
            its weights.
        samples: number of windows.
        seqlen: tokens in each.
        seed: of the offsets or of the sampling.
        device: where the model runs, as a whole, for ``generated``; the tokens are on the CPU.
        held_out: number of windows after those, to judge by.

    Raises:
        ConfigError: no such file or data set, fewer tokens than one window, or than one more that
            is held out, or ``samples`` or ``seqlen`` out of range.
        CheckpointError: the model directory has no usable tokenizer or weights.
    """
    if samples < 1 or seqlen < 2:
        raise ConfigError(
            f"calibration: expected --calib-samples >= 1 and --calib-seqlen >= 2, got {samples} and"
            f" {seqlen}."
        )
    if spec == GENERATED:
        return _generate(model_dir, samples + held_out, seqlen, seed, device)
    tokenizer = load_tokenizer(model_dir)
    if Path(spec).is_file():
        tokens = tokenize(tokenizer, read_text(spec, tokenizer))
    elif _HUB_ID.fullmatch(spec):
        tokens = _tokenize_dataset(tokenizer, spec, 2 * (samples + held_out) * seqlen)
    else:
        raise ConfigError(
            f"--calib {spec}: expected a text file, a hub data set id or {GENERATED!r}; there is no"
            " such file."
        )
    return _draw_windows(tokens, spec, samples, held_out, seqlen, seed, _bos(tokenizer, model_dir))


def tokenize(
    tokenizer: PreTrainedTokenizerBase, text: str, special_tokens: bool = False
) -> torch.Tensor:
    """Int64 tokens ``(n,)`` of the whole text at once, with what the tokenizer puts around a
    text if asked."""
    with foreign_errors(
        f"{tokenizer.name_or_path}: its tokenizer fails on the text", "Fetch the tokenizer again."
    ):
        return torch.tensor(
            tokenizer(text, add_special_tokens=special_tokens, verbose=False).input_ids,
            dtype=torch.int64,
        )


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer itself begins a text with ``<bos>``."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenize(tokenizer, "a", special_tokens=True)[:1].tolist() == [bos]


def family_needs_bos(model_dir: str | Path) -> bool:
    """Whether the model is of a family that must see ``<bos>`` before every text, whatever its
    tokenizer does."""
    return load_config(model_dir).model_type.startswith(_BOS_FAMILIES)


def start_token(config: PreTrainedConfig, model_dir: Path) -> int:
    """What a model that writes its own text begins with: ``<bos>``, or else end-of-text, or else
    what its tokenizer begins with.

    Raises:
        ConfigError: there is none, or it is outside the vocabulary.
    """
    for key in ("bos_token_id", "eos_token_id"):
        named = getattr(config, key, None)
        for token in named if isinstance(named, list) else [named]:
            if token is not None:
                return _in_vocabulary(token, config, f"{model_dir}/config.json: {key}")
    try:
        tokenizer = load_tokenizer(model_dir)
    except CheckpointError as error:
        raise ConfigError(
            f"--calib {GENERATED}: {model_dir}/config.json names neither a bos_token_id nor an"
            " eos_token_id to start from, and there is no tokenizer that does. Give a text file."
        ) from error
    named = [
        token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None
    ]
    if not named and tokenizer.chat_template is not None:
        chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
        named = tokenize(tokenizer, str(chat)).tolist()
    if not named:
        raise ConfigError(
            f"--calib {GENERATED}: neither {model_dir}/config.json nor the tokenizer names a token"
            " that begins or ends a text, and there is no chat template. Give a text file."
        )
    return _in_vocabulary(named[0], config, f"{model_dir}: the tokenizer's first token")


def _in_vocabulary(token: Any, config: PreTrainedConfig, where: str) -> int:
    if type(token) is not int or not 0 <= token < config.vocab_size:
        raise ConfigError(
            f"--calib {GENERATED}: {where}: expected a token of a vocabulary of"
            f" {config.vocab_size}, got {token!r}. Correct it, or give a text file."
        )
    return token


def _bos(tokenizer: PreTrainedTokenizerBase, model_dir: str | Path) -> int | None:
    """The token that begins each window, if one does."""
    return tokenizer.bos_token_id if adds_bos(tokenizer) or family_needs_bos(model_dir) else None


def _check_windows(tokens: torch.Tensor, spec: str, width: int, windows: int) -> None:
    if len(tokens) < windows * width:
        purpose = "one window" if windows == 1 else "one window and another that is held out"
        raise ConfigError(
            f"--calib {spec}: expected at least {windows * width} tokens for {purpose}, got"
            f" {len(tokens)}. Give a longer text or a smaller --calib-seqlen."
        )


def _draw_windows(
    tokens: torch.Tensor,
    spec: str,
    samples: int,
    held_out: int,
    seqlen: int,
    seed: int,
    bos: int | None,
) -> torch.Tensor:
    width = seqlen if bos is None else seqlen - 1
    _check_windows(tokens, spec, width, 2 if held_out else 1)
    end = len(tokens) - (max(width, len(tokens) // _HELD_OUT_PART) if held_out else 0)
    generator = torch.Generator().manual_seed(seed)
    starts = torch.cat(
        [
            first + torch.randint(last - first - width + 1, (count, 1), generator=generator)
            for first, last, count in ((0, end, samples), (end, len(tokens), held_out))
            if count
        ]
    )
    drawn = tokens[starts + torch.arange(width)]
    return drawn if bos is None else torch.cat((torch.full((len(drawn), 1), bos), drawn), dim=1)


def _without_datasets(spec: str) -> str:
    return (
        f"--calib {spec}: there is no such file, and reading a hub data set needs the 'datasets'"
        f" package: pip install datasets, or use a text file or {GENERATED!r}."
    )


def _tokenize_dataset(tokenizer: PreTrainedTokenizerBase, spec: str, enough: int) -> torch.Tensor:
    """Tokens of the first documents of a hub data set, until there are ``enough`` or it ends."""
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(_without_datasets(spec)) from error
    name, _, config = spec.partition(":")
    found: list[torch.Tensor] = []
    try:
        for row in datasets.load_dataset(name, config or None, split="train", streaming=True):
            found.append(tokenize(tokenizer, row["text"]))
            if sum(map(len, found)) >= enough:
                break
    except Exception as error:  # the library raises whatever its network and file layers do
        raise ConfigError(
            f"--calib {spec}: there is no such file, and it cannot be read as a hub data set with a"
            f" 'text' column: {type(error).__name__}: {error}. Check the id and the network, or use"
            f" a text file or {GENERATED!r}."
        ) from error
    return torch.cat(found) if found else torch.empty(0, dtype=torch.int64)


@torch.inference_mode()
def _generate(
    model_dir: str | Path, samples: int, seqlen: int, seed: int, device: torch.device
) -> torch.Tensor:
    model = load_model(model_dir, device=device)
    start = start_token(model.config.get_text_config(), Path(model_dir))
    # No eos_token_id: generation runs through end-of-text into the next document.
    greedy = GenerationConfig(do_sample=False, max_new_tokens=seqlen - 1, pad_token_id=start)
    model.generation_config = greedy
    draw, batches = LogitsProcessorList([_Draw(seed)]), []
    for first in range(0, samples, _GENERATION_BATCH):
        prompt = torch.full((min(_GENERATION_BATCH, samples - first), 1), start, device=device)
        mask = torch.ones_like(prompt)
        found = model.generate(
            prompt, attention_mask=mask, generation_config=greedy, logits_processor=draw
        )
        batches.append(found.cpu())
    return torch.cat(batches)


class _Draw(LogitsProcessor):
    """Samples at temperature 1, and leaves only the token drawn to choose from. On the CPU: each
    device has its own generator."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        drawn = torch.multinomial(
            scores.float().cpu().softmax(dim=-1), 1, generator=self._generator
        )
        return torch.full_like(scores, -torch.inf).scatter(1, drawn.to(scores.device), 0.0)
