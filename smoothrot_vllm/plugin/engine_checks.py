# SPDX-License-Identifier: Apache-2.0
"""Settings of vLLM's engine with which a converted model would answer wrongly: refused by name.

Each is accepted by vLLM and would change answers without a word. docs/compat.md goes through all
engine arguments.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from smoothrot_vllm.errors import ConfigError, UnsupportedModelError
from smoothrot_vllm.format import DRAFT_ARCHITECTURE, QuantizationSchema

if TYPE_CHECKING:
    from vllm.config import VllmConfig

LOAD_FORMATS = (
    "auto",
    "hf",
    "safetensors",
    "dummy",
    "runai_streamer",
    "fastsafetensors",
    "instanttensor",
)
"""Those that hand each tensor of a safetensors checkpoint to the layer that checks it, or make
weights up."""
TOKEN_DRAFTS = ("ngram", "ngram_gpu", "suffix", "draft_model")
"""Methods of speculative decoding whose drafts see the target's tokens only."""
OWN_HEAD = "mtp."
"""Beginning of the names of a model's own draft head, in vLLM's classes too."""
CPU_CACHE_DTYPES = ("auto", "fp8", "fp8_e4m3", "fp8_e5m2")
"""What vLLM's attention for CPUs computes with; it accepts the others too."""
STORED_KEYS = ("quantization_config", "compression_config", "tie_word_embeddings")
"""Keys of ``config.json`` that say what the stored tensors are."""

_ROTATED = (
    "what enters and leaves the decoder layers of this checkpoint is rotated, and the final norm's"
    " weight lies in the output head"
)
_CONVERT_ONLINE = "Convert the model with --residual online for that."


@dataclass(frozen=True)
class Refusal:
    """A setting that is refused.

    Args:
        option: as on the command line.
        given: what of a configuration is refused; nothing if the value is None.
        why: what would go wrong.
        instead: what to do.
        unless: the checkpoint is one that it is right for.
    """

    option: str
    given: Callable[["VllmConfig"], object]
    why: str
    instead: str
    unless: Callable[[QuantizationSchema], bool] = lambda _: False


def _pooling(config: "VllmConfig") -> object:
    model = config.model_config
    return (
        f"runner {model.runner_type}, convert {model.convert_type}"
        if model.runner_type == "pooling"
        else None
    )


def _given_embeddings(config: "VllmConfig") -> object:
    multimodal = config.model_config.multimodal_config
    return None if multimodal is None else multimodal.enable_mm_embeds or None


def _two_way_images(config: "VllmConfig") -> object:
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or not config.model_config.is_mm_prefix_lm:
        return None
    return "a model that attends to an image in both directions"


def _draft(config: "VllmConfig") -> object:
    speculative = config.speculative_config
    if speculative is None or speculative.method in TOKEN_DRAFTS or own_head(config):
        return None
    # Its class asks whether it is a head of this very conversion.
    transformed = (
        speculative.method == "eagle"
        and speculative.draft_model_config.architectures == [DRAFT_ARCHITECTURE]
    )
    return None if transformed else speculative.method


def own_head(config: "VllmConfig") -> str | None:
    """The method by which the served model's own head is to draft, from the same directory."""
    speculative = config.speculative_config
    if speculative is None or not str(speculative.method).endswith("mtp"):
        return None
    return speculative.method if speculative.model == config.model_config.model else None


def _holds_own_head(schema: QuantizationSchema) -> bool:
    return OWN_HEAD in schema.ignore


def keeps_hidden_states(schema: QuantizationSchema) -> bool:
    """Whether the residual stream is that of the source."""
    return schema.online.readers is not None


def _hidden_states_connector(config: "VllmConfig") -> object:
    transfer = config.kv_transfer_config
    if transfer is None:
        return None
    return next(
        (
            name
            for name in _connectors(transfer.kv_connector, transfer.kv_connector_extra_config)
            if "Hidden" in name
        ),
        None,
    )


def _connectors(name: str | None, extra: dict[str, Any]) -> Iterator[str]:
    """A connector's name, and those of the connectors it is made of."""
    yield str(name)
    for part in extra.get("connectors", []):
        yield from _connectors(part.get("kv_connector"), part.get("kv_connector_extra_config", {}))


def _load_format(config: "VllmConfig") -> object:
    found = config.load_config.load_format
    return None if found in LOAD_FORMATS else found


def _ignored_files(config: "VllmConfig") -> object:
    found = config.load_config.ignore_patterns
    return None if found == type(config.load_config)().ignore_patterns else found


def _stored_keys(config: "VllmConfig") -> object:
    overrides = config.model_config.hf_overrides
    return (
        next((key for key in STORED_KEYS if key in overrides), None)
        if isinstance(overrides, dict)
        else None
    )


def _cpu_cache_dtype(config: "VllmConfig") -> object:
    from vllm.platforms import current_platform

    found = config.cache_config.cache_dtype
    return found if current_platform.is_cpu() and found not in CPU_CACHE_DTYPES else None


REFUSALS = (
    Refusal("--runner pooling", _pooling, _ROTATED, _CONVERT_ONLINE, unless=keeps_hidden_states),
    Refusal(
        "--enable-prompt-embeds",
        lambda config: config.model_config.enable_prompt_embeds or None,
        _ROTATED,
        f"Send tokens or text. {_CONVERT_ONLINE}",
        unless=keeps_hidden_states,
    ),
    Refusal(
        "--enable-mm-embeds",
        _given_embeddings,
        _ROTATED,
        f"Send images. {_CONVERT_ONLINE}",
        unless=keeps_hidden_states,
    ),
    Refusal(
        "--limit-mm-per-prompt",
        _two_way_images,
        "vLLM's attention for CPUs looks back alone, and answers about images wrongly",
        """Serve text alone with --limit-mm-per-prompt '{"image": 0, "video": 0}'.""",
    ),
    Refusal(
        "--speculative-config",
        own_head,
        f"it holds no head that drafts ({OWN_HEAD}*), as what it was converted from held none, or"
        " held layers behind the last one, which are left out",
        f"Convert a checkpoint that holds one, or take one of {', '.join(TOKEN_DRAFTS)}.",
        unless=_holds_own_head,
    ),
    Refusal(
        "--speculative-config",
        _draft,
        f"this method reads hidden states, and {_ROTATED}",
        f"Transform an EAGLE head of a Llama with smoothrot-convert draft, or take one of"
        f" {', '.join(TOKEN_DRAFTS)}. {_CONVERT_ONLINE}",
        unless=keeps_hidden_states,
    ),
    Refusal(
        "--kv-transfer-config",
        _hidden_states_connector,
        _ROTATED,
        _CONVERT_ONLINE,
        unless=keeps_hidden_states,
    ),
    Refusal(
        "--load-format",
        _load_format,
        f"a converted model is read from safetensors, tensor by tensor ({', '.join(LOAD_FORMATS)});"
        " what a running server saved is laid out for that machine's kernels",
        "Leave it out, and serve the directory that smoothrot-convert wrote.",
    ),
    Refusal(
        "--ignore-patterns",
        _ignored_files,
        "vLLM does not notice 16-bit tensors that are not read",
        "Leave it out.",
    ),
    Refusal(
        "--hf-overrides",
        _stored_keys,
        "the stored tensors would be read as what they are not",
        "Leave this key out, or convert the model again.",
    ),
    Refusal(
        "--hf-config-path",
        lambda config: config.model_config.hf_config_path,
        "config.json says what the stored tensors are, and must be the one beside them",
        "Leave it out.",
    ),
    Refusal(
        "--quantization-config",
        lambda config: config.model_config.quantization_config,
        "the weights are quantized already",
        "Leave it out.",
    ),
    Refusal(
        "--kv-cache-dtype",
        _cpu_cache_dtype,
        f"vLLM's attention for CPUs computes with {', '.join(CPU_CACHE_DTYPES)}, and answers"
        " wrongly or ignores the option with any other",
        "Take one of these.",
    ),
    Refusal(
        "--weight-transfer-config",
        lambda config: config.weight_transfer_config,
        "vLLM would put single tensors in place unchecked",
        "Leave it out; reload_weights takes a converted directory.",
    ),
)
"""Every refused setting; docs/compat.md has a row for each."""


def check_engine(config: "VllmConfig", schema: QuantizationSchema) -> None:
    """Refuse an engine that a converted model cannot be served by.

    Args:
        config: vLLM's.
        schema: of the model that is about to be built. With ``online.readers`` its residual stream
            is the source's.

    Raises:
        ConfigError: the first setting of :data:`REFUSALS` that is given.
        UnsupportedModelError: see :func:`check_rope`.
    """
    check_rope(config)
    for refusal in REFUSALS:
        if refusal.unless(schema):
            continue
        if (found := refusal.given(config)) is not None:
            raise ConfigError(
                f"{refusal.option}: not with this converted model, got {found}: {refusal.why}."
                f" {refusal.instead}"
            )


def check_rope(config: "VllmConfig") -> None:
    """Refuse what vLLM's kernel for CPUs computes wrongly, for 16-bit models too: RoPE that is not
    scaled, of queries that are given head by head, as attention by latent states gives them.

    Raises:
        UnsupportedModelError: the model is served on a CPU and has both.
    """
    from vllm.platforms import current_platform

    model = config.model_config
    if not current_platform.is_cpu() or not model.is_deepseek_mla:
        return
    if (kind := model.hf_text_config.rope_parameters["rope_type"]) == "default":
        raise UnsupportedModelError(
            "config.json: rope_parameters: rope_type: expected yarn where latent states"
            f" (kv_lora_rank) are served on a CPU, got {kind}, which vLLM's kernel for CPUs"
            " computes wrongly for them. Serve the model on a GPU."
        )
