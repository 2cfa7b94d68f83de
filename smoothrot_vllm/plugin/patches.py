# SPDX-License-Identifier: Apache-2.0
"""Everything that the plugin replaces in vLLM, which gives a quantization method no say there.

Models of others meet vLLM's own functions, called as they would be without us. docs/compat.md has
the list.
"""

import os
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from smoothrot_vllm.errors import CheckpointError, ConfigError
from smoothrot_vllm.format import QUANT_METHOD
from smoothrot_vllm.plugin.headers import check_adapter, check_reloaded

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.lora.request import LoRARequest
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    from smoothrot_vllm.plugin.quant_config import SmoothRotConfig

EXECUTOR = "smoothrot_vllm.plugin.executor.InEngineExecutor"
"""As ``--distributed-executor-backend`` takes it."""


@cache
def apply() -> None:
    """Replace what is to be replaced in this process."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        _choose_executor()
    _watch_workers()


def _choose_executor() -> None:
    """``CpuPlatform.check_and_update_config`` names our executor for converted models.

    Why: vLLM lets the command line name an executor, and on CPUs replaces its own single-process
    one by one with a process for the worker. So the platform's last word is preceded by ours.

    Until: a vLLM whose own executor keeps a CPU's only worker in the engine; 0.33 does not.
    """
    from vllm.platforms import current_platform

    cpu = type(current_platform)
    finish = cpu.check_and_update_config

    def choose(cls: type, vllm_config: "VllmConfig") -> None:
        if wants_our_executor(vllm_config):
            vllm_config.parallel_config.distributed_executor_backend = EXECUTOR
        finish(vllm_config)

    cpu.check_and_update_config = classmethod(choose)  # type: ignore[assignment,method-assign]


def wants_our_executor(config: "VllmConfig") -> bool:
    """Whether a configuration is of a converted model with a single worker, and names no executor.

    vLLM writes ``uni`` where none is named. With ``VLLM_ENABLE_V1_MULTIPROCESSING=0`` it keeps to
    that by itself.
    """
    parallel = config.parallel_config
    return (
        config.model_config is not None
        and config.model_config.quantization == QUANT_METHOD
        and parallel.distributed_executor_backend == "uni"
        and parallel.world_size == parallel.data_parallel_size == 1
        and config.kv_transfer_config is None
        and os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING", "1") == "1"
    )


def _watch_workers() -> None:
    """``WorkerWrapperBase.init_device`` makes what runs a worker's model, which for a converted
    model gets two methods of its own: :func:`_reload_weights` and :func:`_load_lora_model`; before
    it, the class of the model's own draft head is named where R1 is folded.

    Why: on ``reload_weights`` vLLM keeps the first configuration and the tensors of layers that the
    new weights lack, and serves on after an error; it adds adapters of the original model to
    weights in another basis; and it knows one class of each such head.

    Until: a vLLM that asks the quantization method about all three; 0.33 does not.
    """
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    from smoothrot_vllm.plugin.quant_config import SmoothRotConfig

    initialize = WorkerWrapperBase.init_device

    def initialize_and_watch(self: "WorkerWrapperBase") -> None:
        config = self.vllm_config.quant_config
        if isinstance(config, SmoothRotConfig):
            choose_draft_class(self.vllm_config, config)
        initialize(self)
        if isinstance(config, SmoothRotConfig):
            runner: Any = self.worker.model_runner
            for method in (_reload_weights, _load_lora_model):
                name = method.__name__.removeprefix("_")
                setattr(runner, name, partial(method, runner, config, getattr(runner, name)))

    WorkerWrapperBase.init_device = initialize_and_watch  # type: ignore[method-assign]


def choose_draft_class(vllm_config: "VllmConfig", config: "SmoothRotConfig") -> None:
    """Where R1 is folded, have the model's own head made by a class with its added linears."""
    from smoothrot_vllm.plugin.engine_checks import keeps_hidden_states, own_head

    speculative = vllm_config.speculative_config
    if speculative is None or own_head(vllm_config) is None:
        return
    if not keeps_hidden_states(config.stored):
        from smoothrot_vllm.plugin.draft import use_transformed_class

        use_transformed_class(speculative.draft_model_config)


def _reload_weights(
    runner: Any,
    config: "SmoothRotConfig",
    reload: Any,
    weights_iterator: Any = None,
    weights_path: str | None = None,
    is_checkpoint_format: bool = True,
) -> None:
    """Load weights in place of the served ones, or refuse them before any is touched; where
    loading ends half-way, refuse every further request.

    Raises:
        ConfigError: the weights are none of a checkpoint, or mean something else than the served
            ones.
        CheckpointError: they are not whole, or damaged.
    """
    from smoothrot_vllm.plugin.loading import reload_wholly

    if not is_checkpoint_format:
        raise ConfigError(
            "reload_weights: expected is_checkpoint_format true for a converted model, got"
            " false: packed weights are laid out for the machine they are on. Reload from a"
            " directory that smoothrot-convert wrote."
        )
    whole, directory = weights_iterator is None, Path(weights_path or runner.model_config.model)
    schema = config.stored
    # What vLLM downloaded from a hub for the first load is checked by the layers alone.
    if whole and (weights_path is not None or directory.is_dir()):
        schema = check_reloaded(directory, schema)
    try:
        reload_wholly(runner.get_model(), partial(reload, weights_iterator, weights_path), whole)
    except Exception as error:
        runner.execute_model = partial(_refuse_request, error)
        raise
    # The runner's own, which hides that of its class.
    vars(runner).pop("execute_model", None)
    config.stored = schema


def _refuse_request(error: Exception, *_: Any, **__: Any) -> NoReturn:
    raise CheckpointError(
        f"the weights were not wholly loaded again: {error} Reload a whole checkpoint, or start"
        " the server again."
    )


def _load_lora_model(
    runner: Any, config: "SmoothRotConfig", load: Any, *model_and_settings: Any
) -> "torch.nn.Module":
    """Make the model one that takes adapters, and have each checked before it is read.

    Raises (when an adapter is loaded):
        ConfigError: see :func:`~smoothrot_vllm.plugin.headers.check_adapter`.
    """
    from vllm.lora.utils import get_adapter_absolute_path

    model: torch.nn.Module = load(*model_and_settings)
    read = runner.lora_manager._load_adapter

    def check_and_read(lora_request: "LoRARequest") -> Any:
        path = Path(get_adapter_absolute_path(lora_request.lora_path))
        check_adapter(path, config.stored.transform_sha256)
        return read(lora_request)

    runner.lora_manager._load_adapter = check_and_read
    return model
