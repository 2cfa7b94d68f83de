# SPDX-License-Identifier: Apache-2.0
"""What vLLM asks a quantization method: is this checkpoint servable here, and how is each layer
computed.

Every layer gets an explicit answer. A layer this format does not cover is refused by name: none is
served as if it were unquantized because nothing matched it.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)

from smoothrot_vllm.errors import ConfigError, UnsupportedModelError, UnsupportedPlatformError
from smoothrot_vllm.format import (
    QUANT_METHOD,
    LinearScheme,
    QuantizationSchema,
    check_tensor_parallel,
    parse_schema,
)
from smoothrot_vllm.plugin.engine_checks import check_engine
from smoothrot_vllm.plugin.headers import check_shards

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.models.utils import WeightsMapper


# A child of vLLM's logger, so that its handler and VLLM_LOGGING_LEVEL apply.
logger = init_logger("vllm.smoothrot")


class SmoothRotConfig(QuantizationConfig):
    """``quantization_config`` of a SmoothRot checkpoint, as vLLM carries it to its workers
    (picklable).

    Args:
        schema: the validated configuration; its module names are those of the checkpoint until
            :meth:`apply_vllm_mapper` turns them into vLLM's, which ``stored`` is not changed by.
            None, which is how vLLM asks for a method whose model has no ``quantization_config``, is
            refused.

    Raises:
        ConfigError: there is no ``quantization_config``.
    """

    def __init__(self, schema: QuantizationSchema | None = None) -> None:
        super().__init__()
        if schema is None:
            raise ConfigError(
                f"--quantization {QUANT_METHOD}: expected a converted model, whose config.json has"
                " a quantization_config, got one without. Convert the model with smoothrot-convert"
                " first, or leave the option out to serve it in 16 bits."
            )
        self.schema = self.stored = schema

    def __repr__(self) -> str:
        return f"SmoothRotConfig({self.schema!r})"

    # vLLM's annotation lists its own methods only.
    def get_name(self) -> str:  # type: ignore[override]
        """Name of the method, the value of ``--quantization``."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Dtypes ``--dtype`` may choose: activations enter and leave the quantized layers in it."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Smallest CUDA compute capability; :meth:`from_config` looks closer, at what the
        library was built for."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Files read besides ``config.json``: none."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "SmoothRotConfig":
        """Validate ``config.json["quantization_config"]`` and the platform it is to be served on.

        Raises:
            ConfigError: unknown format version, unknown or missing field, value out of range.
            UnsupportedPlatformError: vLLM runs on something else than a CPU or a GPU that the
                compiled ops have kernels for, or they cannot be loaded.
        """
        schema = parse_schema(config)
        _check_platform()
        return cls(schema)

    def maybe_update_config(
        self,
        model_name: str,
        hf_config: "PreTrainedConfig | None" = None,
        revision: str | None = None,
    ) -> None:
        """Check what only the model's own directory tells; vLLM downloads models of a hub later,
        complete or not at all.

        Raises:
            ConfigError: the model ties its output head to the embedding, but the checkpoint
                quantizes the head.
            CheckpointError: a local safetensors file is damaged or lacks a tensor.
        """
        if self.schema.lm_head is not None and getattr(hf_config, "tie_word_embeddings", False):
            raise ConfigError(
                f"{model_name}: config.json has tie_word_embeddings true, but"
                f" quantization_config.lm_head is {self.schema.lm_head.weights.bits}-bit: expected"
                " an untied head, as embeddings stay 16-bit. Convert the model again with"
                " smoothrot-convert, which unties them."
            )
        if Path(model_name).is_dir():
            check_shards(Path(model_name))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: "WeightsMapper") -> None:
        """Rename the modules listed in ``ignore`` and ``overrides`` to vLLM's names for them."""
        self.schema = self.schema.model_copy(
            update={
                "ignore": hf_to_vllm_mapper.apply_list(self.schema.ignore),
                "overrides": hf_to_vllm_mapper.apply_dict(self.schema.overrides),
            }
        )

    def scheme(self, prefix: str) -> LinearScheme | None:
        """Scheme of vLLM's linear ``prefix``, which may be a fusion (``qkv_proj``) of several
        stored ones.

        Returns:
            The scheme its parts share, or None if they stay 16-bit.

        Raises:
            ConfigError: the parts differ, so that one fused linear cannot compute them.
        """
        parent = prefix.rpartition(".")[0]
        parts = {
            part: self.schema.scheme(f"{parent}.{part}".lstrip("."))
            for part in self.part_names(prefix)
        }
        first, *others = parts.values()
        if any(other != first for other in others):
            found = "; ".join(f"{part}: {_describe(scheme)}" for part, scheme in parts.items())
            raise ConfigError(
                f"{prefix}: vLLM computes {', '.join(parts)} as one linear, expected one scheme for"
                f" all of them, got {found}. Convert again with the same bits and group size for"
                " each of them."
            )
        return first

    def part_names(self, prefix: str) -> list[str]:
        """Last parts of the names of the stored linears that vLLM fuses into ``prefix``, in the
        order of its rows. One that the schema itself names is stored as it is."""
        leaf = prefix.rpartition(".")[2]
        if prefix in self.schema.overrides or prefix in self.schema.ignore:
            return [leaf]
        return self.packed_modules_mapping.get(leaf, [leaf])

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How ``layer`` is computed; None leaves embeddings, 16-bit heads and attention to vLLM.

        Raises:
            ConfigError: wrong tensor-parallel size for this checkpoint, a fused layer of mixed
                schemes, or a setting of the engine that :mod:`smoothrot_vllm.plugin.engine_checks`
                refuses.
            UnsupportedModelError: a kind of layer the format does not cover.
            UnsupportedPlatformError: experts whose widths the CUDA kernels cannot compute.
        """
        from vllm.config import get_current_vllm_config_or_none
        from vllm.distributed import get_tensor_model_parallel_world_size
        from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import (
            ParallelLMHead,
            VocabParallelEmbedding,
        )

        from smoothrot_vllm.plugin import silu_fusion
        from smoothrot_vllm.plugin.linear import SmoothRotLinearMethod
        from smoothrot_vllm.plugin.lm_head import SmoothRotLMHeadMethod

        check_tensor_parallel(self.schema, get_tensor_model_parallel_world_size())
        config = get_current_vllm_config_or_none()
        if config is not None and config.model_config is not None:
            check_engine(config, self.schema)
        silu_fusion.install()
        if isinstance(layer, LinearBase):
            scheme = self.scheme(prefix)
            if scheme is None:
                return UnquantizedLinearMethod()
            leaf = prefix.rpartition(".")[2]
            parts = self.part_names(prefix)
            stored_fused = leaf in self.packed_modules_mapping and parts == [leaf]
            return SmoothRotLinearMethod(
                prefix, scheme, self.schema.online.rotation(prefix), parts, stored_fused
            )
        if isinstance(layer, ParallelLMHead):
            scheme = self.scheme(prefix)
            return None if scheme is None else SmoothRotLMHeadMethod(prefix, scheme)
        if isinstance(layer, (VocabParallelEmbedding, AttentionLayerBase)):
            return None
        # Not above: dense models are served without vLLM's code for experts.
        from vllm.model_executor.layers.fused_moe import RoutedExperts

        if isinstance(layer, RoutedExperts):
            return self._experts_method(layer, prefix)
        raise UnsupportedModelError(
            f"{prefix}: expected a linear, an embedding, an output head, attention or routed"
            f" experts, got {type(layer).__name__}, which checkpoint format version"
            f" {self.schema.format_version} does not cover. Serve the 16-bit model instead."
        )

    def _experts_method(self, layer: "RoutedExperts", prefix: str) -> QuantizeMethodBase | None:
        """How a layer's experts are computed, None for 16-bit ones."""
        from smoothrot_vllm.plugin import gpt_oss
        from smoothrot_vllm.plugin.experts import SmoothRotExpertsMethod

        names = {
            "w1": layer.ckpt_gate_proj_name,
            "w2": layer.ckpt_down_proj_name,
            "w3": str(layer.ckpt_up_proj_name),
        }
        if gpt_oss.has_experts(layer):
            gpt_oss.load_separate_experts()
            names = gpt_oss.NAMES
        linears = [
            f"{prefix}.{expert}.{name}"
            for expert in range(layer.global_num_experts)
            for name in names.values()
        ]
        schemes = {linear: self.schema.scheme(linear) for linear in linears}
        scheme = schemes[linears[0]]
        if other := next((linear for linear in linears if schemes[linear] != scheme), None):
            raise ConfigError(
                f"{prefix}: expected one scheme for all linears of all experts, got"
                f" {_describe(scheme)} for {linears[0]} and {_describe(schemes[other])} for"
                f" {other}. Convert again without overrides for experts."
            )
        if scheme is None:
            return None
        if self.schema.online.readers is not None:
            raise UnsupportedModelError(
                f"{prefix}: quantization_config.online.readers: expected null in a model with"
                " experts, whose input is not rotated at run time. Convert the model again."
            )
        return SmoothRotExpertsMethod(
            prefix, scheme, self.schema.online.down_proj, layer.moe_config, names
        )


def _describe(scheme: LinearScheme | None) -> str:
    if scheme is None:
        return "16-bit"
    group = "channel" if scheme.weights.group_size == -1 else f"group {scheme.weights.group_size}"
    return (
        f"W{scheme.weights.bits}A{scheme.activations.bits} per {group}, clip"
        f" {scheme.activations.clip}"
    )


def _check_platform() -> None:
    from vllm.platforms import current_platform

    from smoothrot_vllm import ops

    if current_platform.is_cpu():
        logger.info_once("SmoothRot CPU kernels: %s", ops.kernel_name())
        return
    if not current_platform.is_cuda():
        raise UnsupportedPlatformError(
            f"quantization {QUANT_METHOD!r}: expected vLLM's CPU or CUDA platform, got"
            f" {current_platform.device_name or 'unknown'}: there are kernels for x86 CPUs and"
            " NVIDIA GPUs only."
        )
    capability = current_platform.get_device_capability()
    if capability is None:
        raise UnsupportedPlatformError(
            f"quantization {QUANT_METHOD!r}: expected a visible GPU, got none. Check the driver."
        )
    ops.check_cuda(10 * capability.major + capability.minor)
    logger.info_once("SmoothRot CUDA kernels: built for %s", ", ".join(ops.cuda_architectures()))
