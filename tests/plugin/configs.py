# SPDX-License-Identifier: Apache-2.0
"""The quantization config the plugin's tests start from."""

from typing import Any

from smoothrot_vllm.plugin.quant_config import SmoothRotConfig

_SCHEMA = {
    "quant_method": "smoothrot",
    "format_version": 2,
    "weights": {"bits": 4, "group_size": -1, "symmetric": True},
    "activations": {"bits": 8, "dynamic": True, "granularity": "token", "clip": 1.0},
    "online": {"down_proj": {"size": 192, "block": 96}},
    "lm_head": {"weights": {"bits": 8}, "activations": {"bits": 8}},
    "max_tensor_parallel": 2,
    "ignore": [],
}
_PACKED_MODULES = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
    "in_proj_qkvz": ["in_proj_qkv", "in_proj_z"],
}


def make_config(**changes: Any) -> SmoothRotConfig:
    """As vLLM makes it from ``config.json`` and the model class, with the given fields replaced."""
    config = SmoothRotConfig.from_config({**_SCHEMA, **changes})
    config.packed_modules_mapping = _PACKED_MODULES
    return config
