# SPDX-License-Identifier: Apache-2.0
"""docs/troubleshooting.md quotes messages that the code still has."""

import ast
import re

from tiny_models import REPOSITORY


def test_every_message_quoted_is_in_the_source() -> None:
    page = (REPOSITORY / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    entries = re.findall(r"^- ((?:`[^`]+`,?\s)*`[^`]+`):", page, flags=re.MULTILINE)
    assert len(entries) == len(re.findall(r"^- ", page, flags=re.MULTILINE))
    quoted = [message for entry in entries for message in re.findall("`([^`]+)`", entry)]
    files = [
        path
        for folder in ("offline", "smoothrot_vllm")
        for path in (REPOSITORY / folder).rglob("*.py")
    ]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in files]
    texts = [
        node.value
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    assert len(quoted) >= 20
    assert [message for message in quoted if not any(message in text for text in texts)] == []
