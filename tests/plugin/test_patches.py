# SPDX-License-Identifier: Apache-2.0
"""What is replaced in vLLM: the workers of converted models get methods of ours, those of others
keep vLLM's, whichever of vLLM's runners they have."""

import inspect
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from configs import make_config
from vllm.lora.worker_manager import WorkerLoRAManager
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin
from vllm.v1.worker.worker_base import WorkerWrapperBase

from smoothrot_vllm.errors import CheckpointError, ConfigError
from smoothrot_vllm.format import ADAPTER_BASE, ADAPTER_CONFIG
from smoothrot_vllm.plugin import register as plugin

DIGEST = "a" * 64


class Runner:
    """What vLLM's runners have in common, as far as it is replaced."""

    def __init__(self) -> None:
        self.model_config = SimpleNamespace(model="served")
        self.reloaded: list[tuple[Any, ...]] = []
        self.read: list[str] = []
        self.lora_manager: Any = None
        self.error: Exception | None = None

    def reload_weights(self, *arguments: Any) -> None:
        self.reloaded.append(arguments)
        if self.error is not None:
            raise self.error

    def get_model(self) -> torch.nn.Module:
        return torch.nn.Module()

    def load_lora_model(self, model: object, config: object, device: object) -> object:
        self.lora_manager = SimpleNamespace(
            _load_adapter=lambda request: self.read.append(request.lora_path)
        )
        return model

    def execute_model(self) -> str:
        return "tokens"


@pytest.fixture
def runner_of() -> Callable[[object], Runner]:
    """A runner as the worker of a model with this quantization has it."""
    plugin.register()

    def made(quant_config: object) -> Runner:
        runner = Runner()
        wrapper: Any = WorkerWrapperBase()
        wrapper.vllm_config = SimpleNamespace(quant_config=quant_config, speculative_config=None)
        wrapper.worker = SimpleNamespace(init_device=lambda: None, model_runner=runner)
        wrapper.init_device()
        return runner

    return made


@pytest.fixture(autouse=True)
def _no_current_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "vllm.v1.worker.worker_base.set_current_vllm_config", lambda _: nullcontext()
    )


def test_the_workers_of_others_keep_vllms_methods(runner_of: Callable[[object], Runner]) -> None:
    for quant_config in (None, object()):
        runner = runner_of(quant_config)
        assert not {"reload_weights", "load_lora_model", "execute_model"} & set(vars(runner))


def test_weights_that_are_no_checkpoint_are_refused(
    runner_of: Callable[[object], Runner],
) -> None:
    runner = runner_of(make_config())
    with pytest.raises(ConfigError, match="expected is_checkpoint_format true"):
        runner.reload_weights([], None, False)
    assert runner.reloaded == []


def test_after_a_failed_reload_no_request_is_answered_until_one_succeeds(
    runner_of: Callable[[object], Runner],
) -> None:
    runner = runner_of(make_config())
    runner.reload_weights(iter(()))
    assert runner.execute_model() == "tokens"
    runner.error = CheckpointError("half-way.")
    with pytest.raises(CheckpointError, match="half-way"):
        runner.reload_weights(iter(()))
    with pytest.raises(CheckpointError, match=r"not wholly loaded again: half-way\. Reload"):
        runner.execute_model()
    runner.error = None
    runner.reload_weights(iter(()))
    assert runner.execute_model() == "tokens"


def test_an_adapter_is_checked_before_vllm_reads_it(
    runner_of: Callable[[object], Runner], tmp_path: Path
) -> None:
    runner = runner_of(make_config(transform_sha256=DIGEST))
    model = object()
    assert runner.load_lora_model(model, None, None) is model
    request = SimpleNamespace(lora_path=str(tmp_path))
    (tmp_path / ADAPTER_CONFIG).write_text("{}")
    with pytest.raises(ConfigError, match="of the original model"):
        runner.lora_manager._load_adapter(request)
    assert runner.read == []
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps({ADAPTER_BASE: DIGEST}))
    runner.lora_manager._load_adapter(request)
    assert runner.read == [str(tmp_path)]


def test_vllm_has_what_is_replaced() -> None:
    names = ["self", "weights_iterator", "weights_path", "is_checkpoint_format"]
    assert list(inspect.signature(GPUModelRunner.reload_weights).parameters) == names
    assert list(inspect.signature(WorkerLoRAManager._load_adapter).parameters) == [
        "self",
        "lora_request",
    ]
    assert issubclass(GPUModelRunner, LoRAModelRunnerMixin)
