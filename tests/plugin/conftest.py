# SPDX-License-Identifier: Apache-2.0
"""vLLM's layers inside the test process: one rank, or two in turn."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import cleanup_dist_env_and_memory, init_distributed_environment
from vllm.distributed.parallel_state import ensure_model_parallel_initialized


@pytest.fixture(scope="session")
def _single_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store: Path = tmp_path_factory.mktemp("distributed") / "store"
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{store}", 0, backend="gloo")
        ensure_model_parallel_initialized(1, 1)
    yield
    cleanup_dist_env_and_memory()


@pytest.fixture
def vllm_config(_single_rank: None) -> Iterator[VllmConfig]:
    """A current vLLM configuration, so that vLLM's layers can be built."""
    config = VllmConfig()
    with set_current_vllm_config(config):
        yield config


@pytest.fixture
def tensor_parallel(
    vllm_config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> Callable[[int, int], None]:
    """Make vLLM's layers believe they are built on rank ``rank`` of ``size``; communication
    stays unused."""

    def pretend(rank: int, size: int) -> None:
        for module in ("distributed", "model_executor.layers.linear", "model_executor.parameter"):
            monkeypatch.setattr(f"vllm.{module}.get_tensor_model_parallel_rank", lambda: rank)
            monkeypatch.setattr(f"vllm.{module}.get_tensor_model_parallel_world_size", lambda: size)
        head = "vllm.model_executor.layers.vocab_parallel_embedding"
        monkeypatch.setattr(f"{head}.get_tensor_model_parallel_rank", lambda: rank)
        monkeypatch.setattr(f"{head}.get_tensor_model_parallel_world_size", lambda: size)

    return pretend
