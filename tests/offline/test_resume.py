# SPDX-License-Identifier: Apache-2.0
"""A conversion that is killed anywhere goes on where it stopped, and ends with the bytes of one
that was not."""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import run_forked
from refusal import edit_config

from smoothrot_offline.check.verify import verify
from smoothrot_offline.config import make_config
from smoothrot_offline.convert import convert
from smoothrot_offline.output.directory import JOURNAL_NAME
from smoothrot_vllm.errors import ConfigError, ResumeError

MakeModel = Callable[..., Path]
CALIBRATION = {"calib_samples": 2, "calib_seqlen": 16}
PLAIN = {"scales": "none"}
# One shard of a mebibyte is less than the whole, so that shards are finished between layers.
FAMILY = {"vocab_size": 4096}

# Converts in forked children, so that torch is imported once. A child kills itself before its Nth
# flush, rename or unlink: what a crash can interrupt lies between these. Prints a line for each
# kill, with what was left to see.
DRIVER = """
import json, os, signal, sys, traceback
from pathlib import Path
import torch
from smoothrot_offline.config import make_config
from smoothrot_offline.convert import convert
from smoothrot_offline.check.verify import verify
from smoothrot_offline.output.directory import JOURNAL_NAME
from smoothrot_vllm.errors import SmoothRotError

torch.set_num_threads(1)
source, folder = Path(sys.argv[1]), Path(sys.argv[2])
options, stride = json.loads(sys.argv[3]), int(sys.argv[4])

def run(out, kill_at):
    child = os.fork()
    if child == 0:
        # Makes torch's pool anew after the fork, before threads of transformers race for it: one
        # of them could find none ("Invalid thread pool!").
        torch.set_num_threads(1)
        def counting(call):
            def counted(*arguments, **keywords):
                calls[0] += 1
                if calls[0] == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*arguments, **keywords)
            return counted
        calls = [0]
        for name in ("fsync", "rename", "unlink"):
            setattr(os, name, counting(getattr(os, name)))
        status = 1
        try:
            convert(source, out, make_config(**options))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

assert run(folder / "whole", 0) == 0
point = 1
while True:
    out = folder / f"killed-{point}"
    code = run(out, point)
    if code == 0:
        break
    assert code == -signal.SIGKILL, code
    whole = []
    for path in (out, out.with_name(out.name + ".partial")):
        try:
            whole += [path.name] * verify(path).ok
        except SmoothRotError:
            pass
    # Whole and without a journal, it is finished, and another run would rightly refuse to touch it.
    if whole != [out.name] or (out / JOURNAL_NAME).exists():
        assert run(out, 0) == 0
    print(json.dumps({"point": point, "out": str(out), "whole": whole}), flush=True)
    point += stride
"""


def content(directory: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in directory.iterdir()
    }


@pytest.mark.parametrize(
    ("options", "stride", "least"),
    [
        (PLAIN, 2, 18),
        (CALIBRATION | {"rounding": "gptaq", "clip_search": True}, 9, 4),
        (CALIBRATION | {"rounding": "gptq", "hessian": "model"}, 9, 4),
        (PLAIN | {"calib_seqlen": 16, "distill_steps": 1}, 9, 4),
    ],
    ids=["rtn", "gptaq", "by-the-model", "distilled"],
)
def test_kill_9_anywhere_and_the_same_command_finishes_with_the_same_bytes(
    make_model: MakeModel, tmp_path: Path, options: dict[str, object], stride: int, least: int
) -> None:
    source, folder = make_model(**FAMILY), tmp_path / "outputs"
    folder.mkdir()
    done = run_forked(DRIVER, source, folder, json.dumps(options), stride, timeout=600)
    assert done.returncode == 0, done.stderr
    kills = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kills) >= least
    expected = content(folder / "whole")
    for kill in kills:
        assert content(Path(kill["out"])) == expected, f"killed before call {kill['point']}"
        assert all(name == Path(kill["out"]).name for name in kill["whole"]), (
            "no partial directory looks whole"
        )
    assert list(folder.glob("*.partial")) == []


def stop_at(layer: int) -> Callable[[str, int, int], None]:
    def progress(message: str, _done: int, _total: int) -> None:
        if message.startswith(f"layer {layer + 1} "):
            raise KeyboardInterrupt

    return progress


def interrupted(make_model: MakeModel, tmp_path: Path, **options: object) -> tuple[Path, Path]:
    """A source, and the path of an output whose conversion was stopped after its second layer."""
    source, out = make_model(), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        convert(source, out, make_config(**PLAIN | options), stop_at(2))
    assert (tmp_path / "out.partial" / JOURNAL_NAME).is_file()
    return source, out


def test_finished_layers_are_not_computed_again(make_model: MakeModel, tmp_path: Path) -> None:
    source, out = interrupted(make_model, tmp_path)
    computed = []
    done = convert(source, out, make_config(**PLAIN), lambda message, *_: computed.append(message))
    assert done.resumed_layers == 2
    assert [message for message in computed if message.startswith("layer")] == [
        "layer 1 of 3, finished before",
        "layer 2 of 3, finished before",
        "layer 3 of 3",
    ]
    assert verify(out).ok


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"seed": 5}, "options: seed: .* had 0, this one has 5"),
        ({"lm_head_bits": 8}, "options: lm_head_bits"),
    ],
)
def test_other_options_are_refused_by_name_and_leave_the_work_alone(
    make_model: MakeModel, tmp_path: Path, options: dict[str, object], field: str
) -> None:
    source, out = interrupted(make_model, tmp_path)
    before = content(tmp_path / "out.partial")
    with pytest.raises(ResumeError, match=field):
        convert(source, out, make_config(**PLAIN | options))
    assert content(tmp_path / "out.partial") == before


@pytest.mark.parametrize(
    ("function", "value", "field"),
    [
        ("smoothrot_offline.output.journal.package_versions", {"torch": "0"}, "versions: "),
        ("torch.get_num_threads", 77, "machine: threads: .* this one has 77"),
    ],
)
def test_other_software_or_machine_is_refused_by_name(
    make_model: MakeModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    function: str,
    value: object,
    field: str,
) -> None:
    source, out = interrupted(make_model, tmp_path)
    monkeypatch.setattr(function, lambda: value)
    with pytest.raises(ResumeError, match=field):
        convert(source, out, make_config(**PLAIN))


def test_other_source_or_calibration_text_is_refused_by_name(
    make_model: MakeModel, tmp_path: Path
) -> None:
    text = tmp_path / "text"
    text.write_text("one")
    source, out = interrupted(make_model, tmp_path, calib=str(text))
    text.write_text("another")
    with pytest.raises(ResumeError, match="calibration: text"):
        convert(source, out, make_config(**PLAIN, calib=str(text)))
    text.write_text("one")
    edit_config(source, rms_norm_eps=1e-3)
    with pytest.raises(ResumeError, match=r"source: config\.json"):
        convert(source, out, make_config(**PLAIN, calib=str(text)))


@pytest.mark.parametrize(
    "damage", [lambda file: file.unlink(), lambda file: file.write_bytes(file.read_bytes()[:-1])]
)
def test_damaged_work_is_refused_by_file(
    make_model: MakeModel, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    source, out = interrupted(make_model, tmp_path)
    damage(tmp_path / "out.partial" / "model-00003-of-00005.safetensors")
    with pytest.raises(ResumeError, match=r"model-00003-of-00005\.safetensors"):
        convert(source, out, make_config(**PLAIN))


LAYER = '"layer": {"weight_error": {}}, "hidden"'
RECORD = '{"file": "model-00004-of-00005.safetensors", "dtype": "F32", "shape": [1], "sha256": "0"}'


@pytest.mark.parametrize(
    "line",
    [
        *('{"layer": {}}', '{"tensors": 3}', '{"decisions": {}}', "[]", "{", "[" * 10**5),
        f'{{"tensors": {{"a": {RECORD}}}, "layer": {{"weight_error": {{}}}}}}',
        f'{{"tensors": {{"a": {RECORD}}}, {LAYER}: {{"file": "../x.safetensors", "sha256": "0"}}}}',
        f'{{"tensors": {{"a": {RECORD}}}, {LAYER}: {{"file": 3, "sha256": "0"}}}}',
        f'{{"tensors": {{"a": {RECORD.replace("model-00004", "../precious")}}}, {LAYER}: null}}',
        f'{{"tensors": {{}}, {LAYER}: null}}',
        '{"decisions": {}, "file": "precious.safetensors", "sha256": "0"}',
    ],
)
def test_damaged_journal_is_refused_by_file(
    make_model: MakeModel, tmp_path: Path, line: str
) -> None:
    source, out = interrupted(make_model, tmp_path)
    journal = tmp_path / "out.partial" / JOURNAL_NAME
    journal.write_text(journal.read_text() + line + "\n")
    (tmp_path / "precious.safetensors").touch()
    with pytest.raises(ResumeError, match=r"journal\.jsonl: expected .* to start over"):
        convert(source, out, make_config(**PLAIN))
    assert (tmp_path / "precious.safetensors").exists()


@pytest.mark.parametrize(
    "facts",
    [{}, {"seed": 0, "studies": "x"}, {"seed": 0, "studies": [3], "learned": None, "schema": {}}],
)
def test_damaged_decisions_of_a_journal_are_refused(
    make_model: MakeModel, tmp_path: Path, facts: dict[str, object]
) -> None:
    options = CALIBRATION | {"rounding": "gptq"}
    source, out = interrupted(make_model, tmp_path, **options)
    journal = tmp_path / "out.partial" / JOURNAL_NAME
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    lines[1]["decisions"] = facts
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ResumeError, match=r"journal\.jsonl: decisions: expected"):
        convert(source, out, make_config(**PLAIN | options))


def test_torn_last_line_of_the_journal_is_work_not_finished(
    make_model: MakeModel, tmp_path: Path
) -> None:
    source, out = interrupted(make_model, tmp_path)
    journal = tmp_path / "out.partial" / JOURNAL_NAME
    journal.write_bytes(journal.read_bytes()[:-9])
    assert convert(source, out, make_config(**PLAIN)).resumed_layers == 1
    assert verify(out).ok


def test_second_writer_is_told_who_the_first_is(make_model: MakeModel, tmp_path: Path) -> None:
    source, out = interrupted(make_model, tmp_path)
    partial = tmp_path / "out.partial"
    (partial / "resume-holder.txt").write_text("process 123 on there\n")
    descriptor = os.open(partial, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    before = content(partial)
    try:
        with pytest.raises(ConfigError, match=r"process 123 on there is converting into .*out"):
            convert(source, out, make_config(**PLAIN))
    finally:
        os.close(descriptor)
    assert content(partial) == before


def test_partial_directory_of_someone_else_is_left_alone(
    make_model: MakeModel, tmp_path: Path
) -> None:
    strange = tmp_path / "out.partial"
    strange.mkdir()
    (strange / "precious").write_text("data")
    with pytest.raises(
        ConfigError, match="expected the work of an interrupted conversion, got precious"
    ):
        convert(make_model(), tmp_path / "out", make_config(**PLAIN))
    assert (strange / "precious").read_text() == "data"


def test_learned_rotations_and_scales_survive(make_model: MakeModel, tmp_path: Path) -> None:
    options = CALIBRATION | {
        "scales": "l2",
        "rotations": "learned",
        "rotation_steps": 2,
        "keep_8bit": 0.3,
    }
    source, out = interrupted(make_model, tmp_path, **options)
    convert(source, out, make_config(**options))
    convert(source, tmp_path / "whole", make_config(**options))
    assert content(out) == content(tmp_path / "whole")
