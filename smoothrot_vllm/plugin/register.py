# SPDX-License-Identifier: Apache-2.0
"""Entry point of the ``vllm.general_plugins`` group: makes ``quant_method: smoothrot`` known to
vLLM.

vLLM calls :func:`register` in every process it starts (front end, engine core, each worker), so
nothing heavy is imported before it is called, and calling it again changes nothing.
"""

import logging
import os
from importlib.metadata import version
from multiprocessing import parent_process
from typing import Any

from smoothrot_vllm.errors import UnsupportedPlatformError

SUPPORTED_VLLM = ((0, 32), (0, 33))
"""The (major, minor) versions of vLLM whose quantization interface this plugin is written for."""

ALLOW_ANY_VLLM = "SMOOTHROT_ALLOW_ANY_VLLM"
"""Environment variable that turns the refusal of other versions into a warning when it is ``1``."""

DRAFT_CLASS = "smoothrot_vllm.plugin.draft:TransformedEagleHead"
"""As vLLM's registry takes a class that it is to import when a head is served."""

WITHOUT_CUDA = "+cpu"
"""End of the version of a build without CUDA kernels."""

# Under vLLM's own logger, so that it is shown with vLLM's handler, format and VLLM_LOGGING_LEVEL.
logger = logging.getLogger("vllm.smoothrot")


def unsupported_version() -> str | None:
    """What is wrong with the installed vLLM, whose interface may be another than the one used
    here; None for nothing."""
    import vllm

    if tuple(getattr(vllm, "__version_tuple__", ())[:2]) in SUPPORTED_VLLM:
        return None
    expected = " or ".join(f"{major}.{minor}" for major, minor in SUPPORTED_VLLM)
    return (
        f"the smoothrot plugin expects vLLM {expected}, got"
        f" {getattr(vllm, '__version__', 'an unknown version')}"
    )


def warn_without_cuda() -> None:
    """Say that the installed build has no CUDA kernels, which its version tells: once, and
    without loading its library."""
    installed = version("smoothrot-vllm")
    if installed.endswith(WITHOUT_CUDA) and parent_process() is None:
        logger.warning(
            "smoothrot-vllm %s was built without CUDA kernels: models converted with SmoothRot"
            " cannot be served on this GPU. Install it again from a checkout with `SMOOTHROT_CUDA=1"
            " pip install .`",
            installed,
        )


def register() -> None:
    """Register ``SmoothRotConfig`` with vLLM as the quantization method ``smoothrot``, register the
    class of transformed draft heads, and apply the :mod:`~smoothrot_vllm.plugin.patches` that
    serving a converted model needs.

    Under another vLLM than :data:`SUPPORTED_VLLM` converted models are refused, and all others
    served as if there were no plugin, unless ``SMOOTHROT_ALLOW_ANY_VLLM=1`` is set.
    """
    if (problem := unsupported_version()) is not None:
        if os.environ.get(ALLOW_ANY_VLLM) != "1":
            logger.warning(
                "%s: converted models are refused, others are served without it", problem
            )
            _refuse_converted_models(problem)
            return
        logger.warning("%s; going on because %s=1: answers may be wrong", problem, ALLOW_ANY_VLLM)

    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.models import ModelRegistry
    from vllm.platforms import current_platform

    from smoothrot_vllm.format import DRAFT_ARCHITECTURE, QUANT_METHOD
    from smoothrot_vllm.plugin import patches
    from smoothrot_vllm.plugin.quant_config import SmoothRotConfig

    register_quantization_config(QUANT_METHOD)(SmoothRotConfig)
    ModelRegistry.register_model(DRAFT_ARCHITECTURE, DRAFT_CLASS)
    patches.apply()
    if current_platform.is_cuda():
        warn_without_cuda()


def _refuse_converted_models(problem: str) -> None:
    """Have a vLLM of unknown interface say what is wrong once it meets a converted model.

    Where even registering has changed, it refuses a method that it does not know by itself.
    """
    error = UnsupportedPlatformError(
        f"{problem}. Install one of these versions, or set {ALLOW_ANY_VLLM}=1 to try this one at"
        " your own risk."
    )
    try:
        from vllm.model_executor.layers.quantization import register_quantization_config
        from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

        from smoothrot_vllm.format import QUANT_METHOD

        class RefusedConfig(QuantizationConfig):
            """Refuses every checkpoint."""

            def __new__(cls, *_: object, **__: object) -> "RefusedConfig":
                raise error

            # What is asked of a method whose model has no configuration for it.
            @staticmethod
            def get_config_filenames() -> list[str]:
                raise error

            @classmethod
            def from_config(cls, config: dict[str, Any]) -> "RefusedConfig":
                raise error

        register_quantization_config(QUANT_METHOD)(RefusedConfig)
    # Whatever it is, other models are to be served.
    except Exception as found:
        logger.debug("smoothrot: vLLM refuses converted models by itself: %r", found)
