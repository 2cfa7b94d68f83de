# SPDX-License-Identifier: Apache-2.0
"""Refusal of LoRA adapters that do not fit the served weights.

vLLM would load an adapter of the original model and add it to weights in another basis: answers
would be wrong without a word. An adapter made by ``smoothrot-convert lora`` names in its
configuration the transform it was given.
"""

from pathlib import Path
from typing import Any

from smoothrot_vllm.errors import CheckpointError, ConfigError
from smoothrot_vllm.foreign_files import read_json

CONFIG_NAME = "adapter_config.json"
BASE_KEY = "smoothrot_transform_sha256"
"""Key of ``adapter_config.json``: digest of the base's transform."""


def check_adapter(adapter: Path, transform_sha256: str | None) -> None:
    """Refuse the adapter in a directory unless it was transformed as the served model was.

    Args:
        adapter: directory with ``adapter_config.json``; anything missing there is for vLLM to say.
        transform_sha256: of the served checkpoint's ``quantization_config``.

    Raises:
        ConfigError: the adapter was not transformed, or for another model, or the checkpoint does
            not say how it was.
    """
    if transform_sha256 is None:
        raise ConfigError(
            f"LoRA adapter {adapter}: the served checkpoint does not say how its weights were"
            " transformed (quantization_config.transform_sha256). Convert the model again, then"
            " the adapter."
        )
    path = adapter / CONFIG_NAME
    found = _base_of(path) if path.exists() else None
    if found != transform_sha256:
        what = (
            "is of the original model"
            if found is None
            else "was transformed for another conversion"
        )
        raise ConfigError(
            f"LoRA adapter {adapter} {what}: expected {BASE_KEY} {transform_sha256} in"
            f" {CONFIG_NAME}, got {found}. Run `smoothrot-convert lora ADAPTER OUT --base DIR` with"
            " the served directory, and serve OUT."
        )


def _base_of(config: Path) -> Any:
    try:
        return read_json(config, "Save or download the adapter again.").get(BASE_KEY)
    except CheckpointError as error:
        raise ConfigError(f"LoRA adapter: {error}") from error


class AdapterGuard:
    """Puts :func:`check_adapter` in front of vLLM's reading of an adapter, once in a process."""

    def __init__(self) -> None:
        self._transform_sha256: str | None = None
        self._installed = False

    def install(self, transform_sha256: str | None) -> None:
        """From now on only adapters of this transform load in this process."""
        self._transform_sha256 = transform_sha256
        if self._installed:
            return
        from vllm.lora.peft_helper import PEFTHelper

        read = PEFTHelper.from_local_dir

        def checked(
            _: type[PEFTHelper], lora_path: str, *arguments: Any, **options: Any
        ) -> PEFTHelper:
            check_adapter(Path(lora_path), self._transform_sha256)
            return read(lora_path, *arguments, **options)

        PEFTHelper.from_local_dir = classmethod(checked)  # type: ignore[assignment,method-assign]
        self._installed = True


guard = AdapterGuard()
