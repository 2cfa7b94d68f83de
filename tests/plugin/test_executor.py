# SPDX-License-Identifier: Apache-2.0
"""Where the worker runs: which configurations get our executor, which cores it takes, and what
it refuses."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import vllm.utils.cpu_resource_utils as cpu_resources
from tiny_models import save_tiny_model
from vllm import EngineArgs
from vllm.utils.cpu_resource_utils import LogicalCPUInfo
from vllm.v1.executor import Executor

from smoothrot_vllm.errors import ConfigError, UnsupportedPlatformError
from smoothrot_vllm.plugin import register as plugin
from smoothrot_vllm.plugin.executor import InEngineExecutor, cores_of
from smoothrot_vllm.plugin.patches import EXECUTOR

# (logical, physical, memory node): two nodes of two cores with two threads each; the process may
# not use CPU 0.
CPUS = [(1, 1, 0), (2, 2, 1), (3, 3, 1), (4, 0, 0), (5, 1, 0), (6, 2, 1), (7, 3, 1)]


@pytest.fixture(scope="module")
def converted(tiny_converted: Callable[..., Path]) -> str:
    plugin.register()
    return str(
        tiny_converted("llama", "--activation-bits", "8", "--scales", "none", "--max-tp", "2")
    )


@pytest.mark.parametrize(
    ("options", "executor"),
    [
        ({}, EXECUTOR),
        ({"distributed_executor_backend": "uni"}, EXECUTOR),
        ({"distributed_executor_backend": "mp"}, "mp"),
        ({"tensor_parallel_size": 2}, "mp"),
    ],
)
def test_a_single_worker_of_a_converted_model_is_put_into_the_engine(
    converted: str, options: dict[str, object], executor: str
) -> None:
    config = EngineArgs(converted, **options).create_engine_config()  # type: ignore[arg-type]
    assert config.parallel_config.distributed_executor_backend == executor
    assert (Executor.get_class(config) is InEngineExecutor) == (executor == EXECUTOR)


def test_vllm_in_one_process_keeps_its_own(converted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    assert (
        EngineArgs(converted).create_engine_config().parallel_config.distributed_executor_backend
        == "uni"
    )


def test_other_models_are_left_to_vllm(tmp_path: Path) -> None:
    plugin.register()
    source = str(save_tiny_model(tmp_path / "source", "llama"))
    assert (
        EngineArgs(source).create_engine_config().parallel_config.distributed_executor_backend
        == "mp"
    )
    chosen = EngineArgs(source, distributed_executor_backend=EXECUTOR).create_engine_config()
    assert Executor.get_class(chosen) is InEngineExecutor


def test_more_than_one_worker_is_refused_before_any_starts(converted: str) -> None:
    config = EngineArgs(
        converted, tensor_parallel_size=2, distributed_executor_backend=EXECUTOR
    ).create_engine_config()
    with pytest.raises(
        ConfigError,
        match="expected one worker, got tensor, pipeline and data parallel sizes of 2, 1, 1",
    ):
        InEngineExecutor(config)


def test_another_device_is_refused(converted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineArgs(converted).create_engine_config()
    monkeypatch.setattr("smoothrot_vllm.plugin.executor.current_platform.is_cpu", lambda: False)
    with pytest.raises(UnsupportedPlatformError, match="expected vLLM for CPUs"):
        InEngineExecutor(config)


@pytest.fixture
def cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        cpu_resources, "get_allowed_cpu_list", lambda: [LogicalCPUInfo(*cpu) for cpu in CPUS]
    )
    monkeypatch.setattr(cpu_resources, "get_visible_memory_node", lambda: [0, 1])


@pytest.mark.usefixtures("cpus")
@pytest.mark.parametrize(
    ("binding", "reserved", "cores"),
    [
        ("auto", 0, [4, 5]),
        ("auto", 1, [4]),
        ("nobind", 1, None),
        ("1,3", 1, [1, 3]),
        ("2-4,6,3", 0, [2, 3, 4, 6]),
    ],
)
def test_cores_of_a_binding(binding: str, reserved: int, cores: list[int] | None) -> None:
    assert cores_of(binding, reserved) == cores


@pytest.mark.usefixtures("cpus")
@pytest.mark.parametrize(("nodes", "cores"), [([1], [6, 7]), ([2, 1, 0], [6, 7])])
def test_automatic_cores_are_of_the_first_visible_node_with_any(
    monkeypatch: pytest.MonkeyPatch, nodes: list[int], cores: list[int]
) -> None:
    monkeypatch.setattr(cpu_resources, "get_visible_memory_node", lambda: nodes)
    assert cores_of("auto", 0) == cores


@pytest.mark.usefixtures("cpus")
@pytest.mark.parametrize("binding", ["0-1", "8", "", "1|2", "all", "3-"])
def test_cores_that_cannot_be_had_are_refused(binding: str) -> None:
    with pytest.raises(
        ConfigError,
        match=r"VLLM_CPU_OMP_THREADS_BIND: expected .* among 1, 2, 3, 4, 5, 6, 7.*; got",
    ):
        cores_of(binding, 0)


@pytest.mark.usefixtures("cpus")
@pytest.mark.parametrize(("nodes", "reserved", "found"), [([0, 1], 2, 2), ([2], 0, 0)])
def test_too_few_automatic_cores_are_refused(
    monkeypatch: pytest.MonkeyPatch, nodes: list[int], reserved: int, found: int
) -> None:
    monkeypatch.setattr(cpu_resources, "get_visible_memory_node", lambda: nodes)
    with pytest.raises(
        ConfigError,
        match=(
            f"more than the {reserved} cores of VLLM_CPU_NUM_OF_RESERVED_CPU .*, got {found} among"
        ),
    ):
        cores_of("auto", reserved)


def test_threads_that_openmp_starts_inherit_the_cores() -> None:
    core = min(os.sched_getaffinity(0))
    code = f"""
import os, torch
from smoothrot_vllm.plugin.executor import take_cores
before = set(os.listdir("/proc/self/task"))
take_cores([{core}])
assert torch.get_num_threads() == 1
torch.set_num_threads(3)
torch.rand(1 << 20).exp()
started = set(os.listdir("/proc/self/task")) - before
assert len(started) >= 2
assert all(os.sched_getaffinity(int(thread)) == {{{core}}} for thread in started)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
