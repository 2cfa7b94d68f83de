# SPDX-License-Identifier: Apache-2.0
"""Linking against glibc 2.28's symbols on a newer system."""

import subprocess
import sys
from pathlib import Path

from tiny_models import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "csrc"))
import glibc

DUMP = """\
00000000000887a0 g    DF .text\t00000000000008f0  GLIBC_2.34  pthread_create
00000000000887a0 g    DF .text\t00000000000008f0 (GLIBC_2.2.5) pthread_create
0000000000040370 g    DF .text\t0000000000000012 (GLIBC_2.2.5) realpath
0000000000040250 g    DF .text\t000000000000001a  GLIBC_2.3   realpath
0000000000084b10 g    DF .text\t000000000000001a (GLIBC_2.3.4) dlmopen
0000000000084b10 g    DF .text\t000000000000001a  GLIBC_2.34  dlmopen
0000000000084b10 g    DF .text\t000000000000001a  GLIBC_2.35  only_new
"""


def test_moved_functions_are_bound_to_their_newest_old_version() -> None:
    assert glibc.old_versions(DUMP) == {"pthread_create": "GLIBC_2.2.5", "dlmopen": "GLIBC_2.3.4"}


def test_a_library_linked_with_the_bound_archive_needs_no_newer_glibc(tmp_path: Path) -> None:
    source = (
        "#include <dlfcn.h>\n#include <pthread.h>\nint f(pthread_t t) { return pthread_join(t,"
        " dlopen(0, RTLD_NOW)); }\n"
    )
    (tmp_path / "f.c").write_text(source)
    subprocess.run(["gcc", "-fPIC", "-c", "f.c", "-o", "f.o"], cwd=tmp_path, check=True)
    subprocess.run(["ar", "rcs", "libf.a", "f.o"], cwd=tmp_path, check=True)
    bound = glibc.bind_to_old(tmp_path / "libf.a", tmp_path / "bound")
    whole = [
        "-Wl,--whole-archive",
        str(bound),
        "-Wl,--no-whole-archive",
        "-Wl,--no-undefined",
        *glibc.LIBRARIES,
    ]
    subprocess.run(["gcc", "-shared", "-o", "f.so", *whole], cwd=tmp_path, check=True)
    needed = subprocess.run(
        ["objdump", "-T", "f.so"], cwd=tmp_path, check=True, capture_output=True, text=True
    ).stdout
    assert "(GLIBC_2.2.5) pthread_join" in needed
    assert "(GLIBC_2.2.5) dlopen" in needed
    assert "GLIBC_2.34" not in needed
