# SPDX-License-Identifier: Apache-2.0
"""A vLLM executor for CPUs whose only worker lives in the engine's process, as vLLM's own does on a
single GPU.

On CPUs vLLM 0.32 and 0.33 always start a process for the worker, since in their own single-process
executor nothing would bind OpenMP's threads to cores, and the engine spins on a core while it waits
for that process. On few cores that core is missing: docs/benchmarks.md has the figures.
:mod:`smoothrot_vllm.plugin.patches` has it serve converted models;
``--distributed-executor-backend smoothrot_vllm.plugin.executor.InEngineExecutor`` has it serve
others, ``mp`` leaves vLLM's.
"""

import os

import torch
import vllm.utils.cpu_resource_utils as cpu_resources
from vllm import envs
from vllm.platforms import current_platform
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from smoothrot_vllm.errors import ConfigError, UnsupportedPlatformError
from smoothrot_vllm.plugin.register import logger

BINDING = "VLLM_CPU_OMP_THREADS_BIND"
RESERVED = "VLLM_CPU_NUM_OF_RESERVED_CPU"


class InEngineExecutor(UniProcExecutor):
    """Runs the worker in the process that makes it, on the cores that ``VLLM_CPU_OMP_THREADS_BIND``
    names.

    ``auto``, vLLM's default, takes the physical cores of the first memory node but for the last
    ``VLLM_CPU_NUM_OF_RESERVED_CPU``, of which vLLM wants one for its engine and this none;
    ``nobind`` leaves cores and number of threads as they are.

    Raises:
        UnsupportedPlatformError: vLLM does not run on CPUs here.
        ConfigError: more than one worker is asked for, or the variables leave no cores that this
            process may use.
    """

    def _init_executor(self) -> None:
        if not current_platform.is_cpu():
            raise UnsupportedPlatformError(
                "InEngineExecutor: expected vLLM for CPUs, got vLLM for"
                f" {current_platform.device_name}. Leave --distributed-executor-backend out."
            )
        parallel = self.parallel_config
        sizes = (
            parallel.tensor_parallel_size,
            parallel.pipeline_parallel_size,
            parallel.data_parallel_size,
        )
        if sizes != (1, 1, 1):
            raise ConfigError(
                "InEngineExecutor: expected one worker, got tensor, pipeline and data parallel"
                f" sizes of {', '.join(map(str, sizes))}. Leave --distributed-executor-backend out."
            )
        take_cores(cores_of(envs.VLLM_CPU_OMP_THREADS_BIND, envs.VLLM_CPU_NUM_OF_RESERVED_CPU or 0))
        super()._init_executor()


def take_cores(cores: list[int] | None) -> None:
    """Have this thread, and those that torch starts from it, run on ``cores``, one thread each;
    None leaves all as it is.

    Threads that are there already, such as those that talk to the front end, stay where they were.
    """
    if cores is not None:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(len(cores))
    where = "not bound to cores" if cores is None else f"on cores {', '.join(map(str, cores))}"
    logger.info(
        "SmoothRot: worker in the engine's process, %d threads, %s (--distributed-executor-backend"
        " mp: in one of its own)",
        torch.get_num_threads(),
        where,
    )


def cores_of(binding: str, reserved: int) -> list[int] | None:
    """Logical CPUs that the worker gets, None for all that there are.

    Args:
        binding: value of ``VLLM_CPU_OMP_THREADS_BIND``.
        reserved: how many of the cores that ``auto`` finds are left to others.

    Raises:
        ConfigError: ``binding`` is no list of CPUs or names some that this process may not use, or
            ``auto`` finds too few.
    """
    if binding == "nobind":
        return None
    allowed = cpu_resources.get_allowed_cpu_list()
    available = sorted(cpu.id for cpu in allowed)
    listed = ", ".join(map(str, available))
    if binding == "auto":
        nodes = [
            node
            for node in cpu_resources.get_visible_memory_node()
            if any(cpu.numa_node == node for cpu in allowed)
        ]
        # The last logical CPU of each physical core, as vLLM chooses on x86.
        cores = sorted(
            {cpu.physical_core: cpu.id for cpu in allowed if cpu.numa_node in nodes[:1]}.values()
        )
        if len(cores) <= reserved:
            raise ConfigError(
                f"{BINDING}=auto: expected more than the {reserved} cores of {RESERVED} on the"
                f" first memory node, got {len(cores)} among CPUs {listed}. Name the CPUs in"
                f" {BINDING}, as in 0-1."
            )
        return cores[: len(cores) - reserved]
    try:
        cores = cpu_resources.parse_id_list(binding)
    except ValueError:
        cores = []
    if not cores or not set(cores) <= set(available):
        raise ConfigError(
            f"{BINDING}: expected auto, nobind or CPUs of one rank among {listed}, as in 0-1 or"
            f" 0,2; got {binding!r}."
        )
    return cores
