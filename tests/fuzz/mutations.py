# SPDX-License-Identifier: Apache-2.0
"""Damage done to files on purpose, by a seeded generator: edits of a JSON tree, of a safetensors
header, and of raw bytes.

Hypothesis, which test_mutated_checkpoints.py uses, takes about a millisecond to draw an example;
these take some hundredths of that, which is what makes a million inputs practical. They know the
formats, so that most inputs get past the first check.
"""

import json
import math
import random
import struct
from itertools import islice
from typing import Any

Path = tuple[Any, ...]

SCALARS: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2,
        3,
        7,
        64,
        1000,
        2**16,
        10**6,
        10**9,
        2**31,
        2**53,
        2**63,
        2**64,
        10**30,
        -(2**63),
        10**4000,
    ),
    *(0.0, -0.5, 0.5, 1e-320, 1e308, math.nan, math.inf, -math.inf),
    *(
        "",
        "x",
        "é",
        "\0",
        "..",
        "../../x",
        "/dev/zero",
        "a/b",
        "x" * 5000,
        "\ud800",
        "\U0001f600",
        "{}",
        "null",
        "1",
        "{e}",
        "%s",
    ),
)
CANARY = "canary.Canary"
MOST_PLACES = 64
HOSTILE: tuple[tuple[str, Any], ...] = (
    (
        "auto_map",
        {"AutoConfig": CANARY, "AutoModelForCausalLM": CANARY, "AutoTokenizer": [CANARY, CANARY]},
    ),
    ("auto_map", {"AutoTokenizer": [None, CANARY]}),
    ("auto_map", [CANARY, None]),
    ("auto_map", CANARY),
    ("auto_map", {"AutoConfig": "some-org/some-model--canary.Canary"}),
    ("trust_remote_code", True),
    ("model_type", "own_model"),
    ("tokenizer_class", "Canary"),
    ("tokenizer_class", "LlamaTokenizer"),
    ("attn_implementation", "some-org/some-kernel"),
    ("_attn_implementation", "some-org/some-kernel"),
    ("_attn_implementation", "flash_attention_2"),
    ("transformers_weights", "pytorch_model.bin"),
    ("num_labels", 10**9),
    ("num_hidden_layers", 10**7),
    ("base_model_name_or_path", "some-org/some-model"),
    ("quantization_config", {"quant_method": "gptq", "bits": 4}),
    ("quantization_config", {"quant_method": "awq", "bits": 4}),
    ("quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    ("quantization_config", {"quant_method": "fp8", "weight_block_size": [0, 128]}),
    ("quantization_config", {"quant_method": "compressed-tensors", "config_groups": {}}),
    ("rope_parameters", {"rope_type": "yarn", "factor": 1e308}),
    ("id2label", {"x": 1}),
    ("torch_dtype", "float8_e4m3fn"),
    ("dtype", "Tensor"),
    ("chat_template", "{% for i in range(10 ** 9) %}{{ ''.__class__.__mro__ }}{% endfor %}"),
    ("custom_generate", "canary"),
)
DTYPES = (
    ("F64", 8),
    ("F32", 4),
    ("U16", 2),
    ("BOOL", 1),
    ("F8_E5M2", 1),
    ("I8", 1),
    ("U64", 8),
    ("C64", 8),
)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
_PIECES = (b"\0", b"\xff", b"\xed\xa0\x80", b'"', b"\\", b"{", b"\n", b"\r", b"\xef\xbb\xbf")
_NUMBERS = (b"0", b"-1", b"1e999", b"99999999999999999999", b"NaN")


def edited_json(data: bytes, rng: random.Random, hostile: bool = False) -> bytes:
    """A JSON document with one to three changes; one time in eight, of its bytes as well.

    Args:
        data: the document.
        rng: decides everything.
        hostile: whether keys may appear by which libraries run code or fetch from elsewhere.
    """
    content = json.loads(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        content = _edit(content, rng, hostile)
    text = json.dumps(content).encode()
    kind = rng.randrange(16)
    if kind == 0:
        text = edited_bytes(text, rng)
    elif kind == 1 and b":" in text:
        # Other spellings than json.dumps has: a key twice, deep nesting, numbers of any length.
        at = rng.choice([i for i, byte in enumerate(text) if byte == ord(b":")])
        depth = rng.choice((100, 1000, 100_000))
        value = rng.choice(
            (
                b"[" * depth + b"]" * depth,
                b'{"a":' * depth + b"1" + b"}" * depth,
                *_NUMBERS,
                b"1" * 5000,
            )
        )
        text = text[: at + 1] + value + b',"a":' + text[at + 1 :]
    return text


def _edit(content: Any, rng: random.Random, hostile: bool) -> Any:
    places = _places(content)
    place = rng.choice(places)
    kind = rng.randrange(8)
    found = _get(content, place)
    if kind == 0 and hostile:
        place = rng.choice(
            [where for where in places if isinstance(_get(content, where), dict)] or [()]
        )
        key, value = rng.choice(HOSTILE)
        found = _get(content, place)
        return _put(content, place, {**found, key: value} if isinstance(found, dict) else value)
    if kind == 1 and place:
        return _without(content, place)
    if kind == 2:
        return _put(content, place, _get(content, rng.choice(places)))
    if kind == 3 and isinstance(found, int | float) and abs(found) < 1e9:
        return _put(
            content,
            place,
            rng.choice(
                (found + 1, found - 1, -found, 2 * found, found / 2, str(found), found * 2**20)
            ),
        )
    if kind == 4:
        return _put(content, place, rng.choice(([found], {"a": found}, [found] * 3, [], {})))
    if kind == 5 and isinstance(found, dict):
        return _put(content, place, {**found, str(rng.choice(SCALARS)): rng.choice(SCALARS)})
    if kind == 6 and isinstance(found, str):
        return _put(
            content,
            place,
            rng.choice((found.upper(), found[:-1], found + found, "../" + found, found + "\0")),
        )
    return _put(content, place, rng.choice(SCALARS))


def edited_safetensors(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with changes in its header, or in its bytes."""
    kind = rng.randrange(8)
    if kind == 0:
        return edited_bytes(data, rng)
    (size,) = struct.unpack("<Q", data[:8])
    header, body = data[8 : 8 + size], data[8 + size :]
    if kind == 1:
        body = edited_bytes(body, rng)
    elif kind == 2:
        # A tensor of other dtype or shape that still fits its bytes.
        content = json.loads(header)
        name = rng.choice([key for key in content if key != "__metadata__"])
        dtype, width = rng.choice(
            (
                ("F64", 8),
                ("F32", 4),
                ("U16", 2),
                ("BOOL", 1),
                ("F8_E5M2", 1),
                ("I8", 1),
                ("U64", 8),
                ("C64", 8),
            )
        )
        begin, end = content[name]["data_offsets"]
        content[name] |= {
            "dtype": dtype,
            "shape": rng.choice(([(end - begin) // width], [1, (end - begin) // width, 1])),
        }
        header = json.dumps(content).encode()
    elif kind == 3:
        # Values that no weight has.
        poison = rng.choice((b"\x00", b"\xff", b"\x7f", b"\x80"))
        at = rng.randrange(max(1, len(body)))
        body = body[:at] + poison * min(64, len(body) - at) + body[at + 64 :]
    else:
        header = edited_json(header, rng)
    size = (
        rng.choice((0, 1, 2**31, 2**63, 2**64 - 1, len(data)))
        if rng.randrange(16) == 0
        else len(header)
    )
    return struct.pack("<Q", size) + header + body


def edited_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bytes flipped, cut off, taken out, repeated, or replaced as a whole."""
    kind = rng.randrange(8)
    at = rng.randrange(len(data) + 1)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + data[at + rng.randrange(1, 64) :]
    if kind == 2:
        return (
            data[:at] + data[at : at + rng.randrange(1, 64)] * rng.choice((2, 3, 100)) + data[at:]
        )
    if kind == 3:
        return data[:at] + rng.choice(_PIECES) + data[at:]
    if kind == 4:
        return rng.choice(
            (
                b"",
                b"\n",
                b"\xff\xfe",
                b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
                b"<html>",
            )
        )
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _places(content: Any) -> list[Path]:
    """Where every value is. Of a long list or object only some, as all of its values are of one
    kind."""
    found: list[Path] = [()]
    values = [content]
    for path, value in zip(found, values, strict=False):  # both grow
        inner = (
            value.items()
            if isinstance(value, dict)
            else enumerate(value)
            if isinstance(value, list)
            else ()
        )
        for key, below in islice(inner, MOST_PLACES):
            found.append((*path, key))
            values.append(below)
    return found


def _get(content: Any, path: Path) -> Any:
    for key in path:
        content = content[key]
    return content


def _put(content: Any, path: Path, value: Any) -> Any:
    if not path:
        return value
    copy = content.copy()
    copy[path[0]] = _put(content[path[0]], path[1:], value)
    return copy


def _without(content: Any, path: Path) -> Any:
    parent = _get(content, path[:-1]).copy()
    del parent[path[-1]]
    return _put(content, path[:-1], parent)
