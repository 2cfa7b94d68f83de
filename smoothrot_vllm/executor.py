# SPDX-License-Identifier: Apache-2.0
"""A vLLM executor for CPUs whose only worker lives in the engine's process, as vLLM's own does on a single GPU.

On CPUs vLLM 0.32 and 0.33 always start a process for the worker, since in their own single-process executor nothing would bind
OpenMP's threads to cores, and the engine spins on a core while it waits for that process. On few cores that core is missing:
docs/benchmarks.md has the figures. :mod:`smoothrot_vllm.executor_choice` has it serve converted models;
``--distributed-executor-backend smoothrot_vllm.executor.InEngineExecutor`` has it serve others, ``mp`` leaves vLLM's.
"""

import os

import torch
import vllm.utils.cpu_resource_utils as cpu_resources
from vllm import envs
from vllm.platforms import current_platform
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from smoothrot_vllm.errors import ConfigError, UnsupportedPlatformError
from smoothrot_vllm.plugin import logger

BINDING = "VLLM_CPU_OMP_THREADS_BIND"


class InEngineExecutor(UniProcExecutor):
    """Runs the worker in the process that makes it, on the cores that ``VLLM_CPU_OMP_THREADS_BIND`` names.

    ``auto``, vLLM's default, takes every physical core of the first memory node, where vLLM leaves one to its engine; ``nobind``
    leaves cores and number of threads as they are.

    Raises:
        UnsupportedPlatformError: vLLM does not run on CPUs here.
        ConfigError: more than one worker is asked for, or the variable names cores that this process may not use.
    """

    def _init_executor(self) -> None:
        if not current_platform.is_cpu():
            raise UnsupportedPlatformError(
                f"InEngineExecutor: expected vLLM for CPUs, got vLLM for {current_platform.device_name}. "
                "Leave --distributed-executor-backend out."
            )
        parallel = self.parallel_config
        sizes = (parallel.tensor_parallel_size, parallel.pipeline_parallel_size, parallel.data_parallel_size)
        if sizes != (1, 1, 1):
            raise ConfigError(
                "InEngineExecutor: expected one worker, got tensor, pipeline and data parallel sizes of "
                f"{', '.join(map(str, sizes))}. Leave --distributed-executor-backend out."
            )
        self._take_cores(cores_of(envs.VLLM_CPU_OMP_THREADS_BIND))
        super()._init_executor()

    def _take_cores(self, cores: list[int] | None) -> None:
        if cores is not None:
            # Of this thread; OpenMP's are started by it and inherit. Those that talk to the front end may run anywhere.
            os.sched_setaffinity(0, cores)
            torch.set_num_threads(len(cores))
        where = "not bound to cores" if cores is None else f"on cores {', '.join(map(str, cores))}"
        logger.info(
            "SmoothRot: worker in the engine's process, %d threads, %s (--distributed-executor-backend mp: in one of its own)",
            torch.get_num_threads(),
            where,
        )


def cores_of(binding: str) -> list[int] | None:
    """Logical CPUs that a value of ``VLLM_CPU_OMP_THREADS_BIND`` stands for, None for ``nobind``.

    Raises:
        ConfigError: it is no list of CPUs, or names some that this process may not use.
    """
    if binding == "nobind":
        return None
    allowed = cpu_resources.get_allowed_cpu_list()
    if binding == "auto":
        node = min(cpu.numa_node for cpu in allowed)
        # The last logical CPU of each physical core, as vLLM chooses on x86.
        return sorted({cpu.physical_core: cpu.id for cpu in allowed if cpu.numa_node == node}.values())
    available = sorted(cpu.id for cpu in allowed)
    try:
        cores = cpu_resources.parse_id_list(binding)
    except ValueError:
        cores = []
    if not cores or not set(cores) <= set(available):
        raise ConfigError(
            f"{BINDING}: expected auto, nobind or CPUs of one rank among {', '.join(map(str, available))}, as in 0-1 or 0,2; "
            f"got {binding!r}."
        )
    return sorted(set(cores))
