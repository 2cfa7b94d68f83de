# SPDX-License-Identifier: Apache-2.0
"""Texts from files: plain UTF-8, ``.jsonl`` documents, and ``.jsonl`` chats rendered by a
model's chat template."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from smoothrot_vllm.errors import ConfigError
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
