# SPDX-License-Identifier: Apache-2.0
"""Llama checkpoints of the sizes of real ones: random, or sparse files of zeros.

Random weights serve as well as real ones where only time counts; answers are never looked at.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch

SHAPES: dict[str, dict[str, Any]] = {
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "tie_word_embeddings": True,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
}
COMMON = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
CHUNK = 1 << 22


def make_model(directory: Path, shape: dict[str, Any], random: bool) -> Path:
    """A checkpoint of one file for each decoder layer, and one for the rest: random, or sparse
    and zero."""
    directory.mkdir()
    config = COMMON | shape
    (directory / "config.json").write_text(json.dumps(config))
    files: dict[str, dict[str, tuple[int, ...]]] = {"rest": rest_tensors(config)}
    for index in range(shape["num_hidden_layers"]):
        files[f"layer-{index:05d}"] = layer_tensors(config, index)
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(files.values(), start=1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        write_file(directory / file, tensors, random)
        weight_map |= dict.fromkeys(tensors, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def rest_tensors(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of what is outside the decoder layers."""
    table = (config["vocab_size"], config["hidden_size"])
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": table,
        "model.norm.weight": table[1:],
    }
    return shapes if config["tie_word_embeddings"] else shapes | {"lm_head.weight": table}


def layer_tensors(config: dict[str, Any], index: int) -> dict[str, tuple[int, ...]]:
    """Shapes of one decoder layer."""
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    values = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    linears = {
        "q_proj": (hidden, hidden),
        "k_proj": (values, hidden),
        "v_proj": (values, hidden),
        "o_proj": (hidden, hidden),
    }
    shapes: dict[str, tuple[int, ...]] = {
        f"self_attn.{name}.weight": shape for name, shape in linears.items()
    }
    shapes |= {"mlp.gate_proj.weight": (wide, hidden), "mlp.up_proj.weight": (wide, hidden)}
    shapes |= {"mlp.down_proj.weight": (hidden, wide)}
    shapes |= {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
    return {f"model.layers.{index}.{name}": shape for name, shape in shapes.items()}


def write_file(path: Path, tensors: dict[str, tuple[int, ...]], random: bool) -> None:
    """A bfloat16 safetensors file written a few megabytes at a time, or one whose data is a
    hole."""
    header, end = {}, 0
    for name, shape in tensors.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    generator = torch.Generator().manual_seed(len(text) + end)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        if not random:
            file.truncate(8 + len(text) + end)
            return
        for shape in tensors.values():
            for start in range(0, math.prod(shape), CHUNK):
                values = (
                    torch.randn(min(CHUNK, math.prod(shape) - start), generator=generator)
                    / shape[-1] ** 0.5
                )
                file.write(values.bfloat16().view(torch.uint8).numpy().data)
