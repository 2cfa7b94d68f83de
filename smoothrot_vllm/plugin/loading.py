# SPDX-License-Identifier: Apache-2.0
"""What a layer takes from a checkpoint: each stored tensor is checked as it arrives, and all of
them must have arrived.

vLLM does not notice tensors that a quantized checkpoint lacks, neither at the first load nor when
weights are loaded again.
"""

from collections.abc import Iterable

import torch
from vllm.config import get_current_vllm_config_or_none

from smoothrot_vllm.errors import CheckpointError


class StoredTensors:
    """The tensors of one layer, from the first that arrives to the last, and over again when
    weights are loaded again.

    Args:
        prefix: vLLM's full name of the layer.

    Attributes:
        loads: how many times all of them have arrived.
        random: the first weights are made up (``--load-format dummy``): none arrives.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.loads = 0
        self.random = False
        self._arrived: set[str] = set()

    def begin(self) -> None:
        """The layer's parameters are there: note whether anything is to fill them."""
        config = get_current_vllm_config_or_none()
        self.random = config is not None and config.load_config.load_format == "dummy"

    def check(
        self, where: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int | None, int]
    ) -> None:
        """Refuse a tensor that is not what the configuration says is stored.

        Args:
            where: its name, or the names that it stands for.
            shape: on all ranks; None for what only the layer can check.

        Raises:
            CheckpointError: another dtype or shape.
        """
        fits = tensor.ndim == 2 and all(
            size in (None, got) for size, got in zip(shape, tensor.shape, strict=True)
        )
        if tensor.dtype != dtype or not fits:
            expected = (
                f"{dtype} with {shape[1]} columns" if shape[0] is None else f"{dtype} {shape}"
            )
            raise CheckpointError(
                f"{where}: expected {expected}, got {tensor.dtype} {tuple(tensor.shape)}. The"
                " checkpoint is damaged or its config.json belongs to another model: convert it"
                " again."
            )

    def arrived(self, names: Iterable[str]) -> None:
        """These have been copied into the layer's parameters."""
        self._arrived.update(names)

    def finish(self, expected: list[str]) -> bool:
        """End one load of the layer's tensors, so that the next begins with none.

        Returns:
            Whether they are those of a checkpoint.

        Raises:
            CheckpointError: one of ``expected`` has not arrived since the last call.
        """
        if self.random and not self._arrived:
            return False
        missing = [name for name in expected if name not in self._arrived]
        self._arrived.clear()
        if missing:
            raise CheckpointError(
                f"{self.prefix}: expected {len(expected)} tensors in the checkpoint, got none named"
                f" {', '.join(missing[:4])} ({len(missing)} missing). The checkpoint is incomplete:"
                " convert or download it again."
            )
        self.loads += 1
        return True
