# SPDX-License-Identifier: Apache-2.0
"""vLLM's own layers with our method: loading stored tensors shard by shard, checking them,
computing with them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from configs import make_config
from vllm.config import LoadConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.linear import (
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from smoothrot_vllm import reference
from smoothrot_vllm.errors import CheckpointError, ConfigError, UnsupportedModelError
from smoothrot_vllm.format import WEIGHT_PACKED, WEIGHT_SCALE
from smoothrot_vllm.plugin.quant_config import SmoothRotConfig

HIDDEN, INTERMEDIATE, HEAD, HEADS, KV_HEADS, VOCAB = 128, 192, 32, 4, 2, 261
GATE_UP, QKV, DOWN = (
    "model.layers.0.mlp.gate_up_proj",
    "model.layers.0.self_attn.qkv_proj",
    "model.layers.0.mlp.down_proj",
)
SCHEMES = {
    "w4 per channel": {"bits": 4, "group_size": -1},
    "w4 in groups of 32": {"bits": 4, "group_size": 32},
    "w8 per channel": {"bits": 8, "group_size": -1},
}


@dataclass
class Stored:
    """One linear of a checkpoint."""

    packed: torch.Tensor
    scale: torch.Tensor

    @classmethod
    def random(cls, rows: int, columns: int, weights: dict[str, int], seed: int) -> "Stored":
        generator = torch.Generator().manual_seed(seed)
        bits, group = weights["bits"], weights["group_size"]
        top = reference.quant_max(bits)
        codes = torch.randint(
            -top - 1, top + 1, (rows, columns), generator=generator, dtype=torch.int8
        )
        groups = 1 if group == -1 else columns // group
        return cls(
            reference.encode(codes, bits), torch.rand(rows, groups, generator=generator) + 0.5
        )

    def load_into(self, layer: torch.nn.Module, *shard: int | str) -> None:
        load(layer, WEIGHT_PACKED, self.packed, *shard)
        load(layer, WEIGHT_SCALE, self.scale, *shard)


def load(layer: torch.nn.Module, name: str, tensor: torch.Tensor, *shard: int | str) -> None:
    """As vLLM's model classes do with a tensor of the checkpoint."""
    parameter: Any = getattr(layer, name)
    parameter.weight_loader(parameter, tensor, *shard)


def linear_reference(
    x: torch.Tensor, stored: Stored, layer_config: SmoothRotConfig, block: int = 0
) -> torch.Tensor:
    weights, acts = layer_config.schema.weights, layer_config.schema.activations
    codes, scale = (
        reference.hadamard_quant(x, block, acts.clip, acts.bits)
        if block
        else reference.quant(x, acts.clip, acts.bits)
    )
    return reference.gemm(
        codes, scale, stored.packed, stored.scale, None, x.dtype, acts.bits, weights.bits
    )


def tokens(columns: int, count: int = 5) -> torch.Tensor:
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(7))


def qkv(config: SmoothRotConfig) -> QKVParallelLinear:
    return QKVParallelLinear(
        HIDDEN,
        HEAD,
        HEADS,
        KV_HEADS,
        bias=False,
        quant_config=config,
        prefix=QKV,
        return_bias=False,
    )


def gate_up(config: SmoothRotConfig) -> MergedColumnParallelLinear:
    sizes = [INTERMEDIATE, INTERMEDIATE]
    return MergedColumnParallelLinear(
        HIDDEN, sizes, bias=False, quant_config=config, prefix=GATE_UP, return_bias=False
    )


def down(config: SmoothRotConfig, bias: bool = False) -> RowParallelLinear:
    return RowParallelLinear(
        INTERMEDIATE,
        HIDDEN,
        bias=bias,
        quant_config=config,
        prefix=DOWN,
        return_bias=False,
        reduce_results=bias,
    )


def finish(layer: LinearBase | ParallelLMHead) -> None:
    layer.quant_method.process_weights_after_loading(layer)


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
        torch.testing.assert_close(layer(x), torch.cat(expected, dim=1), rtol=1e-6, atol=1e-5)


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
        torch.testing.assert_close(layer(x), torch.cat(expected, dim=1), rtol=1e-6, atol=1e-5)


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
        scale = (
            stored.scale if stored.scale.shape[1] == 1 else stored.scale.chunk(size, dim=1)[rank]
        )
        shard = Stored(stored.packed.chunk(size, dim=1)[rank], scale)
        x_shard = x.chunk(size, dim=1)[rank].contiguous()
        torch.testing.assert_close(
            layer(x_shard), linear_reference(x_shard, shard, config, block=96), rtol=1e-6, atol=1e-5
        )


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
        layer = QKVParallelLinear(
            HIDDEN, HEAD, 8, 2, bias=False, quant_config=config, prefix=QKV, return_bias=False
        )
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
        torch.testing.assert_close(layer(x), torch.cat(expected, dim=1), rtol=1e-6, atol=1e-5)
        row = RowParallelLinear(
            width,
            HIDDEN,
            bias=False,
            quant_config=config,
            prefix=DOWN,
            return_bias=False,
            reduce_results=False,
        )
        stored.load_into(row)
        finish(row)
        scale = stored.scale if group == -1 else stored.scale.chunk(size, dim=1)[rank]
        shard = Stored(stored.packed.chunk(size, dim=1)[rank], scale)
        own = wide.chunk(size, dim=1)[rank].contiguous()
        torch.testing.assert_close(
            row(own), linear_reference(own, shard, config, block=96), rtol=1e-6, atol=1e-5
        )


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
        difference.append(
            layer(shard)
            - linear_reference(
                shard, Stored(stored.packed.chunk(2, dim=1)[rank], stored.scale), config, 96
            )
        )
    torch.testing.assert_close(difference[0], bias.expand(5, HIDDEN), rtol=0, atol=1e-4)
    torch.testing.assert_close(difference[1], torch.zeros(5, HIDDEN), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("bits", "group_size"), [(4, -1), (4, 32), (8, -1)])
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
    expected = reference.gemm(codes, scale, stored.packed, stored.scale, None, x.dtype, 8, bits)
    torch.testing.assert_close(gathered[:, :VOCAB], expected, rtol=1e-6, atol=1e-4)
    assert gathered.shape[1] > VOCAB
    assert torch.count_nonzero(gathered[:, VOCAB:]) == 0


def test_loading_frees_the_stored_codes(vllm_config: VllmConfig) -> None:
    layer = down(make_config())
    stored = layer.weight_packed
    Stored.random(HIDDEN, INTERMEDIATE, SCHEMES["w4 per channel"], 3).load_into(layer)
    finish(layer)
    assert layer.weight_packed is not stored
    assert {name for name, _ in layer.named_parameters()} == {WEIGHT_PACKED, WEIGHT_SCALE}


@pytest.mark.parametrize("name", [WEIGHT_PACKED, WEIGHT_SCALE])
@pytest.mark.parametrize("part", [0, 1])
def test_a_missing_tensor_is_refused_by_name(vllm_config: VllmConfig, part: int, name: str) -> None:
    layer = gate_up(make_config())
    stored = Stored.random(INTERMEDIATE, HIDDEN, SCHEMES["w4 per channel"], 1)
    tensors = {WEIGHT_PACKED: stored.packed, WEIGHT_SCALE: stored.scale}
    for other in (0, 1):
        for tensor in (WEIGHT_PACKED, WEIGHT_SCALE):
            if (other, tensor) != (part, name):
                load(layer, tensor, tensors[tensor], other)
    missing = f"model.layers.0.mlp.{('gate_proj', 'up_proj')[part]}.{name}"
    with pytest.raises(CheckpointError, match=rf"got none named {missing} \(1 missing\)\. "):
        finish(layer)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
def test_an_unusable_scale_is_refused_with_its_value(vllm_config: VllmConfig, value: float) -> None:
    layer = down(make_config())
    stored = Stored.random(HIDDEN, INTERMEDIATE, SCHEMES["w4 per channel"], 3)
    stored.scale[11, 0] = value
    stored.load_into(layer)
    with pytest.raises(
        CheckpointError,
        match=rf"{DOWN}\.weight_scale .*row 11 .*got {value} and 0 others of 128",
    ):
        finish(layer)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (
            torch.zeros(HIDDEN, INTERMEDIATE, dtype=torch.uint8),
            "expected torch.uint8 with 96 columns, got torch.uint8 (128, 192)",
        ),
        (
            torch.zeros(HIDDEN, INTERMEDIATE // 2, dtype=torch.int8),
            "expected torch.uint8 with 96 columns, got torch.int8",
        ),
        (
            torch.zeros(HIDDEN + 1, INTERMEDIATE // 2, dtype=torch.uint8),
            "stored (129, 96) does not fill this rank's (128, 96)",
        ),
    ],
)
def test_a_tensor_of_another_shape_or_dtype_is_refused_by_name(
    vllm_config: VllmConfig, tensor: torch.Tensor, message: str
) -> None:
    layer = down(make_config())
    with pytest.raises(CheckpointError) as refusal:
        load(layer, WEIGHT_PACKED, tensor)
    assert str(refusal.value).startswith(f"{DOWN}.weight_packed: {message}")


def test_random_weights_for_benchmarks_need_no_checkpoint() -> None:
    with set_current_vllm_config(VllmConfig(load_config=LoadConfig(load_format="dummy"))):
        layer = down(make_config())
    layer.get_parameter(WEIGHT_SCALE).data.fill_(1e-3)
    finish(layer)
    assert layer(tokens(INTERMEDIATE)).isfinite().all()


def test_a_fusion_of_unknown_parts_is_refused(vllm_config: VllmConfig) -> None:
    config = make_config()
    config.packed_modules_mapping = {}
    with pytest.raises(
        UnsupportedModelError,
        match=r"gate_up_proj: vLLM fuses 2 linears here, .* names 1 \(gate_up_proj\)",
    ):
        gate_up(config)


@pytest.mark.parametrize("size", [1, 2])
def test_a_fusion_that_is_stored_as_one_is_sharded_part_by_part(
    config: SmoothRotConfig, tensor_parallel: Callable[[int, int], None], size: int
) -> None:
    weights, x = config.schema.weights.model_dump(), tokens(HIDDEN)
    for make, parts in (
        (qkv, (4 * HEAD, 2 * HEAD, 2 * HEAD)),
        (gate_up, (INTERMEDIATE, INTERMEDIATE)),
    ):
        stored = Stored.random(sum(parts), HIDDEN, weights, 5)
        expected = linear_reference(x, stored, config).split(parts, dim=1)
        for rank in range(size):
            tensor_parallel(rank, size)
            config.packed_modules_mapping = {
                "qkv_proj": ["qkv_proj"],
                "gate_up_proj": ["gate_up_proj"],
            }
            layer = make(config)
            stored.load_into(layer)
            finish(layer)
            shards = torch.cat([part.chunk(size, dim=1)[rank] for part in expected], dim=1)
            torch.testing.assert_close(layer(x), shards, rtol=1e-6, atol=1e-5)


def test_surplus_rows_of_a_fusion_that_is_stored_as_one_are_refused(
    vllm_config: VllmConfig,
) -> None:
    config = make_config()
    config.packed_modules_mapping = {"gate_up_proj": ["gate_up_proj"]}
    with pytest.raises(
        CheckpointError, match=r"gate_up_proj\.weight_packed: stored \(386, 64\) does not fill"
    ):
        load(
            gate_up(config),
            WEIGHT_PACKED,
            torch.zeros(2 * INTERMEDIATE + 2, HIDDEN // 2, dtype=torch.uint8),
        )


def test_a_head_cannot_be_tied_after_the_fact(vllm_config: VllmConfig) -> None:
    head = ParallelLMHead(VOCAB, HIDDEN, quant_config=make_config(), prefix="lm_head")
    with pytest.raises(ConfigError, match="lm_head: expected an untied output head"):
        head.tie_weights(VocabParallelEmbedding(VOCAB, HIDDEN))


def test_compiled_and_eager_layers_agree_bit_for_bit(config: SmoothRotConfig) -> None:
    layer = down(config)
    Stored.random(HIDDEN, INTERMEDIATE, config.schema.weights.model_dump(), 3).load_into(layer)
    finish(layer)
    x = tokens(INTERMEDIATE)
    compiled = torch.compile(lambda t: layer.quant_method.apply(layer, t), fullgraph=True)
    assert torch.equal(compiled(x), layer.quant_method.apply(layer, x))
