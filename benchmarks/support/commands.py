# SPDX-License-Identifier: Apache-2.0
"""Commands that the benchmarks run in processes of their own, and what they used."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from types import FrameType
from typing import Any


def options(**named: object) -> list[str]:
    """Words of a command line: ``max_num_seqs=4`` is ``--max-num-seqs 4``; True is an option
    without a value, False and None none at all."""
    words: list[str] = []
    for name, value in named.items():
        if value is not None and value is not False:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return words


def smoothrot_convert(*words: str) -> tuple[dict[str, Any], dict[str, float]]:
    """The JSON that a command of ``smoothrot-convert`` prints; its wall and CPU seconds and the
    peak memory of its largest process.

    Raises:
        RuntimeError: it failed; what it said is on stderr.
    """
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        child = subprocess.Popen(
            [sys.executable, "-m", "smoothrot_offline.cli", *words, "--json"], stdout=output
        )
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise RuntimeError(f"smoothrot-convert {words[0]}: exit status {child.returncode}")
        output.seek(0)
        facts = json.load(output)
    return facts, {
        "seconds": round(time.monotonic() - started, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_bytes": usage.ru_maxrss * 1024,
    }


def run_quietly(command: list[str], **environment: str) -> str:
    """Standard output of a command.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:3])} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def unwind_on_sigterm() -> None:
    """Let whoever stops this process unwind it as Ctrl-C does, so that its servers end too."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
