# SPDX-License-Identifier: Apache-2.0
"""Layers converted by several processes: the bytes of one process, its errors, and no process
that outlives its parent."""

import hashlib
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from smoothrot_offline.config import make_config
from smoothrot_offline.convert import convert
from smoothrot_vllm.errors import CheckpointError, ConfigError, OutputError

MakeModel = Callable[..., Path]
CONFIG = make_config(scales="none")


def content(directory: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in directory.iterdir()
    }


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    found = []
    for child in process.children():
        with suppress(psutil.Error):
            if "spawn_main" in " ".join(child.cmdline()):
                found.append(child)
    return found


def stop_at_the_last_layer(message: str, _done: int, _total: int) -> None:
    if message == "layer 3 of 3":
        raise KeyboardInterrupt


@contextmanager
def every_worker_killed_as_it_starts() -> Iterator[None]:
    over = threading.Event()

    def kill() -> None:
        while not over.wait(0.02):
            for worker in workers_of(psutil.Process()):
                worker.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        yield
    finally:
        over.set()
        killer.join()


def test_interrupted_and_killed_workers_are_resumed_to_the_same_bytes(
    make_model: MakeModel, tmp_path: Path
) -> None:
    source, out = make_model(vocab_size=4096), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        convert(source, out, CONFIG, stop_at_the_last_layer, workers=2)
    assert workers_of(psutil.Process()) == []
    with (
        every_worker_killed_as_it_starts(),
        pytest.raises(OutputError, match="Use fewer --workers"),
    ):
        convert(source, out, CONFIG, workers=2)
    assert convert(source, out, CONFIG, workers=2).resumed_layers == 2
    convert(source, tmp_path / "one", CONFIG)
    assert content(out) == content(tmp_path / "one")


def test_an_error_in_a_worker_is_the_error_of_the_conversion(
    make_model: MakeModel, tmp_path: Path
) -> None:
    source = make_model()
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][0, 0] = torch.inf
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"tensor {name}: expected finite values, got 1"):
        convert(source, tmp_path / "out", CONFIG, workers=2)
    assert [path.name for path in tmp_path.iterdir()] == [source.name]
    assert workers_of(psutil.Process()) == []


def test_no_worker_outlives_a_killed_conversion(make_model: MakeModel, tmp_path: Path) -> None:
    source = make_model(num_hidden_layers=80)
    code = (
        "import sys; from pathlib import Path; from smoothrot_offline.config import"
        " make_config\nfrom smoothrot_offline.convert import convert\nif __name__ == '__main__':\n"
        " convert(Path(sys.argv[1]), Path(sys.argv[2]), make_config(scales='none'), lambda m, *_:"
        " print(m, flush=True), 2)\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    process = subprocess.Popen(
        [sys.executable, str(script), str(source), str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("layer 5 "):
            break
    workers = workers_of(psutil.Process(process.pid))
    assert workers
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    process.stdout.close()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert alive == []


def test_rounding_that_goes_from_layer_to_layer_takes_one_process(
    make_model: MakeModel, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="--workers 2: expected 1 with --rounding gptq"):
        convert(make_model(), tmp_path / "out", make_config(rounding="gptq"), workers=2)
