# SPDX-License-Identifier: Apache-2.0
"""The door to tokenizers of others, beside that to their models (foreign_models.py)."""

from collections.abc import Iterator, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from smoothrot_offline.source.headers import CONFIG_NAME, side_files
from smoothrot_offline.source.models import (
    LOCAL_ONLY,
    explained,
    foreign_errors,
    load_config,
    one_line,
)
from smoothrot_vllm.errors import CheckpointError, SmoothRotError, UnsupportedModelError
from smoothrot_vllm.foreign_files import read_json, refuse_pointer

MAX_TOKEN_ID = 1 << 22
"""A tokenizer makes a table as long as its largest token id. The largest vocabularies have a
quarter of this."""
_TOKENIZER = "tokenizer.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_JSON = (
    _TOKENIZER,
    _TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
)
_SENTENCEPIECE = ("*.model", "*.spm")
_PACKAGES = {
    "sentencepiece": "sentencepiece",
    "tiktoken": "tiktoken",
    "protobuf": "google.protobuf",
    "blobfile": "blobfile",
}
"""Packages that transformers needs for some kinds of files, and the modules in them."""


def load_tokenizer(directory: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory; of one that brings its own code, the class that
    transformers has for it.

    Raises:
        CheckpointError: it has none that loads; the message names the file, and the package that is
            missing if one is.
        UnsupportedModelError: only Python code that the directory brings would read it.
    """
    directory = Path(directory)
    for file in side_files(directory).copied:
        refuse_pointer(directory / file)
    contents = {
        name: read_json(directory / name, "Fetch the tokenizer again.")
        for name in _JSON
        if (directory / name).exists()
    }
    for name, content in contents.items():
        _check_ids(directory / name, content)
    if (directory / CONFIG_NAME).exists():
        load_config(directory)
    with explained(lambda error: _tokenizer_error(directory, contents, error)):
        return AutoTokenizer.from_pretrained(directory, **LOCAL_ONLY)


def _check_ids(path: Path, content: Mapping[str, Any]) -> None:
    if found := next(
        (
            value
            for value in _ids(path.name, content)
            if isinstance(value, int) and value > MAX_TOKEN_ID
        ),
        None,
    ):
        raise CheckpointError(
            f"{path}: expected token ids up to {MAX_TOKEN_ID}, got {found}. Fetch the tokenizer"
            " again."
        )


def _ids(name: str, content: Mapping[str, Any]) -> Iterator[Any]:
    """Every token id of one of a tokenizer's files, as far as it has the form of one."""
    if name == _TOKENIZER:
        model, added = content.get("model"), content.get("added_tokens")
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        yield from vocabulary.values() if isinstance(vocabulary, dict) else ()
        yield from (
            token.get("id")
            for token in (added if isinstance(added, list) else ())
            if isinstance(token, dict)
        )
    elif name == _TOKENIZER_CONFIG:
        added = content.get("added_tokens_decoder")
        yield from (
            int(key)
            for key in (added if isinstance(added, dict) else ())
            if key.isdecimal() and len(key) < 40
        )
    else:
        yield from content.values()


def _tokenizer_error(
    directory: Path, contents: Mapping[str, dict[str, Any]], cause: BaseException
) -> SmoothRotError:
    """What is wrong with a tokenizer that did not load."""
    said = f"{directory}: cannot load a tokenizer"
    own = contents.get(_TOKENIZER_CONFIG, {}).get("auto_map")
    if own and "trust_remote_code" in str(cause):
        return UnsupportedModelError(
            f"{said}: {_TOKENIZER_CONFIG} needs its own Python code (auto_map: {own}), which is"
            f" never run. Use a model with a {_TOKENIZER} that transformers reads."
        )
    if _TOKENIZER in contents:
        path = directory / _TOKENIZER
        try:
            with foreign_errors(
                f"{path}: the installed tokenizers {version('tokenizers')} does not read it",
                "Fetch it again, or install the versions of tokenizers and transformers that"
                " wrote it.",
            ):
                Tokenizer.from_file(str(path))
        except CheckpointError as error:
            return error
    stored = [file.name for pattern in _SENTENCEPIECE for file in directory.glob(pattern)]
    missing = next(
        (
            package
            for package, module in _PACKAGES.items()
            if package in str(cause) and not _installed(module)
        ),
        None,
    )
    if missing is not None:
        return CheckpointError(
            f"{said}: {', '.join(stored) or 'it'} needs the package {missing}, which is not"
            f" installed: pip install {missing}, or fetch {_TOKENIZER} beside the weights."
            f" ({one_line(cause)})"
        )
    if not contents and not stored:
        return CheckpointError(
            f"{said}: expected {_TOKENIZER} or tokenizer.model, found neither. Fetch it beside the"
            " weights."
        )
    return CheckpointError(f"{said}: {one_line(cause)}. Fetch {_TOKENIZER} beside the weights.")


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False
