# SPDX-License-Identifier: Apache-2.0
"""vLLM's own layers with our method: loading stored tensors shard by shard, computing with
them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from configs import make_config
from linears import (
    HEAD,
    HIDDEN,
    INTERMEDIATE,
    SCHEMES,
    VOCAB,
    Stored,
    down,
    finish,
    gate_up,
    in_proj_qkvz,
    linear_reference,
    load,
    qkv,
    tokens,
)
from vllm.config import LoadConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from smoothrot_vllm import reference
from smoothrot_vllm.format import WEIGHT_PACKED, WEIGHT_SCALE
from smoothrot_vllm.plugin.quant_config import SmoothRotConfig


@pytest.fixture(params=SCHEMES.values(), ids=list(SCHEMES))
def config(request: pytest.FixtureRequest, vllm_config: VllmConfig) -> SmoothRotConfig:
    return make_config(weights=request.param)


@pytest.mark.parametrize(
    "online", [{}, {"readers": {"size": HIDDEN, "block": 64}}], ids=["plain", "rotated"]
)
@pytest.mark.parametrize("size", [1, 2])
def test_qkv_computes_the_reference_on_every_rank(
    config: SmoothRotConfig,
    tensor_parallel: Callable[[int, int], None],
    size: int,
    online: dict[str, Any],
) -> None:
    block = 64 if online else 0
    config = make_config(weights=config.schema.weights.model_dump(), online=online)
    weights = config.schema.weights.model_dump()
    stored = {
        name: Stored.random(heads * HEAD, HIDDEN, weights, i)
        for i, (name, heads) in enumerate(zip("qkv", (4, 2, 2), strict=True))
    }
    x = tokens(HIDDEN)
    for rank in range(size):
        tensor_parallel(rank, size)
        layer = qkv(config)
        for name, linear in stored.items():
            linear.load_into(layer, name)
        finish(layer)
        expected = [
            linear_reference(x, linear, config, block).chunk(size, dim=1)[rank]
            for linear in stored.values()
        ]
        assert torch.equal(layer(x), torch.cat(expected, dim=1))


@pytest.mark.parametrize("size", [1, 2])
def test_gate_up_computes_the_reference_on_every_rank(
    config: SmoothRotConfig, tensor_parallel: Callable[[int, int], None], size: int
) -> None:
    stored = [
        Stored.random(INTERMEDIATE, HIDDEN, config.schema.weights.model_dump(), i) for i in range(2)
    ]
    x = tokens(HIDDEN)
    for rank in range(size):
        tensor_parallel(rank, size)
        layer = gate_up(config)
        for part, linear in enumerate(stored):
            linear.load_into(layer, part)
        finish(layer)
        expected = [
            linear_reference(x, linear, config).chunk(size, dim=1)[rank] for linear in stored
        ]
        assert torch.equal(layer(x), torch.cat(expected, dim=1))


@pytest.mark.parametrize("size", [1, 2])
def test_a_part_of_several_shards_computes_the_reference_on_every_rank(
    config: SmoothRotConfig, tensor_parallel: Callable[[int, int], None], size: int
) -> None:
    """The first linear of Qwen3.5's linear attention: queries, keys and values are stored as one,
    the gate by itself."""
    weights = config.schema.weights.model_dump()
    stored = [Stored.random(rows, HIDDEN, weights, i) for i, rows in enumerate((224, 96))]
    x = tokens(HIDDEN)
    for rank in range(size):
        tensor_parallel(rank, size)
        layer = in_proj_qkvz(config)
        stored[0].load_into(layer, (0, 1, 2))
        stored[1].load_into(layer, 3)
        finish(layer)
        y = torch.cat([linear_reference(x, linear, config) for linear in stored], dim=1)
        expected = [part.chunk(size, dim=1)[rank] for part in y.split([64, 64, 96, 96], dim=1)]
        assert torch.equal(layer(x), torch.cat(expected, dim=1))


@pytest.mark.parametrize("size", [1, 2])
def test_down_rotates_and_quantizes_its_own_shard(
    config: SmoothRotConfig, tensor_parallel: Callable[[int, int], None], size: int
) -> None:
    stored = Stored.random(HIDDEN, INTERMEDIATE, config.schema.weights.model_dump(), 3)
    x = tokens(INTERMEDIATE)
    for rank in range(size):
        tensor_parallel(rank, size)
        layer = down(config)
        stored.load_into(layer)
        finish(layer)
        x_shard = x.chunk(size, dim=1)[rank].contiguous()
        expected = linear_reference(x_shard, stored.of_rank(rank, size), config, block=96)
        assert torch.equal(layer(x_shard), expected)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("group", [-1, 32])
def test_one_checkpoint_serves_every_size_up_to_its_largest(
    tensor_parallel: Callable[[int, int], None], size: int, group: int
) -> None:
    """The attention and feed-forward of a model with 8 query and 2 key-value heads, made with
    --max-tp 8."""
    width = 8 * 96
    config = make_config(
        weights={"bits": 4, "group_size": group},
        online={"down_proj": {"size": width, "block": 96}},
        max_tensor_parallel=8,
    )
    weights = config.schema.weights.model_dump()
    heads = {"q": 8, "k": 2, "v": 2}
    attention = {
        name: Stored.random(count * HEAD, HIDDEN, weights, i)
        for i, (name, count) in enumerate(heads.items())
    }
    stored = Stored.random(HIDDEN, width, weights, 3)
    x, wide = tokens(HIDDEN), tokens(width)
    for rank in range(size):
        tensor_parallel(rank, size)
        layer = qkv(config, heads=8)
        for name, linear in attention.items():
            linear.load_into(layer, name)
        finish(layer)
        # A key-value head is on several ranks once there are more ranks than heads.
        shares = {"q": size, "k": min(size, 2), "v": min(size, 2)}
        expected = [
            linear_reference(x, linear, config).chunk(shares[name], dim=1)[
                rank * shares[name] // size
            ]
            for name, linear in attention.items()
        ]
        assert torch.equal(layer(x), torch.cat(expected, dim=1))
        row = down(config, width=width)
        stored.load_into(row)
        finish(row)
        own = wide.chunk(size, dim=1)[rank].contiguous()
        expected_row = linear_reference(own, stored.of_rank(rank, size), config, block=96)
        assert torch.equal(row(own), expected_row)


@pytest.mark.parametrize("groups", [1, 5])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_half_of_a_byte_of_group_scales_may_be_unused(
    vllm_config: VllmConfig, groups: int, group_size: int
) -> None:
    weights, width = {"bits": 4, "group_size": group_size}, groups * group_size
    config = make_config(weights=weights, online={})
    stored = Stored.random(HIDDEN, width, weights, 4)
    layer = down(config, width=width)
    stored.load_into(layer)
    finish(layer)
    x = tokens(width)
    assert torch.equal(layer(x), linear_reference(x, stored, config))


def test_leading_dimensions_and_dtype_are_kept(config: SmoothRotConfig) -> None:
    layer = down(config)
    Stored.random(HIDDEN, INTERMEDIATE, config.schema.weights.model_dump(), 3).load_into(layer)
    finish(layer)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = tokens(INTERMEDIATE, count=6).to(dtype)
        y = layer(x.reshape(2, 3, INTERMEDIATE))
        assert y.shape == (2, 3, HIDDEN)
        assert y.dtype == dtype
        assert torch.equal(y.reshape(6, HIDDEN), layer(x))


def test_bias_is_added_by_the_first_rank_only(
    vllm_config: VllmConfig, tensor_parallel: Callable[[int, int], None]
) -> None:
    config = make_config()
    stored = Stored.random(HIDDEN, INTERMEDIATE, SCHEMES["w4 per channel"], 3)
    x, bias = tokens(INTERMEDIATE), torch.linspace(-2, 2, HIDDEN)
    difference = []
    for rank in range(2):
        tensor_parallel(rank, 2)
        layer = down(config, bias=True)
        layer.reduce_results = False
        stored.load_into(layer)
        load(layer, "bias", bias)
        finish(layer)
        shard = x.chunk(2, dim=1)[rank].contiguous()
        expected = linear_reference(shard, stored.of_rank(rank, 2), config, 96)
        difference.append(layer(shard) - expected)
    torch.testing.assert_close(difference[0], bias.expand(5, HIDDEN), rtol=0, atol=1e-4)
    torch.testing.assert_close(difference[1], torch.zeros(5, HIDDEN), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("bits", "group_size"), [(4, -1), (4, 32), (4, 128), (8, -1)])
@pytest.mark.parametrize("size", [1, 2])
def test_head_shards_cover_the_vocabulary_and_padding_is_zero(
    tensor_parallel: Callable[[int, int], None], size: int, bits: int, group_size: int
) -> None:
    weights = {"bits": bits, "group_size": group_size}
    config = make_config(lm_head={"weights": weights, "activations": {"bits": 8}})
    stored = Stored.random(VOCAB, HIDDEN, weights, 5)
    x = tokens(HIDDEN)
    logits = []
    for rank in range(size):
        tensor_parallel(rank, size)
        head = ParallelLMHead(VOCAB, HIDDEN, quant_config=config, prefix="lm_head")
        stored.load_into(head)
        finish(head)
        logits.append(head.quant_method.apply(head, x))
    gathered = torch.cat(logits, dim=1)
    codes, scale = reference.quant(x, 1.0, 8)
    weight = (stored.packed, stored.scale, stored.group_scale)
    expected = reference.gemm(codes, scale, *weight, None, x.dtype, 8, bits)
    assert torch.equal(gathered[:, :VOCAB], expected)
    assert gathered.shape[1] > VOCAB
    assert torch.count_nonzero(gathered[:, VOCAB:]) == 0


def test_loading_frees_the_stored_codes(config: SmoothRotConfig) -> None:
    layer = down(config)
    stored = layer.weight_packed
    Stored.random(HIDDEN, INTERMEDIATE, config.schema.weights.model_dump(), 3).load_into(layer)
    finish(layer)
    assert layer.weight_packed is not stored
    # Group scales lie among the codes.
    assert {name for name, _ in layer.named_parameters()} == {WEIGHT_PACKED, WEIGHT_SCALE}


@pytest.mark.parametrize("weights", SCHEMES.values(), ids=list(SCHEMES))
def test_random_weights_for_benchmarks_need_no_checkpoint(weights: dict[str, int]) -> None:
    with set_current_vllm_config(VllmConfig(load_config=LoadConfig(load_format="dummy"))):
        layer = down(make_config(weights=weights))
    layer.get_parameter(WEIGHT_SCALE).data.fill_(1e-3)
    finish(layer)
    assert layer(tokens(INTERMEDIATE)).isfinite().all()


@pytest.mark.parametrize("size", [1, 2])
def test_a_fusion_that_is_stored_as_one_is_sharded_part_by_part(
    config: SmoothRotConfig, tensor_parallel: Callable[[int, int], None], size: int
) -> None:
    weights, x = config.schema.weights.model_dump(), tokens(HIDDEN)
    fused = (INTERMEDIATE, INTERMEDIATE)
    for make, parts, named in (
        (qkv, (4 * HEAD, 2 * HEAD, 2 * HEAD), {"qkv_proj": ["qkv_proj"]}),
        (gate_up, fused, {"gate_up_proj": ["gate_up_proj"]}),
        # GLM-4-0414's class, whose checkpoints store what it lists the parts of as one.
        (gate_up, fused, {"gate_up_proj": ["gate_proj", "up_proj"]}),
    ):
        stored = Stored.random(sum(parts), HIDDEN, weights, 5)
        expected = linear_reference(x, stored, config).split(parts, dim=1)
        for rank in range(size):
            tensor_parallel(rank, size)
            config.packed_modules_mapping = named
            layer = make(config)
            stored.load_into(layer)
            finish(layer)
            shards = torch.cat([part.chunk(size, dim=1)[rank] for part in expected], dim=1)
            assert torch.equal(layer(x), shards)


def test_compiled_and_eager_layers_agree_bit_for_bit(config: SmoothRotConfig) -> None:
    layer = down(config)
    Stored.random(HIDDEN, INTERMEDIATE, config.schema.weights.model_dump(), 3).load_into(layer)
    finish(layer)
    x = tokens(INTERMEDIATE)
    compiled = torch.compile(lambda t: layer.quant_method.apply(layer, t), fullgraph=True)
    assert torch.equal(compiled(x), layer.quant_method.apply(layer, x))
