# SPDX-License-Identifier: Apache-2.0
"""Linking on a new system for older ones: functions of a static library are bound to the versions
that glibc 2.28 has.

glibc 2.34 took threads and dlopen into libc.so.6 under a new version of each symbol and kept the
old one. A linker takes the new version unless the object file names another, which objcopy can make
it do.
"""

import re
import subprocess
from pathlib import Path

NEWEST = (2, 28)
"""glibc of manylinux_2_28, which torch's own wheels need."""
LIBRARIES = ["-Wl,--no-as-needed", "-l:libpthread.so.0", "-l:libdl.so.2", "-l:librt.so.1"]
"""Link flags: where the functions are before 2.34."""


def _symbols(dump: str) -> dict[str, set[tuple[int, ...]]]:
    """Versions of each function that ``objdump -T`` lists."""
    found: dict[str, set[tuple[int, ...]]] = {}
    for version, name in re.findall(r"\bGLIBC_([\d.]+)\)?\s+(\w+)$", dump, re.MULTILINE):
        found.setdefault(name, set()).add(tuple(map(int, version.split("."))))
    return found


def old_versions(dump: str) -> dict[str, str]:
    """The newest version up to :data:`NEWEST` of each function whose default one is newer, from
    what ``objdump -T`` printed."""
    bound = {}
    for name, versions in _symbols(dump).items():
        old = [version for version in versions if version[:2] <= NEWEST]
        if max(versions)[:2] > NEWEST and old:
            bound[name] = "GLIBC_" + ".".join(map(str, max(old)))
    return bound


def bind_to_old(archive: Path, folder: Path) -> Path:
    """A copy of a static library in ``folder`` that needs no newer glibc than :data:`NEWEST`."""
    libc = subprocess.run(
        ["gcc", "-print-file-name=libc.so.6"], check=True, capture_output=True, text=True
    ).stdout.strip()
    dump = subprocess.run(
        ["objdump", "-T", libc], check=True, capture_output=True, text=True
    ).stdout
    folder.mkdir(parents=True, exist_ok=True)
    renames, copy = folder / "glibc_symbols", folder / archive.name
    renames.write_text(
        "".join(f"{name} {name}@{version}\n" for name, version in old_versions(dump).items())
    )
    subprocess.run(["objcopy", f"--redefine-syms={renames}", str(archive), str(copy)], check=True)
    return copy
