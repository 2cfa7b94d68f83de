# SPDX-License-Identifier: Apache-2.0
"""What the tests compile, kept in ``build/tests`` by what it was made of: a second run compiles
nothing."""

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from subprocess import run

REPOSITORY = Path(__file__).parents[1]
FOLDER = REPOSITORY / "build" / "tests"


@cache
def compiler() -> str:
    """What the compiler says it is."""
    return run(["g++", "--version"], capture_output=True, text=True, check=True).stdout


def compiled(
    name: str,
    sources: Iterable[Path],
    flags: Iterable[str],
    build: Callable[[Path], object],
    folder: Path = FOLDER,
) -> Path:
    """The file that ``build`` writes, from ``sources``, anything of csrc and ``flags``.

    Of several processes that ask for it at once, one builds and the others wait.
    """
    digest = hashlib.sha256("\0".join((compiler(), *flags)).encode())
    headers = (path for path in (REPOSITORY / "csrc").rglob("*") if path.suffix != ".pyc")
    for path in sorted({*headers, *sources}):
        if path.is_file():
            digest.update(f"\0{path.relative_to(REPOSITORY)}\0".encode() + path.read_bytes())
    out = folder / digest.hexdigest()[:16] / name
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.with_name(f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not out.exists():
            unfinished = out.with_name(f"unfinished-{name}")
            build(unfinished)
            os.replace(unfinished, out)
    return out
