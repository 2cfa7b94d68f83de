# SPDX-License-Identifier: Apache-2.0
"""GGUF is refused, with what to do instead; and that works."""

from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, GgufConfig, LlamaConfig, PreTrainedModel

from smoothrot_offline.config import make_config
from smoothrot_offline.convert import convert
from smoothrot_offline.source.checkpoint import open_checkpoint, open_headers
from smoothrot_vllm.errors import CheckpointError

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
Q8 = gguf.GGMLQuantizationType.Q8_0


@pytest.fixture
def model() -> PreTrainedModel:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return AutoModelForCausalLM.from_config(config)


@pytest.fixture
def source(tmp_path: Path, model: PreTrainedModel) -> Path:
    """A directory with one GGUF file, whose linears have 8 bits."""
    folder = tmp_path / "gguf"
    folder.mkdir()
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    config = model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    for name, tensor in model.state_dict().items():
        module = name.removesuffix(".weight").removeprefix("model.layers.0.")
        block = "blk.0." if name.startswith("model.layers.") else ""
        stored = f"{block}{NAMES[module]}.weight"
        values = tensor.numpy()
        if "_proj" in name:
            writer.add_tensor(stored, gguf.quants.quantize(values, Q8), raw_dtype=Q8)
        else:
            writer.add_tensor(stored, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


@pytest.mark.parametrize("asked", ["", "model.gguf"], ids=["directory", "file"])
@pytest.mark.parametrize("configured", [False, True])
def test_refused_with_what_to_do(
    source: Path, model: PreTrainedModel, asked: str, configured: bool
) -> None:
    if configured:
        model.config.save_pretrained(source)
    with pytest.raises(CheckpointError, match=r"got GGUF \(model.gguf\).*GgufConfig\(dequantize"):
        open_headers(str(source / asked))


def test_what_the_refusal_says_to_do_gives_a_model_that_converts(
    source: Path, tmp_path: Path, model: PreTrainedModel
) -> None:
    AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file="model.gguf",
        dtype="bfloat16",
        quantization_config=GgufConfig(dequantize=True),
    ).save_pretrained(tmp_path / "saved")
    # GGUF has the rows of q and k in another order, this as it is.
    name = "model.layers.0.self_attn.o_proj.weight"
    expected = model.state_dict()[name]
    found = open_checkpoint(tmp_path / "saved").load([name])[name].float()
    assert (found - expected).norm() < 0.02 * expected.norm()
    convert(tmp_path / "saved", tmp_path / "out", make_config(scales="none"))
