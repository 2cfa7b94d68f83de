# SPDX-License-Identifier: Apache-2.0
"""The converter in a process of its own, without the seconds that its imports take: forked from
one that imported everything and did nothing else."""

import contextlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

IMPORTS = [
    "smoothrot_offline.cli",
    "smoothrot_offline.convert",
    "smoothrot_offline.report.evaluate",
]
COMMAND = "from smoothrot_offline import cli\ncli.main()\n"
"""The command line, as ``smoothrot-convert`` runs it."""


def run_forked(
    code: str, *arguments: object, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """What ``python -c code arguments`` leaves behind."""
    words = ["-c", *map(str, arguments)]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTS)
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = context.Process(target=_child, args=(code, words, str(out), str(err)))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(words, timeout)
        return subprocess.CompletedProcess(
            words, process.exitcode, *(path.read_text() for path in (out, err))
        )


def _child(code: str, words: list[str], out: str, err: str) -> None:
    for path, number in ((os.devnull, 0), (out, 1), (err, 2)):
        flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT
        os.dup2(os.open(path, flags), number)
    sys.argv = words
    try:
        exec(compile(code, "<forked>", "exec"), {"__name__": "__main__"})
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
