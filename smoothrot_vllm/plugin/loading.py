# SPDX-License-Identifier: Apache-2.0
"""What a layer takes from a checkpoint: its widths are checked before it is built, each stored
tensor as it arrives, and in the end that all of them have; then the codes are repacked.

vLLM does not notice tensors that a quantized checkpoint lacks, neither at the first load nor when
weights are loaded again.
"""

from collections.abc import Callable

import torch
from vllm.config import get_current_vllm_config_or_none

from smoothrot_vllm import ops
from smoothrot_vllm.errors import CheckpointError, ConfigError
from smoothrot_vllm.format import (
    WEIGHT_GROUP_SCALE,
    WEIGHT_PACKED,
    WEIGHT_SCALE,
    LinearScheme,
    OnlineHadamard,
    WeightScheme,
    group_count,
    weight_tensors,
)
from smoothrot_vllm.reference import unpack_group_scale


class StoredTensors:
    """The tensors of one layer, from the first that arrives to the last, and over again when
    weights are loaded again.

    Args:
        prefix: vLLM's full name of the layer.
        scheme: bits, group size and activation clip.
        rotation: the online Hadamard of the whole input that ranks share, or None.

    Attributes:
        numbers: block (0 for none), clip, bits of inputs and of weights, and group size, as the ops
            take them; plain numbers, so that torch.compile sees constants.
        loads: how many times all tensors have arrived.
        is_random: the first weights are made up (``--load-format dummy``): none arrives.
    """

    def __init__(self, prefix: str, scheme: LinearScheme, rotation: OnlineHadamard | None) -> None:
        self.prefix = prefix
        self.weights = scheme.weights
        self.rotation = rotation
        activations = scheme.activations
        self.numbers = (
            0 if rotation is None else rotation.block,
            activations.clip,
            activations.bits,
            scheme.weights.bits,
            scheme.weights.group_size,
        )
        self.loads = 0
        self.is_random = False
        self._arrived: set[str] = set()

    def begin(self, width: int, shard: int) -> None:
        """Check the sizes of a layer that is about to get its parameters, and note whether anything
        is to fill them.

        Args:
            width: inputs that ranks share.
            shard: those of one rank.

        Raises:
            ConfigError: they do not suit the Hadamard block or the group size.
        """
        config = get_current_vllm_config_or_none()
        self.is_random = config is not None and config.load_config.load_format == "dummy"
        if self.rotation is not None and self.rotation.size != width:
            raise ConfigError(
                f"{self.prefix}: quantization_config.online: expected size {width}, the width of"
                f" the layer, got {self.rotation.size}: config.json is that of another model."
                " Convert again."
            )
        units = {"Hadamard blocks": self.numbers[0], "weight groups": self.weights.group_size}
        for what, unit in units.items():
            if unit > 0 and shard % unit:
                ranks = width // shard
                raise ConfigError(
                    f"{self.prefix}: expected a whole number of {what} of {unit} on each of"
                    f" {ranks} tensor-parallel ranks, got {shard} of {width} channels. Serve with a"
                    f" smaller --tensor-parallel-size, or convert again with --max-tp {ranks} and a"
                    " smaller --group-size."
                )

    def take(
        self,
        names: list[str],
        expected: tuple[tuple[int, ...], torch.dtype],
        tensor: torch.Tensor,
        parameter: torch.nn.Parameter,
        load: Callable[[], bool | None],
        some_rows: bool = False,
    ) -> bool | None:
        """Have vLLM's loader copy a stored tensor into its place, unless it is not what the
        configuration says is stored.

        Args:
            names: its name, or those that it stands for.
            expected: its shape on all ranks, and its dtype.
            tensor: what is stored.
            parameter: where this rank's part of it belongs.
            load: copies it there; False if it is another rank's.
            some_rows: it may hold fewer rows, whose number only ``load`` can check.

        Returns:
            What ``load`` does.

        Raises:
            CheckpointError: another dtype or shape.
        """
        (rows, *others), dtype = expected
        where, got = ", ".join(names), tuple(tensor.shape)
        advice = (
            "The checkpoint is damaged or its config.json belongs to another model: convert it"
            " again."
        )
        if (
            tensor.dtype != dtype
            or got[1:] != tuple(others)
            or not (some_rows or got[:1] == (rows,))
        ):
            wanted = f"{dtype} with {others[0]} columns" if some_rows else f"{dtype} {expected[0]}"
            raise CheckpointError(f"{where}: expected {wanted}, got {tensor.dtype} {got}. {advice}")
        misfit = CheckpointError(
            f"{where}: stored {got} does not fill this rank's {tuple(parameter.shape)} as the"
            f" model's config.json says. {advice}"
        )
        if got[0] > rows:  # vLLM would ignore surplus rows of a fused tensor
            raise misfit
        try:
            done = load()
        except (AssertionError, RuntimeError) as error:
            raise misfit from error
        if done is not False:
            self._arrived.update(names)
        return done

    def finish(self, expected: list[str]) -> bool:
        """End one load of the layer's tensors, so that the next begins with none.

        Returns:
            Whether they are those of a checkpoint.

        Raises:
            CheckpointError: one of ``expected`` has not arrived since the last call.
        """
        if self.is_random and not self._arrived:
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

    def repack(self, layer: torch.nn.Module, stack: str = "") -> None:
        """Put codes in the kernels' layout in place of the stored ones.

        The parameters become plain ones: vLLM's loader classes have done their work and would only
        slow each access down.

        Args:
            layer: holds ``{stack}weight_packed`` and ``{stack}weight_scale`` as they are stored,
                and in groups ``{stack}weight_group_scale``, a byte each.
            stack: beginning of their names.
        """
        scale = layer.get_parameter(stack + WEIGHT_SCALE).data
        group_scale = None
        if self.weights.group_size != -1:
            group_scale = layer.get_parameter(stack + WEIGHT_GROUP_SCALE).data
            delattr(layer, stack + WEIGHT_GROUP_SCALE)
        if self.rotation is not None:
            # A cached compiled graph calls the op without going through this process's tracing.
            ops.prepare_rotation(self.rotation.block, scale.device)
        codes = layer.get_parameter(stack + WEIGHT_PACKED).data
        packed = ops.prepack_weight(codes, scale, group_scale, self.weights.bits)
        for name, data in ((WEIGHT_PACKED, packed), (WEIGHT_SCALE, scale)):
            layer.register_parameter(stack + name, torch.nn.Parameter(data, requires_grad=False))


def check_scales(scales: torch.Tensor, name: Callable[..., str]) -> None:
    """Refuse scales of weights with which no product is right.

    Args:
        scales: float32 ``(..., rows, 1)``, or uint8 ``(..., rows, groups)``.
        name: what the scale at given indices is called.

    Raises:
        CheckpointError: one of them is not a finite number above zero.
    """
    bad = ~(scales.isfinite() & (scales > 0))
    if bad.any():
        first = tuple(bad.nonzero()[0].tolist())
        raise CheckpointError(
            f"{name(*first)} of this rank: expected finite scales > 0, got {scales[first].item()}"
            f" and {int(bad.sum()) - 1} others of {scales.numel()}. The checkpoint is damaged:"
            " convert or download it again."
        )


def as_loaded(
    tensor: str, stored: torch.Tensor, in_features: int, weights: WeightScheme
) -> torch.Tensor:
    """A stored tensor as vLLM's loaders can shard it: group scales, two to a byte in the
    checkpoint, a byte each.

    Args:
        tensor: which, by the end of its name.
        stored: what the checkpoint has.
        in_features: inputs that ranks share.
        weights: bits and group size.
    """
    if tensor != WEIGHT_GROUP_SCALE:
        return stored
    return unpack_group_scale(stored, group_count(in_features, weights))


def loaded_tensors(
    out_features: int, in_features: int, weights: WeightScheme
) -> dict[str, tuple[tuple[int, int], torch.dtype]]:
    """``format.weight_tensors`` of a rank's shard, as :func:`as_loaded` gives them."""
    tensors = weight_tensors(out_features, in_features, weights)
    if WEIGHT_GROUP_SCALE in tensors:
        shape = (out_features, group_count(in_features, weights))
        tensors[WEIGHT_GROUP_SCALE] = (shape, torch.uint8)
    return tensors


def stored_tensors(model: torch.nn.Module) -> list[StoredTensors]:
    """Those of every layer of a served model."""
    methods = (getattr(module, "quant_method", None) for module in model.modules())
    found = (getattr(method, "stored", None) for method in methods)
    return [stored for stored in found if isinstance(stored, StoredTensors)]


def reload_wholly(model: torch.nn.Module, reload: Callable[[], None], every_layer: bool) -> None:
    """Load weights again, and notice layers that were left as they were.

    Args:
        model: whose layers they are.
        reload: vLLM's loading.
        every_layer: the weights are those of a checkpoint, not single ones.

    Raises:
        CheckpointError: layers got no tensors.
    """
    before = {stored: stored.loads for stored in stored_tensors(model)}
    reload()
    left = [stored.prefix for stored, loads in before.items() if stored.loads == loads]
    if every_layer and left:
        raise CheckpointError(
            "reload_weights: expected tensors of every layer in the checkpoint, got none of"
            f" {', '.join(left[:4])} ({len(left)} missing). The checkpoint is incomplete: convert"
            " or download it again."
        )
