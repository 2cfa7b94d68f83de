# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint says without its weights: configuration, safetensors headers, side files.
Imports no torch, so that a refusal that follows from them is quick."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from smoothrot_offline.source.composites import COMPOSITES
from smoothrot_offline.source.fused_experts import separated
from smoothrot_offline.source.mixtures import MIXTURES
from smoothrot_offline.source.stored import TensorInfo
from smoothrot_vllm.errors import CheckpointError
from smoothrot_vllm.foreign_files import (
    MAX_JSON_BYTES,
    parse_json,
    read_bytes,
    read_header,
    read_json,
    refuse_pointer,
)

CONFIG_NAME = "config.json"
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MODULES_NAME = "modules.json"
"""Of sentence-transformers: what follows the model, each in a folder of its own."""
WORK_PREFIX = "resume-"
"""Of the files that only serve to go on with an interrupted conversion."""

BASE_PREFIX = "model."
"""Of the tensors of a causal language model but its head; a base model saved by itself, as
embedding models are, has none."""
WRAPPERS = ("_orig_mod.", "module.")
"""Prefixes that torch.compile and data parallelism put before every name of a model that is
saved as it was wrapped."""

ADVICE = "Fetch the checkpoint again."
LARGE = 256 << 20
"""Bytes from which a side file is not copied: no tokenizer is as large."""
_OTHER_WEIGHTS = (
    "*.gguf",
    "*.onnx",
    "*.onnx_data",
    "*.h5",
    "*.msgpack",
    "*.tflite",
    "*.npy",
    "*.npz",
)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.joblib")
_PACKINGS = ("quantize_config.json", "quant_config.json")
"""How the weights of a source are packed, which those of a conversion are not."""
_CODE = ("*.py", "*.pyc", "*.so", "*.sh", "*.ipynb")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Headers:
    """Configuration and tensors of a model, the latter by the names that a causal language model
    gives them.

    ``renamed`` says in words how those differ from the stored names, if they do.
    """

    path: Path
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    renamed: str | None = None


@dataclass(frozen=True)
class SideFiles:
    """Paths relative to a model's directory: files to copy to its output as they are; what is
    left, with the reason."""

    copied: list[Path]
    left: dict[str, str]


def is_local(model: str) -> bool:
    """Whether a model is a directory here; else it is a hub id.

    Raises:
        CheckpointError: it can be neither.
    """
    path = Path(model)
    if path.is_file() and path.suffix == ".gguf":
        _refuse_gguf(path.parent, [path])
    if not path.is_dir() and (path.exists() or not _HUB_ID.fullmatch(model)):
        raise CheckpointError(
            f"{model}: expected a directory with {CONFIG_NAME} and safetensors, or a hub id like"
            " org/name."
        )
    return path.is_dir()


def resolve_source(model: str) -> Path:
    """Directory of a model given as a path or as a Hugging Face hub id (fetched only if no such
    path exists).

    Raises:
        CheckpointError: there is no such directory, and the hub has or gives no such model.
    """
    if is_local(model):
        return Path(model)
    from huggingface_hub import snapshot_download

    unread = [*_OTHER_WEIGHTS, *_PICKLES, *_CODE, ".*", "*/.*", "*/*.safetensors"]
    with _hub_errors(model):
        return Path(snapshot_download(model, ignore_patterns=unread))


def read_config(model: str) -> dict[str, Any]:
    """``config.json`` of a model given as a path or a hub id.

    Raises:
        CheckpointError: as :func:`resolve_source`; or it is no JSON object.
    """
    if is_local(model):
        path = Path(model)
        if not (path / CONFIG_NAME).exists():
            _refuse_gguf(path, sorted(path.glob("*.gguf")))
        return read_json(path / CONFIG_NAME, ADVICE)
    from huggingface_hub import hf_hub_download

    with _hub_errors(model):
        return read_json(Path(hf_hub_download(model, CONFIG_NAME)), ADVICE)


def read_headers(model: str | Path) -> Headers:
    """Configuration and headers of a model given as a path or a hub id; of a hub model, no weight
    is fetched.

    Raises:
        CheckpointError: a file is missing, truncated or malformed, the weights are not safetensors,
            or a file beside them is a Git LFS pointer.
    """
    path, config = Path(model), read_config(str(model))
    if is_local(str(model)):
        for file in side_files(path).copied:
            refuse_pointer(path / file)
        found = _local_tensors(path)
    else:
        from huggingface_hub import get_safetensors_metadata

        with _hub_errors(str(model)):
            files = get_safetensors_metadata(str(model)).files_metadata
        found = {
            name: TensorInfo(file, info.dtype, tuple(info.shape), name)
            for file, metadata in files.items()
            for name, info in metadata.tensors.items()
        }
    tensors, renamed = _named_as_causal_model(found)
    model_type = str(config.get("model_type"))
    composite = COMPOSITES.get(model_type)
    if composite is not None:
        tensors = {composite.stored_name(name): info for name, info in tensors.items()}
    table = MIXTURES.get(model_type) if composite is None else composite.text[0]
    if table is not None:
        tensors = separated(tensors, table)
    return Headers(path, config, tensors, renamed)


def side_files(path: Path) -> SideFiles:
    """Everything beside a model's weights: tokenizer, chat templates, processor, generation
    settings, licence, whatever else.

    Left where they are: weights in any format, pickles, code, hidden files, what is :data:`LARGE`,
    and folders that hold weights, pickles or a configuration, which are models of their own but for
    those that :data:`MODULES_NAME` names.
    """
    copied, left = [], {}
    modules = embedding_modules(path)
    for folder, folders, names in os.walk(path):
        here = Path(folder).relative_to(path)
        if here.parts and here in modules:
            for file in (here / name for name in sorted(names) if not name.startswith(".")):
                if reason := _left_reason(path / file):
                    left[str(file)] = reason
                else:
                    copied.append(file)
            continue
        if here.parts and (reason := _foreign_folder(here, names)):
            left[f"{here}/"] = reason
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            file = here / name
            if file in (Path(CONFIG_NAME), Path(INDEX_NAME)) or _matches(
                name, (".*", f"{WORK_PREFIX}*", "*.safetensors")
            ):
                continue
            if reason := _left_reason(path / file):
                left[str(file)] = reason
            else:
                copied.append(file)
    return SideFiles(sorted(copied), left)


def embedding_modules(path: Path) -> set[Path]:
    """The folders of what follows an embedding model (pooling, dense layers), relative to it; empty
    of any other model.

    Raises:
        CheckpointError: the list of them is damaged.
    """
    if not (path / MODULES_NAME).is_file():
        return set()
    data = read_bytes(path / MODULES_NAME, MAX_JSON_BYTES, ADVICE)
    try:
        return {Path(module["path"]) for module in parse_json(data) if module["path"]}
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{path / MODULES_NAME}: expected a list of modules, each with its path: {error}."
            f" {ADVICE}"
        ) from error


def _left_reason(file: Path) -> str | None:
    for reason, patterns in (
        ("weights", ("*.index.json", *_OTHER_WEIGHTS)),
        ("pickle", _PICKLES),
        ("code", _CODE),
        ("of the source's weights", _PACKINGS),
    ):
        if _matches(file.name, patterns):
            return reason
    if not file.is_file():
        return "no plain file"
    return "large" if file.stat().st_size >= LARGE else None


def _foreign_folder(folder: Path, names: list[str]) -> str | None:
    if ".partial" in folder.name:
        return "an unfinished output"
    models = (CONFIG_NAME, "*.safetensors", *_OTHER_WEIGHTS, *_PICKLES)
    return "a model of its own" if any(_matches(name, models) for name in names) else None


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _local_tensors(path: Path) -> dict[str, TensorInfo]:
    if (path / SINGLE_NAME).is_file():
        return _read_header(path, SINGLE_NAME)
    if (path / INDEX_NAME).is_file():
        return _indexed_tensors(path)
    # vLLM serves such a directory too.
    if files := sorted(file.name for file in path.glob("*.safetensors")):
        headers = [_read_header(path, file) for file in files]
        counts = Counter(name for header in headers for name in header)
        if twice := next((name for name, count in counts.items() if count > 1), None):
            raise CheckpointError(
                f"{path}: tensor {twice} is in more than one of {', '.join(files)}, and no"
                f" {INDEX_NAME} says which counts. Remove the files that are not of this model."
            )
        return {name: info for header in headers for name, info in header.items()}
    pickles = sorted(found.name for pattern in _PICKLES for found in path.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{path}: holds only pickled weights ({', '.join(pickles[:3])}), which can run code"
            " when opened. Save the model as safetensors first (transformers: save_pretrained)."
        )
    _refuse_gguf(path, sorted(path.glob("*.gguf")))
    raise CheckpointError(
        f"{path}: neither {SINGLE_NAME} nor {INDEX_NAME} nor another *.safetensors is there."
    )


def _refuse_gguf(path: Path, files: list[Path]) -> None:
    """Refuse a directory whose weights are the GGUF ``files``, if there are any: transformers reads
    such a model as a whole, and a conversion a layer at a time."""
    if files:
        raise CheckpointError(
            f"{path}: expected safetensors, got GGUF ({files[0].name}). Convert the 16-bit"
            " original; or save the model as safetensors first, which takes all of it in memory:"
            f" AutoModelForCausalLM.from_pretrained({str(path)!r}, gguf_file={files[0].name!r},"
            " dtype='bfloat16', quantization_config=GgufConfig(dequantize=True))"
            ".save_pretrained(...) with transformers, and its tokenizer likewise."
        )


def _indexed_tensors(path: Path) -> dict[str, TensorInfo]:
    weight_map = read_json(path / INDEX_NAME, ADVICE).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(file, str) for file in weight_map.values())
    ):
        raise CheckpointError(
            f"{path / INDEX_NAME}: expected an object weight_map from tensor names to file names."
        )
    headers = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file:
            raise CheckpointError(
                f"{path / INDEX_NAME}: weight_map: expected plain file names, got {file!r}."
            )
        headers[file] = _read_header(path, file)
    for name, file in weight_map.items():
        if name not in headers[file]:
            raise CheckpointError(
                f"{path / INDEX_NAME}: tensor {name} should be in {file}, whose header does not"
                " list it."
            )
    return {name: headers[file][name] for name, file in weight_map.items()}


def _named_as_causal_model(
    found: Mapping[str, TensorInfo],
) -> tuple[dict[str, TensorInfo], str | None]:
    """Tensors by the names that a causal language model gives them, and what was done to their
    stored names."""
    names, done = {name: name for name in found}, []
    while prefix := next(
        (prefix for prefix in WRAPPERS if names and all(name.startswith(prefix) for name in names)),
        None,
    ):
        names = {name.removeprefix(prefix): stored for name, stored in names.items()}
        done.append(f"the prefix {prefix!r} is stripped from them")
    if "embed_tokens.weight" in names and not any(name.startswith(BASE_PREFIX) for name in names):
        names = {
            name if name.startswith("lm_head.") else BASE_PREFIX + name: stored
            for name, stored in names.items()
        }
        done.append(
            f"{BASE_PREFIX!r} is put before them, as they are those of a base model, the layout of"
            " embedding models"
        )
    return {name: found[stored] for name, stored in names.items()}, (
        "names of tensors: " + "; ".join(done) if done else None
    )


@contextmanager
def _hub_errors(model: str) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        # The hub client raises its own errors, its HTTP library's and the system's.
        raise CheckpointError(
            f"{model}: not a local directory, and the hub did not give it: {error}"
        ) from error


def _read_header(path: Path, file: str) -> dict[str, TensorInfo]:
    return {
        name: TensorInfo(file, found.dtype, found.shape, name)
        for name, found in read_header(path / file, ADVICE).items()
    }
