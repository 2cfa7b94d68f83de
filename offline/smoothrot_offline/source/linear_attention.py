# SPDX-License-Identifier: Apache-2.0
"""The tables of Qwen3.5 and, but for its experts, of Qwen3-Next: their layers have linear or full
attention."""

from dataclasses import replace

from smoothrot_offline.source.families import LLAMA
from smoothrot_offline.source.parts import DraftHead, LinearAttention

# A gate between attention and o_proj leaves no place for R2.
_GATED_ATTENTION = replace(
    LLAMA,
    model_type="qwen3_5_text",
    class_name="Qwen3_5ForCausalLM",
    linears=LLAMA.linears | {"self_attn.q_proj": ("gated_query", "hidden")},
    biases={},
    value="",
    head_norms=("self_attn.q_norm", "self_attn.k_norm"),
    norm_offset=1.0,
    layer_types=True,
    settings={
        "hidden_act": ("silu",),
        # transformers gives all four linears a bias then, vLLM none.
        "attention_bias": (False,),
        "qkv_bias": (False, None),
        "attn_output_gate": (True,),
        "output_gate_type": ("silu", "swish"),
        "layer_scale": (False, None),
        "dual_chunk_attention_config": (None,),
    },
    same={},
    partial_rotary=True,
    draft=DraftHead(layers="mtp_num_hidden_layers"),
    rotary_sections=True,
)


_DELTA_LINEARS = {
    "linear_attn.in_proj_qkv": ("delta_query_key_value", "hidden"),
    "linear_attn.in_proj_z": ("delta_value", "hidden"),
    "linear_attn.in_proj_b": ("delta_heads", "hidden"),
    "linear_attn.in_proj_a": ("delta_heads", "hidden"),
}
_DELTA_ATTENTION = replace(
    _GATED_ATTENTION,
    linears={
        **_DELTA_LINEARS,
        "linear_attn.out_proj": ("hidden", "delta_value"),
        **{name: shape for name, shape in LLAMA.linears.items() if name.startswith("mlp.")},
    },
    readers=LLAMA.readers | {"input_layernorm": tuple(_DELTA_LINEARS)},
    writers=("linear_attn.out_proj", "mlp.down_proj"),
    output="linear_attn.out_proj",
    head_norms=(),
    sixteen_bit=("linear_attn.in_proj_b", "linear_attn.in_proj_a"),
    parameters={
        "linear_attn.conv1d.weight": ("delta_query_key_value", "one", "delta_kernel"),
        "linear_attn.A_log": ("delta_heads",),
        "linear_attn.dt_bias": ("delta_heads",),
        "linear_attn.norm.weight": ("delta_value_head",),
    },
    linear_attention=LinearAttention(
        key_heads="linear_num_key_heads",
        value_heads="linear_num_value_heads",
        key_head_dim="linear_key_head_dim",
        value_head_dim="linear_value_head_dim",
        kernel="linear_conv_kernel_dim",
    ),
)


QWEN3_5 = replace(
    _GATED_ATTENTION,
    kinds={"full_attention": _GATED_ATTENTION, "linear_attention": _DELTA_ATTENTION},
)


# Queries, keys, values and gates of a group of heads stand together, in both classes.
_FUSED_DELTA_LINEARS = {
    "linear_attn.in_proj_qkvz": ("delta_query_key_value_gate", "hidden"),
    "linear_attn.in_proj_ba": ("two_delta_heads", "hidden"),
}
QWEN3_NEXT_DENSE = replace(
    _GATED_ATTENTION,
    rotary_sections=False,
    draft=DraftHead(layers="num_nextn_predict_layers"),
    plain_head=True,
    # vLLM has no tied head.
    settings=_GATED_ATTENTION.settings | {"tie_word_embeddings": (False,)},
    kinds={
        "full_attention": _GATED_ATTENTION,
        "linear_attention": replace(
            _DELTA_ATTENTION,
            linears={
                name: shape
                for name, shape in _DELTA_ATTENTION.linears.items()
                if name not in _DELTA_LINEARS
            }
            | _FUSED_DELTA_LINEARS,
            readers=LLAMA.readers | {"input_layernorm": tuple(_FUSED_DELTA_LINEARS)},
            sixteen_bit=("linear_attn.in_proj_ba",),
        ),
    },
)
