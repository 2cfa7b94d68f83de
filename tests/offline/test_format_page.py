# SPDX-License-Identifier: Apache-2.0
"""The examples of docs/format.md are true."""

import json
import re
from pathlib import Path

import torch

from smoothrot_vllm.format import parse_schema
from smoothrot_vllm.reference import pack_group_scale, pack_int4

PAGE = (Path(__file__).parents[2] / "docs/format.md").read_text(encoding="utf-8")


def test_example_configuration_is_valid_and_complete() -> None:
    (example,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    schema = parse_schema(json.loads(example))
    assert schema.model_dump(mode="json") == json.loads(example)


def test_example_codes_are_the_bytes_it_says() -> None:
    codes, stored = re.findall(
        r"the codes\s+`(\[.*?\])` of four inputs are the bytes `(.*?)`", PAGE
    )[0]
    assert bytes(
        pack_int4(torch.tensor(json.loads(codes), dtype=torch.int8)).tolist()
    ) == bytes.fromhex(stored)


def test_example_group_scales_are_the_bytes_it_says() -> None:
    scales, stored = re.findall(
        r"the group scales\s+`(\[.*?\])` of three groups are the bytes `(.*?)`", PAGE
    )[0]
    assert bytes(
        pack_group_scale(torch.tensor(json.loads(scales), dtype=torch.uint8)).tolist()
    ) == bytes.fromhex(stored)
