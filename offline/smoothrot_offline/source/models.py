# SPDX-License-Identifier: Apache-2.0
"""The one door to what transformers makes of a directory of others: configurations and models.

Python code that a directory brings is never run and never asked about, pickles are never opened,
and a directory is never a reason to use the network. Whatever transformers raises becomes an error
that names the file and what to do. foreign_tokenizers.py is the same door's other half.
"""

import copy
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, get_hf_quantizer

from smoothrot_offline.source.headers import CONFIG_NAME, read_headers
from smoothrot_offline.source.stored import TensorInfo
from smoothrot_vllm.errors import (
    CheckpointError,
    ConfigError,
    SmoothRotError,
    UnsupportedModelError,
)
from smoothrot_vllm.foreign_files import read_json
from smoothrot_vllm.format import QUANT_METHOD, TRANSFORMERS_WEIGHTS

LOCAL_ONLY: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
"""Goes with every ``from_pretrained``: left out, transformers asks on the terminal whether to
run a directory's code."""
MAX_COUNT = 1 << 16
"""Of anything that a configuration makes many of: transformers makes a list or modules of as
many before it looks at weights."""
MOST_WEIGHTS_PER_BYTE = 8
"""Of any quantization method."""
_COUNTS = re.compile(
    r"num_.*|n_(layer|head|routed_expert|shared_expert)s?|.*_(layers|heads|experts)"
)
_SIZES = re.compile(r".*(_size|_dim)|n_embd|n_inner|d_model|d_ff")
_IMPLEMENTATION = re.compile(r"_?(attn|experts)_implementation(_internal)?")
_METHOD_PACKAGES = {
    "gptq": "gptqmodel optimum",
    "awq": "gptqmodel",
    "compressed-tensors": "compressed-tensors",
    "bitsandbytes": "bitsandbytes",
    "quanto": "optimum-quanto",
    "torchao": "torchao",
    "hqq": "hqq",
    "aqlm": "aqlm",
    "eetq": "eetq",
    "auto-round": "auto-round",
}


@contextmanager
def explained(explain: Callable[[BaseException], SmoothRotError]) -> Iterator[None]:
    """Turn whatever a library raises over a foreign file, panics of Rust included, into what
    ``explain`` makes of it."""
    try:
        yield
    except (SmoothRotError, MemoryError):
        raise
    except Exception as error:
        raise explain(error) from error
    except BaseException as error:
        # A panic of a Rust library is no Exception, and pyo3 does not let its class be imported.
        if type(error).__name__ != "PanicException":
            raise
        raise explain(error) from error


def foreign_errors(what: str, advice: str) -> AbstractContextManager[None]:
    """:func:`explained` by a :class:`CheckpointError` that begins with ``what`` and ends with
    ``advice``."""
    return explained(lambda error: CheckpointError(f"{what}: {one_line(error)}. {advice}"))


def one_line(error: BaseException) -> str:
    """An error's kind and text in one line, which a library's whole report of a failure may not
    be."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= 400 else text[:400] + ' …'}".rstrip()


def parse_config(config: Mapping[str, Any], model_type: str) -> PreTrainedConfig:
    """A configuration as transformers' own class of the family reads it.

    Raises:
        UnsupportedModelError: it makes too many of something, or the class refuses it.
    """
    _check_counts(config)
    try:
        return CONFIG_MAPPING[model_type].from_dict(dict(config))
    except MemoryError:
        raise
    except Exception as error:
        # transformers validates with several libraries and raises whatever each of them raises.
        raise UnsupportedModelError(
            f"config.json: transformers refuses it as {model_type}: {' '.join(str(error).split())}"
        ) from error


def make_model(config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    """A new model with a head for tokens, on the current device.

    Args:
        config: of the model, which is copied.
        options: of ``from_config``.
    """
    model: PreTrainedModel = _automatic(config).from_config(
        copy.deepcopy(config), trust_remote_code=False, **options
    )
    return model


def _automatic(config: PreTrainedConfig) -> Any:
    """transformers' automatic class of models that continue tokens and images, or tokens alone:
    of a model with images the latter may find the text tower."""
    takes_images = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if takes_images else AutoModelForCausalLM


def _class_of(config: PreTrainedConfig) -> Any:
    """The class that :func:`_automatic` finds."""
    takes_images = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    known = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING if takes_images else MODEL_FOR_CAUSAL_LM_MAPPING
    return known[type(config)]


def beside_text(outer: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of a vision-language model that is none of its text tower's layers, by
    the name of transformers' module.

    Raises:
        UnsupportedModelError: there is no such model.
    """
    config = copy.deepcopy(outer)
    config.text_config.num_hidden_layers = 0
    try:
        with torch.device("meta"), warnings.catch_warnings():
            # What all layers are given together has no width without any.
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")
            model = make_model(config, attn_implementation="eager")
    except Exception as error:
        raise UnsupportedModelError(
            f"config.json: transformers makes no {outer.model_type} of it: {one_line(error)}."
        ) from error
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def load_config(directory: str | Path) -> PreTrainedConfig:
    """The configuration of a model directory of any family.

    Raises:
        CheckpointError: there is no config.json, or transformers does not read it.
        UnsupportedModelError: only Python code that the directory brings would read it.
    """
    path = Path(directory) / CONFIG_NAME
    found = read_json(path, "Fetch the checkpoint again.")
    _check_counts(found)
    _refuse_indirections(path, found)
    if "auto_map" in found and str(found.get("model_type")) not in set(CONFIG_MAPPING):
        raise UnsupportedModelError(
            f"{path}: model_type {found.get('model_type')!r} needs its own Python code (auto_map:"
            f" {found['auto_map']}), which is never run. Use a model whose architecture"
            " transformers itself implements."
        )
    with foreign_errors(
        f"{path}: transformers {version('transformers')} does not read it",
        "Check model_type, or fetch it again.",
    ):
        return AutoConfig.from_pretrained(directory, **LOCAL_ONLY)


def load_causal_lm(
    directory: Path,
    config: PreTrainedConfig,
    tensors: dict[str, torch.Tensor] | None = None,
    **options: Any,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model of any family with the weights of a directory, and what transformers says of the
    loading.

    Args:
        directory: with config.json and safetensors.
        config: of the model, from :func:`load_config`.
        tensors: all weights, where their files or names are not those that transformers looks for.
        options: of ``from_pretrained``.

    Raises:
        CheckpointError: weights are missing, damaged or only there as pickles, or do not fit the
            configuration.
        ConfigError: the model is quantized by a method whose package is not installed.
    """
    check_method(directory, config)
    _check_sizes(directory, config, read_headers(directory).tensors)
    if (directory / "adapter_config.json").exists():
        raise CheckpointError(
            f"{directory}: holds a LoRA adapter (adapter_config.json) beside the model, which is"
            " loaded or not by what is installed. Move one of them to a directory of its own."
        )
    with explained(lambda error: _model_error(directory, error)):
        # The automatic class wants a directory to look in.
        kind: Any = _automatic(config) if tensors is None else _class_of(config)
        place = directory if tensors is None else None
        loaded: Any = kind.from_pretrained(
            place,
            config=config,
            state_dict=tensors,
            output_loading_info=True,
            use_safetensors=True,
            **LOCAL_ONLY,
            **options,
        )
    model, info = loaded
    return model, info


def quantization_method(directory: Path) -> str | None:
    """``quant_method`` of a directory's ``config.json``, None for one that is not quantized.

    Raises:
        CheckpointError: ``config.json`` cannot be read, or has a ``quantization_config`` without a
            method.
    """
    found = read_json(directory / CONFIG_NAME, "Fetch the checkpoint again.").get(
        "quantization_config"
    )
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else None
    if not isinstance(method, str):
        raise CheckpointError(
            f"{directory / CONFIG_NAME}: quantization_config: expected an object with a"
            f" quant_method, got {found!r}. Fetch it again."
        )
    return method


def check_method(directory: Path, config: PreTrainedConfig) -> None:
    """Refuse a model whose quantization method does not run here; no weight is read.

    Args:
        directory: of the model.
        config: its configuration, from :func:`load_config`.

    Raises:
        ConfigError: transformers does not know the method, or a package that it needs is not
            installed.
    """
    method = quantization_method(directory)
    if method in (None, QUANT_METHOD):
        return
    # bitsandbytes is there once for 4 and once for 8 bits.
    if method not in {*AUTO_QUANTIZER_MAPPING, "bitsandbytes"}:
        raise ConfigError(
            f"{directory}: quantization_config: quant_method: expected a method that transformers"
            f" has, got {method!r}, whose weights it would take for plain ones. Give the 16-bit"
            " model."
        )
    with explained(lambda error: _model_error(directory, error)):
        # It replaces the quantization_config of what it is given.
        get_hf_quantizer(copy.deepcopy(config), None, None, True, {})


def sixteen_bit_bytes(directory: Path) -> int:
    """Bytes of a model of any family with 16 bits for each parameter, however its weights are
    stored; none is read.

    Raises:
        CheckpointError: see :func:`load_config`.
        ConfigError: see :func:`check_method`.
    """
    config = load_config(directory)
    check_method(directory, config)
    return 2 * _count_parameters(directory, config)


def _count_parameters(directory: Path, config: PreTrainedConfig) -> int:
    """Parameters of a model; nothing of its size is allocated."""
    with (
        foreign_errors(f"{directory}: cannot make the model", "Fetch the model again."),
        torch.device("meta"),
    ):
        model = make_model(config, attn_implementation="eager")
    # A head that is the embedding comes once.
    return sum(parameter.numel() for parameter in model.parameters())


def _model_error(directory: Path, cause: BaseException) -> SmoothRotError:
    """What is wrong with a model that did not load."""
    method = quantization_method(directory)
    if method is None or method == QUANT_METHOD or not isinstance(cause, ImportError):
        return CheckpointError(
            f"{directory}: cannot load the model: {one_line(cause)}. Fetch or convert the model"
            " again."
        )
    packages = _METHOD_PACKAGES.get(method, "")
    return ConfigError(
        f"{directory}: quantized by another method, quant_method {method!r}, which transformers"
        f" does not run here: {one_line(cause)} Install what it"
        f" needs{packages and f' (pip install {packages})'}, or give the 16-bit model."
    )


def _refuse_indirections(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse keys by which a configuration has transformers fetch code or weights from
    elsewhere."""
    for key, value in _items(config):
        if _IMPLEMENTATION.fullmatch(key) and "/" in str(value):
            raise UnsupportedModelError(
                f"{path}: {key}: expected a name of transformers' own such as sdpa, got {value!r},"
                " code of a hub repository, which is never run. Remove the key."
            )
        if key == "transformers_weights" and value not in (None, TRANSFORMERS_WEIGHTS):
            raise UnsupportedModelError(
                f"{path}: {key}: expected the weights in model.safetensors or its index, got"
                f" {value!r}. Rename the file, and remove the key."
            )


def _check_counts(config: Mapping[str, Any]) -> None:
    for key, value in _items(config):
        if (
            _COUNTS.fullmatch(key)
            and isinstance(value, int | float)
            and not 0 <= value <= MAX_COUNT
        ):
            raise UnsupportedModelError(
                f"config.json: {key}: expected 0 to {MAX_COUNT}, got {value}. Fetch it again."
            )
        # transformers multiplies it by a width: a list would become as long.
        if key == "partial_rotary_factor" and not isinstance(value, int | float | None):
            raise UnsupportedModelError(
                f"config.json: {key}: expected a number, got {value!r}. Fetch it again."
            )


def _check_sizes(
    directory: Path, config: PreTrainedConfig, headers: Mapping[str, TensorInfo]
) -> None:
    """Refuse a configuration of a larger model than the weights can be of: it would be allocated
    first."""
    path = directory / CONFIG_NAME
    longest = max((max(info.shape, default=0) for info in headers.values()), default=0)
    for key, value in _items(read_json(path)):
        limit = (
            len(headers) if re.fullmatch(r"num_hidden_layers|n_layers?|num_layers", key) else None
        )
        # Packed weights are up to eight times as wide as they are stored; fused ones hold several
        # linears.
        if _SIZES.fullmatch(key):
            limit = max(64 * longest, MAX_COUNT)
        if limit is not None and isinstance(value, int | float) and value > limit:
            raise CheckpointError(
                f"{path}: {key}: expected at most {limit} for the {len(headers)} tensors of the"
                f" checkpoint, got {value}. Fetch configuration and weights of the same model."
            )
    stored = sum(
        (directory / file).stat().st_size for file in {info.file for info in headers.values()}
    )
    if (wanted := _count_parameters(directory, config)) > MOST_WEIGHTS_PER_BYTE * stored:
        raise CheckpointError(
            f"{path}: expected a model of at most {MOST_WEIGHTS_PER_BYTE} weights for each of"
            f" {stored} stored bytes, got one of {wanted}. Fetch configuration and weights of the"
            " same model."
        )


def _items(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every key and value of a configuration and of those inside it."""
    for key, value in config.items():
        yield str(key), value
        if isinstance(value, dict):
            yield from _items(value)
