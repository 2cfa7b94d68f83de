# SPDX-License-Identifier: Apache-2.0
"""Run ``vllm serve`` as a user does, in a process of its own, and be sure that nothing of it is
left afterwards."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
from openai import OpenAI

from benchmarks.support import machine

HOST = "127.0.0.1"
KEY = "none"
"""What the client says it is; a server asks only if it was given ``--api-key``."""
STARTUP_SECONDS = 600
SHUTDOWN_SECONDS = 30


class ServerError(RuntimeError):
    """The server ended or did not answer in time; the message ends with the last lines of its
    log."""


class VllmServer:
    """Context manager of one server on a free port of the loopback interface.

    Args:
        model: directory or hub id.
        log: file that takes everything the server prints.
        options: of ``vllm serve``, as on the command line.
        tensor_parallel: number of ranks, which share the cores evenly.
        pipeline_parallel: number of stages, each of as many ranks.
        environment: variables set for the server besides those it needs on a small machine.
        executable: ``vllm`` of another environment than this one's.

    Raises:
        ServerError: it ended before it could answer, or took more than ten minutes.
    """

    def __init__(
        self,
        model: str | Path,
        log: Path,
        *options: str,
        tensor_parallel: int = 1,
        pipeline_parallel: int = 1,
        environment: dict[str, str] | None = None,
        executable: Path | None = None,
    ) -> None:
        self.model = str(model)
        self.log = log
        self.port = _free_port()
        vllm = executable or Path(sys.executable).with_name("vllm")
        self._command = [str(vllm), "serve", self.model, "--host", HOST, "--port", str(self.port)]
        self._command += ["--tensor-parallel-size", str(tensor_parallel), *options]
        self._command += (
            ["--pipeline-parallel-size", str(pipeline_parallel)] if pipeline_parallel > 1 else []
        )
        self._environment = {
            **os.environ,
            **small_machine(tensor_parallel * pipeline_parallel),
            **(environment or {}),
        }
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        try:
            self._wait_until_healthy()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def client(self) -> Any:
        """The official client, pointed at this server. Not typed: vLLM's answers have more than the
        client's types."""
        return OpenAI(
            base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=STARTUP_SECONDS
        )

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://{HOST}:{self.port}"

    @property
    def pid(self) -> int:
        """Process of the running server."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start the process without waiting for it to answer."""
        with self.log.open("wb") as log:
            # A session of its own: signals of the terminal do not reach it, and its children can be
            # ended with it.
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self, seconds: float = STARTUP_SECONDS) -> int:
        """Exit status of a server that ends by itself."""
        assert self._process is not None
        return self._process.wait(seconds)

    def stop(self) -> None:
        """End the server politely, then whatever is left of its process group."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(SHUTDOWN_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None

    def _wait_until_healthy(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + STARTUP_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise ServerError(
                    f"vllm serve {self.model} ended with status"
                    f" {self._process.returncode}:\n{self._tail()}"
                )
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        raise ServerError(
            f"vllm serve {self.model} did not answer within {STARTUP_SECONDS} s:\n{self._tail()}"
        )

    def _tail(self, lines: int = 30) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


def _free_port() -> int:
    with socket.socket() as s:
        s.bind((HOST, 0))
        port: int = s.getsockname()[1]
        return port


def small_machine(ranks: int) -> dict[str, str]:
    """vLLM's default keeps a core for itself; give every core to the model, each rank its share."""
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // ranks)
    binding = "|".join(
        ",".join(map(str, cores[rank * share : (rank + 1) * share])) for rank in range(ranks)
    )
    return {
        "VLLM_CPU_OMP_THREADS_BIND": binding,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }


def processes(pid: int) -> set[int]:
    """The process of a server and all below it."""
    process = psutil.Process(pid)
    return {process.pid, *(child.pid for child in process.children(recursive=True))}


def memory(pid: int, field: str) -> int:
    """Bytes of ``VmRSS`` or ``VmHWM`` of a process and all below it; shared pages count in each."""
    return sum(machine.memory(member, field) for member in processes(pid))
