# SPDX-License-Identifier: Apache-2.0
"""The documents: short lines, a short README, and only files, sections and tests that there are."""

import re
from pathlib import Path

import pytest
from tiny_models import REPOSITORY

MOST_COLUMNS = 100
README_LINES = 120
GENERATED = {"sass.md"}
ROOTS = "offline|smoothrot_vllm|csrc|tests|benchmarks|docs|requirements"
DOCUMENTS = [
    *(REPOSITORY / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG", "SECURITY")),
    *sorted(path for path in (REPOSITORY / "docs").glob("*.md") if path.name not in GENERATED),
]
pages = pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.name)


def prose(page: Path) -> str:
    """The page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)


def breakable(line: str) -> bool:
    """Whether a line is neither a table's row, nor a command, nor little but one link."""
    return not line.startswith("|") and max(map(len, line.split())) < MOST_COLUMNS - 10


@pages
def test_lines_are_short(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    long = [line for line in lines if len(line) > MOST_COLUMNS]
    assert [line for line in long if breakable(line)] == []


def test_the_readme_is_short() -> None:
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= README_LINES


@pages
def test_files_named_are_there(page: Path) -> None:
    named = re.findall(rf"`((?:{ROOTS})/[\w./-]*)`", prose(page))
    assert [name for name in named if not (REPOSITORY / name).exists()] == []


def test_the_map_is_of_this_repository() -> None:
    (tree,) = re.findall(r"^```text\n(.*?)^```", DOCUMENTS[1].read_text(), re.DOTALL | re.M)
    mapped = re.findall(rf"(?<![\w/])(?:{ROOTS})/[\w./]*", tree)
    assert [path for path in mapped if not (REPOSITORY / path).exists()] == []
    converter = "offline/smoothrot_offline/"
    folders = {path.parent.name for path in (REPOSITORY / converter).glob("*/__init__.py")}
    assert folders == {path.split("/")[2] for path in mapped if path.count("/") == 3}


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for target, section in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", prose(page)):
        found = page.parent / target if target else page
        assert found.exists(), target
        if section:
            assert section in anchors(found), f"{target}#{section}"


def anchors(page: Path) -> set[str]:
    """Names of a page's sections, as GitHub makes them from the headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pages
def test_tests_named_are_there(page: Path) -> None:
    files = list((REPOSITORY / "tests").rglob("test_*.py"))
    sources = "".join(path.read_text(encoding="utf-8") for path in files)
    names = {path.name for path in files}
    named = re.findall(r"`(?:tests/\w+/)?(test_\w+(?:\.py)?)`", prose(page))
    assert [name for name in named if name not in names and f"def {name}(" not in sources] == []
