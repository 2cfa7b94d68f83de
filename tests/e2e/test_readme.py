# SPDX-License-Identifier: Apache-2.0
"""The commands of README and quickstart, run as they stand there, on a tiny model."""

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from tiny_models import BIN, REPOSITORY, SHORT_TEXT

from benchmarks.support.server import VllmServer


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (REPOSITORY / page).read_text(), flags=re.DOTALL)


def commands(page: str) -> list[str]:
    return [
        line.partition("  #")[0].strip()
        for block in blocks(page, "bash")
        for line in block.replace("\\\n", "").splitlines()
    ]


COMMANDS = commands("README.md")
QUICKSTART = "docs/quickstart.md"

pytestmark = [pytest.mark.serve, pytest.mark.timeout(1200)]


def run(command: str, folder: Path) -> str:
    environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"}
    result = subprocess.run(
        command,
        shell=True,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def test_converting_and_serving_commands_work_in_the_readmes_order(
    tiny_converted: Callable[..., Path], tmp_path: Path
) -> None:
    source = tiny_converted("llama").parent / "source"
    (tmp_path / "MODEL").symlink_to(source)
    for name in ("CALIB.txt", "TEXT.txt"):
        (tmp_path / name).symlink_to(SHORT_TEXT)
    ours = [command for command in COMMANDS if command.startswith("smoothrot-convert")]
    assert [command.split()[1] for command in ours] == [
        "plan",
        "run",
        "verify",
        "eval",
        "report",
        "analyze",
    ]
    for command in ours:
        run(command, tmp_path)
    (serve,) = [command for command in COMMANDS if command.startswith("vllm serve")]
    assert serve == "vllm serve OUT --quantization smoothrot --host 127.0.0.1"
    options = ["--quantization", "smoothrot", "--served-model-name", "OUT"]
    with VllmServer(tmp_path / "OUT", tmp_path / "log", *options) as server:
        answer = server.client.completions.create(
            model="OUT", prompt="Hello", max_tokens=4, extra_body={"ignore_eos": True}
        )
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 4
        own_port = f"127.0.0.1:{server.port}"
        (curl,) = [command for command in commands(QUICKSTART) if command.startswith("curl")]
        assert json.loads(run(curl.replace("127.0.0.1:8000", own_port), tmp_path))["usage"][
            "completion_tokens"
        ] in range(1, 9)
        (client,) = blocks(QUICKSTART, "python")
        (tmp_path / "client.py").write_text(client.replace("127.0.0.1:8000", own_port))
        run("python client.py", tmp_path)


def test_the_quickstarts_other_commands_are_the_readmes() -> None:
    own = [command for command in commands(QUICKSTART) if not command.startswith("curl")]
    assert own == [command for command in COMMANDS if command in own]
    assert len(own) == 7


@pytest.mark.slow
def test_demo_command_converts_serves_and_compares(tiny_converted: Callable[..., Path]) -> None:
    assert "make demo" in COMMANDS
    source = tiny_converted("llama").parent / "source"
    printed = run(f"make demo MODEL={source}", REPOSITORY)
    assert "perplexity" in printed


def test_gpu_commands_add_this_package_alone_to_vllms_environment(tmp_path: Path) -> None:
    """pip as it stands there, short of installing: what this environment has is vLLM for CPU and
    its torch."""
    vllm, ours = [command for command in COMMANDS if command.startswith("pip install")]

    def would_install(command: str, *options: str) -> dict[str, dict[str, Any]]:
        report = tmp_path / "report.json"
        run(
            " ".join(
                [
                    command.replace("install", "install -q --dry-run", 1),
                    f"--report {report}",
                    *options,
                ]
            ),
            REPOSITORY,
        )
        return {
            package["metadata"]["name"]: package["metadata"]
            for package in json.loads(report.read_text())["install"]
        }

    new = would_install(ours)
    assert set(new) == {"smoothrot-vllm"}
    our_torch = torch_of(new["smoothrot-vllm"])
    their_torch = torch_of(would_install(vllm, "--no-deps")["vllm"])
    (pinned,) = their_torch
    assert pinned.operator == "=="
    assert our_torch.contains(pinned.version)


def torch_of(metadata: dict[str, Any]) -> SpecifierSet:
    required = (Requirement(line) for line in metadata["requires_dist"])
    (found,) = (
        requirement.specifier
        for requirement in required
        if requirement.name == "torch" and requirement.marker is None
    )
    return found


def test_set_up_and_test_commands_are_make_targets() -> None:
    elsewhere = ("smoothrot-convert", "vllm serve", "make demo", "pip install")
    rest = [command for command in COMMANDS if not command.startswith(elsewhere)]
    assert rest == ["make env", "source .venv/bin/activate", "make test", "make wheel"]
    run("make --dry-run env test wheel", REPOSITORY)
