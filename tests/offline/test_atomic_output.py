# SPDX-License-Identifier: Apache-2.0
"""The output appears as a whole or not at all, whatever kills the run."""

import errno
import fcntl
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import COMMAND, run_forked

from smoothrot_offline.check.verify import verify
from smoothrot_offline.config import make_config
from smoothrot_offline.convert import convert
from smoothrot_offline.output.directory import OutputDirectory
from smoothrot_offline.report.model import load_model
from smoothrot_vllm.errors import CheckpointError, ConfigError, SmoothRotError

OPTIONS = make_config(scales="none")
MakeModel = Callable[..., Path]

# Runs the command as a user would, but signals itself when the pipeline reports the given step.
DRIVER = """
import contextlib, os, signal, sys
from smoothrot_offline import cli

step, which = int(sys.argv[1]), int(sys.argv[2])

@contextlib.contextmanager
def signalling():
    yield lambda message, done, total: os.kill(os.getpid(), which) if done == step else None

# A shell starts background jobs with Ctrl-C ignored, and the tests may be one.
signal.signal(signal.SIGINT, signal.default_int_handler)
cli.progress_bar = signalling
sys.argv[1:] = ["run", *sys.argv[3:], "--preset", "none", "--scales", "none"]
cli.main()
"""
# The kernel refuses to let a file grow further, as a full disk would: the embedding of 4096 rows of
# 72 bfloat16 fits with its header, the head of as many does not with the norm beside it.
FULL_DISK = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (4096 * 144 + 256,) * 2)
"""


def run_and_signal(
    source: Path, out: Path, step: int, which: signal.Signals
) -> subprocess.CompletedProcess[str]:
    return run_forked(DRIVER, step, int(which), source, out)


def leftovers(out: Path) -> list[Path]:
    return sorted(out.parent.glob(f"{out.name}.partial*"))


def test_kill_9_leaves_nothing_that_loads_and_the_next_run_goes_on(
    make_model: MakeModel, tmp_path: Path
) -> None:
    source, out = make_model(vocab_size=16384), tmp_path / "out"
    killed = run_and_signal(source, out, 5, signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not out.exists()
    (partial,) = leftovers(out)
    with pytest.raises(SmoothRotError):
        verify(partial)
    with pytest.raises((SmoothRotError, OSError, ValueError)):
        load_model(partial)
    done = convert(source, out, OPTIONS)
    assert done.resumed_layers == 2
    assert leftovers(out) == []
    assert verify(out).ok


def test_configuration_and_manifest_come_after_everything_they_describe(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    write_json = OutputDirectory.write_json

    def recording(self: OutputDirectory, name: str, content: dict[str, object]) -> None:
        written.append(name)
        if name == "config.json.incomplete":
            assert (self.path / "model-00005-of-00005.safetensors").is_file()
        write_json(self, name, content)

    monkeypatch.setattr(OutputDirectory, "write_json", recording)
    convert(make_model(), tmp_path / "out", OPTIONS)
    assert written == [
        "model.safetensors.index.json",
        "config.json.incomplete",
        "smoothrot_manifest.json",
    ], "what makes the directory a model comes after its weights"


@pytest.mark.parametrize(("which", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_polite_kill_and_ctrl_c_keep_finished_layers_and_say_how_to_go_on(
    make_model: MakeModel, tmp_path: Path, which: signal.Signals, code: int
) -> None:
    source, out = make_model(), tmp_path / "out"
    killed = run_and_signal(source, out, 5, which)
    assert killed.returncode == code, killed.stderr
    assert "interrupted: run the same command again to go on" in killed.stderr
    assert "Traceback" not in killed.stderr
    assert not out.exists()
    assert convert(source, out, OPTIONS).resumed_layers == 2
    assert leftovers(out) == []


def test_polite_kill_before_a_layer_is_finished_leaves_nothing(
    make_model: MakeModel, tmp_path: Path
) -> None:
    killed = run_and_signal(make_model(), tmp_path / "out", 1, signal.SIGTERM)
    assert "nothing was kept" in killed.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_disk_full_is_one_clear_line_and_leaves_nothing_that_looks_whole(
    make_model: MakeModel, tmp_path: Path
) -> None:
    source, out = make_model(vocab_size=4096), tmp_path / "out"
    failed = run_forked(
        FULL_DISK + COMMAND, "run", source, out, "--preset", "none", "--scales", "none"
    )
    assert failed.returncode == 1
    assert failed.stdout == ""
    (line,) = [line for line in failed.stderr.splitlines() if line.startswith("error:")]
    assert "could not be written" in line
    assert "Traceback" not in failed.stderr
    assert not out.exists()
    (partial,) = leftovers(out)
    with pytest.raises(SmoothRotError):
        verify(partial)
    assert convert(source, out, OPTIONS).resumed_layers == 3
    assert leftovers(out) == []


def test_full_disk_is_named_as_such(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("shutil.copyfile", fail)
    with pytest.raises(CheckpointError, match=r"No space left on device.*Free some space"):
        convert(make_model(), tmp_path / "out", OPTIONS)
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    assert convert(tmp_path / "model", tmp_path / "out", OPTIONS).resumed_layers == 3


def test_conversion_that_fails_before_a_layer_is_finished_leaves_nothing(
    make_model: MakeModel, tmp_path: Path
) -> None:
    def fail(_message: str, done: int, _total: int) -> None:
        if done == 2:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        convert(make_model(), tmp_path / "out", OPTIONS, fail)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_existing_output_is_refused_and_left_alone(make_model: MakeModel, tmp_path: Path) -> None:
    source, out = make_model(), tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("data")
    with pytest.raises(ConfigError, match="expected no such path or an empty directory"):
        convert(source, out, OPTIONS)
    assert (out / "precious").read_text() == "data"
    assert leftovers(out) == []


def test_empty_output_directory_is_used(make_model: MakeModel, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    convert(make_model(), tmp_path / "out", OPTIONS)
    assert verify(tmp_path / "out").ok


def test_leftovers_go_and_those_of_live_runs_and_others_stay(
    tmp_path: Path,
) -> None:
    others = [
        tmp_path / name for name in ("out.partial", "out.partial-backup", "other.partial-0123abcd")
    ]
    dead, live = tmp_path / "out.partial-0123abcd", tmp_path / "out.partial-4567abcd"
    for path in (*others, dead):
        path.mkdir()
    with OutputDirectory(tmp_path / "out") as directory:
        assert directory.removed == [dead]
    live.mkdir()
    descriptor = os.open(live, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with (
            pytest.raises(ConfigError, match="another conversion"),
            OutputDirectory(tmp_path / "out"),
        ):
            pass
    finally:
        os.close(descriptor)
    assert all(path.is_dir() for path in (*others, live))


def test_files_have_the_permissions_of_ordinary_files(
    make_model: MakeModel, tmp_path: Path
) -> None:
    mask = os.umask(0o022)
    try:
        convert(make_model(), tmp_path / "out", OPTIONS)
    finally:
        os.umask(mask)
    assert {oct(file.stat().st_mode & 0o777) for file in (tmp_path / "out").iterdir()} == {"0o644"}
