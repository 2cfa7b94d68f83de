# SPDX-License-Identifier: Apache-2.0
"""Refusal of weights that a running server is told to load again (``reload_weights``) and that are
not whole or do not fit.

vLLM keeps the first configuration and the tensors of layers that are not in the new weights, and
serves on after an error.
"""

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from smoothrot_vllm.errors import CheckpointError, ConfigError
from smoothrot_vllm.foreign_files import read_json
from smoothrot_vllm.format import QUANT_METHOD, QuantizationSchema, parse_schema
from smoothrot_vllm.plugin import adapters
from smoothrot_vllm.plugin.headers import check_shards
from smoothrot_vllm.plugin.loading import StoredTensors

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner


@cache
def install() -> None:
    """From now on check what converted models are reloaded from in this process; others reload
    as they did."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from smoothrot_vllm.plugin.quant_config import SmoothRotConfig

    reload = GPUModelRunner.reload_weights

    def checked(
        self: "GPUModelRunner",
        weights_iterator: Any = None,
        weights_path: str | None = None,
        is_checkpoint_format: bool = True,
    ) -> None:
        config = self.vllm_config.quant_config
        if not isinstance(config, SmoothRotConfig):
            reload(self, weights_iterator, weights_path, is_checkpoint_format)
            return
        if not is_checkpoint_format:
            raise ConfigError(
                "reload_weights: expected is_checkpoint_format true for a converted model, got"
                " false: packed weights are laid out for the machine they are on. Reload from a"
                " directory that smoothrot-convert wrote."
            )
        schema, directory = config.stored, Path(weights_path or self.model_config.model)
        # What vLLM downloaded from a hub for the first load is checked by the layers alone.
        if weights_iterator is None and (weights_path is not None or directory.is_dir()):
            schema = check_same_schema(directory, config.stored)
        _reload(
            self,
            lambda: reload(self, weights_iterator, weights_path),
            whole=weights_iterator is None,
        )
        adapters.guard.install(schema.transform_sha256)

    GPUModelRunner.reload_weights = checked  # type: ignore[method-assign]


def check_same_schema(directory: Path, served: QuantizationSchema) -> QuantizationSchema:
    """The schema of the converted directory that is to replace the served weights.

    Raises:
        CheckpointError: it is no whole converted model.
        ConfigError: its tensors mean something else than those of the served one.
    """
    path = directory / "config.json"
    found = read_json(path, "Name a directory that smoothrot-convert wrote.").get(
        "quantization_config"
    )
    method = found.get("quant_method") if isinstance(found, dict) else None
    if not isinstance(found, dict) or method != QUANT_METHOD:
        raise ConfigError(
            f"reload_weights: {path}: expected quant_method {QUANT_METHOD!r}, got {method!r}. Name"
            " a directory that smoothrot-convert wrote, or start another server."
        )
    schema = parse_schema(found)
    others = [
        name
        for name in QuantizationSchema.model_fields
        if getattr(schema, name) != getattr(served, name)
    ]
    if others := [name for name in others if name != "transform_sha256"]:
        raise ConfigError(
            f"reload_weights: {path}: quantization_config.{others[0]}: expected the served model's"
            f" {getattr(served, others[0])}, got {getattr(schema, others[0])}. Convert it with the"
            " same options, or start another server for it."
        )
    check_shards(directory)
    return schema


def _reload(runner: "GPUModelRunner", reload: Any, whole: bool) -> None:
    """Load, and refuse every further request where that ends half-way.

    Args:
        whole: every layer must be loaded.
    """
    before = {stored: stored.loads for stored in _stored(runner)}
    try:
        reload()
        if whole and (
            left := [stored.prefix for stored, loads in before.items() if stored.loads == loads]
        ):
            raise CheckpointError(
                "reload_weights: expected tensors of every layer in the checkpoint, got none of"
                f" {', '.join(left[:4])} ({len(left)} missing). The checkpoint is incomplete:"
                " convert or download it again."
            )
    except Exception as error:
        runner.execute_model = _refusing(error)  # type: ignore[method-assign]
        raise
    # The instance's, which hides that of the class.
    vars(runner).pop("execute_model", None)


def _stored(runner: "GPUModelRunner") -> list[StoredTensors]:
    methods = (getattr(module, "quant_method", None) for module in runner.get_model().modules())
    found = (getattr(method, "stored", None) for method in methods)
    return [stored for stored in found if isinstance(stored, StoredTensors)]


def _refusing(error: Exception) -> Any:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise CheckpointError(
            f"the weights were not wholly loaded again: {error} Reload a whole checkpoint, or start"
            " the server again."
        )

    return refuse
