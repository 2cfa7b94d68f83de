# SPDX-License-Identifier: Apache-2.0
"""Has vLLM run a converted model on CPUs by
:class:`~smoothrot_vllm.plugin.executor.InEngineExecutor` unless told otherwise.

vLLM lets the command line name an executor, but gives a quantization method no say in it, and on
CPUs replaces its own single-process one by one with a process for the worker. So the platform's
last word on a configuration is preceded by ours.
"""

import os
from functools import cache
from typing import TYPE_CHECKING

from smoothrot_vllm.format import QUANT_METHOD

if TYPE_CHECKING:
    from vllm.config import VllmConfig

EXECUTOR = "smoothrot_vllm.plugin.executor.InEngineExecutor"
"""As ``--distributed-executor-backend`` takes it."""


def applies(config: "VllmConfig") -> bool:
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


@cache
def install() -> None:
    """From now on choose the executor of the configurations that :func:`applies` to; vLLM's own
    run as they did."""
    from vllm.platforms import current_platform

    platform = type(current_platform)
    finish = platform.check_and_update_config

    def choose_and_finish(cls: type, vllm_config: "VllmConfig") -> None:
        if applies(vllm_config):
            vllm_config.parallel_config.distributed_executor_backend = EXECUTOR
        finish(vllm_config)

    platform.check_and_update_config = classmethod(choose_and_finish)  # type: ignore[assignment, method-assign]
