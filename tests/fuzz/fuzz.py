# SPDX-License-Identifier: Apache-2.0
"""Feed mutated files to everything that reads files of others: ``python tests/fuzz/fuzz.py
--minutes 10``.

Only errors of the project's own may come of it. The work is done in child processes: one that
crashes, takes more than ``--case-seconds`` of processor time for an input, or asks for more than
``ADDRESS_BYTES`` of memory is a defect like any other. So is code of the files that is run, a
question on the terminal, a pickle that is opened and a connection to anywhere.
"""

import argparse
import builtins
import faulthandler
import importlib
import json
import logging
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

ADDRESS_BYTES = 128 << 20
"""Above what the process has when a batch begins; the largest input is of a few hundred
kilobytes."""
FIRST_ADDRESS_BYTES = 1 << 30
"""In a child's first round, which imports what it needs."""
BATCH = 200
"""Inputs of a target before it is the next one's turn, at a share of one tenth."""
MAX_DEFECTS = 20
CASE_SHOWN = 2500


def main() -> int:
    """Exit code 1 if there is a defect."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=1.0, help="time budget")
    parser.add_argument("--inputs", type=int, default=10**9, help="stop after so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", help="only these, by commas")
    parser.add_argument(
        "--case-seconds",
        type=float,
        default=10.0,
        help="of processor time, after which an input hangs",
    )
    parser.add_argument("--output", type=Path, help="write the counts and defects as JSON")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--module", default="targets", help=argparse.SUPPRESS)
    parser.add_argument("--after", default="", help=argparse.SUPPRESS)
    parser.add_argument("--round", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return Child(arguments).run()
    report = fuzz(arguments)
    text = json.dumps(report, indent=2, ensure_ascii=True)
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 1 if report["defects"] else 0


def fuzz(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run children one after the other until the time is over or there are enough inputs."""
    started = time.monotonic()
    counts: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    seconds: Counter[str] = Counter()
    defects: dict[str, dict[str, Any]] = {}
    growth: Counter[str] = Counter()
    rounds, died = 0, ""
    with tempfile.TemporaryDirectory(
        dir="/dev/shm" if Path("/dev/shm").is_dir() else None
    ) as folder:
        root = Path(folder)
        while True:
            left = 60 * arguments.minutes - (time.monotonic() - started)
            if left <= 0 or sum(counts.values()) >= arguments.inputs or len(defects) >= MAX_DEFECTS:
                break
            command = [
                sys.executable,
                __file__,
                "--child",
                str(root),
                "--minutes",
                str(left / 60),
                "--seed",
                str(arguments.seed),
            ]
            command += ["--case-seconds", str(arguments.case_seconds), "--module", arguments.module]
            command += [
                "--inputs",
                str(arguments.inputs - sum(counts.values())),
                "--round",
                str(rounds),
            ]
            command += ["--after", died]
            command += ["--targets", arguments.targets] if arguments.targets else []
            environment = os.environ | {
                "OMP_NUM_THREADS": "1",
                "MALLOC_ARENA_MAX": "1",
                "TOKENIZERS_PARALLELISM": "false",
            }
            with tempfile.TemporaryFile("w+") as said:
                child = subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=said, text=True, env=environment
                )
                assert child.stdout is not None
                target = "start"
                for line in child.stdout:
                    found = json.loads(line)
                    target, rounds = found["target"], found["round"]
                    counts[target] += found.get("inputs", 0)
                    refused[target] += found.get("refused", 0)
                    seconds[target] += found.get("processor_seconds", 0)
                    if rounds:  # the first round imports what it needs
                        growth[target] = max(growth[target], found.get("resident_growth", 0))
                    for defect in found.get("defects", []):
                        known = defects.setdefault(defect["where"], {**defect, "times": 0})
                        known["times"] += 1
                code = child.wait()
                said.seek(0)
                if code:
                    kind = "hang" if -code in (signal.SIGPROF, signal.SIGALRM) else "crash"
                    where = f"{target}: {kind} {code} in round {rounds}"
                    text = said.read().partition("Extension modules:")[0][-3000:]
                    defects[where] = {
                        "where": where,
                        "target": target,
                        "error": text,
                        "times": 1,
                        "case": _changed(root),
                    }
                    if target == "start":
                        break
                    died = target
                else:
                    rounds, died = rounds + 1, ""
    return {
        "seed": arguments.seed,
        "seconds": round(time.monotonic() - started),
        "inputs": sum(counts.values()),
        "refused": sum(refused.values()),
        "case_seconds": arguments.case_seconds,
        "address_bytes": ADDRESS_BYTES,
        "resident_growth_bytes_of_a_batch_by_target": dict(growth),
        "inputs_by_target": dict(counts),
        "refused_by_target": dict(refused),
        "processor_seconds_by_target": {name: round(spent, 1) for name, spent in seconds.items()},
        "defects": list(defects.values()),
    }


def _changed(root: Path) -> dict[str, str]:
    """The files of the case that a child died of."""
    found = {}
    for file in sorted((root / "pristine").rglob("*")):
        now = root / "work" / file.relative_to(root / "pristine")
        if file.is_file() and now.is_file() and now.read_bytes() != file.read_bytes():
            found[str(file.relative_to(root / "pristine"))] = repr(now.read_bytes()[:CASE_SHOWN])
    return found


class Child:
    """One process: the targets in turn, a batch each; a line of JSON for each batch."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._pristine: Path = arguments.child / "pristine"
        self._root: Path = arguments.child / "work"
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._events: list[str] = []
        self._canaries = [f"{self._root}/{folder}/ran" for folder in ("source", "converted")]

    def run(self) -> int:
        """Work until the time is over."""
        ends = time.monotonic() + 60 * self._arguments.minutes
        faulthandler.enable()
        for number in (signal.SIGPROF, signal.SIGALRM):
            # Shows where it hangs, then lets the signal end the process.
            faulthandler.register(number, chain=True)
        sys.path.insert(0, str(Path(__file__).parents[1]))
        from targets import prepare
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity(logging.CRITICAL)
        if not self._pristine.exists():
            prepare(self._pristine)
        shutil.rmtree(self._root, ignore_errors=True)
        shutil.copytree(self._pristine, self._root)
        only = self._arguments.targets.split(",") if self._arguments.targets else None
        targets = importlib.import_module(self._arguments.module).TARGETS
        chosen = [target for target in targets if only is None or target.name in only]
        self._watch()
        left, number, after = self._arguments.inputs, self._arguments.round, self._arguments.after
        while left > 0 and time.monotonic() < ends:
            # What another child died of is not tried again in this round.
            skipped, after = [target.name for target in chosen].index(after) + 1 if after else 0, ""
            first = number == self._arguments.round
            for target in chosen[skipped:]:
                share = target.share / max(t.share for t in chosen)
                # Whole shares over many rounds: the slowest targets get an input in some rounds
                # only.
                rng = random.Random(f"{self._arguments.seed}/{number}/{target.name}")
                size = share * BATCH * 10
                size = min(left, int(size) + (rng.random() < size % 1), 20 if first else BATCH * 10)
                self._say({"target": target.name, "round": number})
                self._say(
                    {
                        "target": target.name,
                        "round": number,
                        **self._batch(target, rng, size, ends, first),
                    }
                )
                left -= size
                if left <= 0 or time.monotonic() >= ends:
                    break
            number += 1
        return 0

    def _say(self, facts: dict[str, Any]) -> None:
        print(json.dumps(facts), file=self._out, flush=True)

    def _watch(self) -> None:
        """Note what no file may cause, whatever becomes of the attempt."""

        def note(what: str) -> Any:
            def refuse(*arguments: Any, **_: Any) -> Any:
                self._events.append(f"{what} {arguments[:2]!r}")
                raise OSError(f"{what} while fuzzing")

            return refuse

        builtins.input = note("a question on the terminal")
        socket.socket.connect = note("a connection")  # type: ignore[method-assign]
        socket.getaddrinfo = note("a name looked up")

    def _batch(
        self, target: Any, rng: random.Random, size: int, ends: float, first: bool
    ) -> dict[str, Any]:
        folder = target.load(self._root)
        self._limit_memory(FIRST_ADDRESS_BYTES if first else ADDRESS_BYTES)
        started = time.process_time()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        done = refused = 0
        defects = []
        while done < size and (done % 50 or time.monotonic() < ends):
            case = target.make(target.originals, rng)
            for name, data in case.items():
                (folder / name).write_bytes(data)
            problem = self._run(target, folder)
            done += 1
            if isinstance(problem, dict):
                defects.append(
                    problem
                    | {"case": {name: repr(data[:CASE_SHOWN]) for name, data in case.items()}}
                )
            refused += problem is not None
            self._restore(target, folder, case)
        growth = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        spent = time.process_time() - started
        return {
            "inputs": done,
            "refused": refused,
            "defects": defects,
            "resident_growth": growth,
            "processor_seconds": spent,
        }

    @staticmethod
    def _restore(target: Any, folder: Path, case: dict[str, bytes]) -> None:
        """Put a folder back as it was; a conversion that goes on or is refused may have removed
        some or all of it."""
        folder.mkdir(exist_ok=True)
        there = set(os.listdir(folder))
        for name in there - target.originals.keys():
            (folder / name).unlink()
        for name in target.originals.keys() - (there - case.keys()):
            (folder / name).write_bytes(target.originals[name])

    @staticmethod
    def _limit_memory(more: int) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, hard))

    def _run(self, target: Any, folder: Path) -> dict[str, Any] | str | None:
        """None for an input that was read, "refused" for one that was refused, what is wrong for
        a defect."""
        from smoothrot_vllm.errors import SmoothRotError

        error: BaseException | None = None
        signal.setitimer(signal.ITIMER_PROF, self._arguments.case_seconds)
        # Of waiting, which takes no processor time.
        signal.setitimer(signal.ITIMER_REAL, 30 * self._arguments.case_seconds)
        try:
            target.run(folder)
        except KeyboardInterrupt:
            raise
        except BaseException as caught:
            error = caught
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for name in self._canaries:
            if os.path.exists(name):
                os.unlink(name)
                self._events.append("code of the files was run")
        if self._events:
            found, self._events = self._events, []
            return {
                "where": f"{target.name}: {found[0].partition('(')[0].strip()}",
                "target": target.name,
                "error": "; ".join(found),
            }
        if error is None:
            return None
        chain = _chain(error)
        memory = any(isinstance(e, MemoryError) or "allocate memory" in str(e) for e in chain)
        if isinstance(error, SmoothRotError) and not memory and str(error).strip():
            return "refused"
        place = traceback.extract_tb(chain[-1].__traceback__)[-1]
        mine = [
            f
            for f in traceback.extract_tb(error.__traceback__)
            if "/smoothrot_" in f.filename or "/offline/" in f.filename
        ]
        last = mine[-1] if mine else place
        where = (
            f"{target.name}: {type(chain[-1]).__name__} at"
            f" {Path(last.filename).name}:{last.lineno}, {place.name}"
        )
        text = "".join(traceback.format_exception(error))
        return {"where": where, "target": target.name, "error": text[-3000:]}


def _chain(error: BaseException) -> list[BaseException]:
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and len(chain) < 10:
        chain.append(cause)
    return chain


if __name__ == "__main__":
    sys.exit(main())
