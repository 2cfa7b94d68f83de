# SPDX-License-Identifier: Apache-2.0
"""vLLM's own MLPs around our down_proj: their activation runs inside our op, with the bits of
the separate one."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from configs import make_config
from linears import HIDDEN, INTERMEDIATE, SCHEMES, Stored
from vllm.config import LoRAConfig, VllmConfig
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.model_executor.models.llama import LlamaMLP
from vllm.model_executor.models.mistral import MistralMLP
from vllm.model_executor.models.qwen2 import Qwen2MLP
from vllm.model_executor.models.qwen3_moe import Qwen3MoeMLP

from smoothrot_vllm import ops
from smoothrot_vllm.errors import ConfigError, UnsupportedModelError
from smoothrot_vllm.format import WEIGHT_GROUP_SCALE, WEIGHT_PACKED, WEIGHT_SCALE
from smoothrot_vllm.plugin.linear import GateUp
from smoothrot_vllm.plugin.silu_fusion import OPTION, DeferredSiluAndMul

MLPS = [LlamaMLP, MistralMLP, Qwen2MLP, Qwen3MoeMLP]

pytestmark = pytest.mark.usefixtures("vllm_config")


def build(mlp: type, scheme: str = "w4 per channel") -> Any:
    """A random MLP whose weights are those of every other of its shape."""
    layer = mlp(
        HIDDEN,
        INTERMEDIATE,
        "silu",
        quant_config=make_config(weights=SCHEMES[scheme]),
        prefix="model.layers.0.mlp",
    )
    for linear, outputs, inputs in (
        ("gate_up_proj", 2 * INTERMEDIATE, HIDDEN),
        ("down_proj", HIDDEN, INTERMEDIATE),
    ):
        module = layer.get_submodule(linear)
        weights = Stored.random(outputs, inputs, SCHEMES[scheme], seed=inputs)
        for name, tensor in (
            (WEIGHT_PACKED, weights.packed),
            (WEIGHT_SCALE, weights.scale * 0.01),
            (WEIGHT_GROUP_SCALE, weights.group_scale),
        ):
            if tensor is not None:
                module.get_parameter(name).data.copy_(tensor)
        module.quant_method.stored.is_random = True  # no checkpoint to count the tensors of
        module.quant_method.process_weights_after_loading(module)
    return layer


@contextmanager
def option(config: VllmConfig, value: object) -> Iterator[None]:
    with patch.object(config, "additional_config", {OPTION: value}):
        yield


@contextmanager
def fused_calls() -> Iterator[list[None]]:
    """Grows by one with every call of the fused op."""
    calls: list[None] = []
    original = ops.silu_mul_linear

    def counted(*arguments: Any) -> torch.Tensor:
        calls.append(None)
        return original(*arguments)

    with patch.object(ops, "silu_mul_linear", counted):
        yield calls


@pytest.mark.parametrize("mlp", MLPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_fused_mlp_has_the_bits_of_the_separate_one(
    vllm_config: VllmConfig, mlp: type, scheme: str, dtype: torch.dtype
) -> None:
    fused = build(mlp, scheme)
    with option(vllm_config, False):
        separate = build(mlp, scheme)
    assert type(fused.act_fn) is DeferredSiluAndMul
    assert type(separate.act_fn) is SiluAndMul
    separate.act_fn._forward_method = (
        SiluAndMul.forward_native
    )  # as --enforce-eager has it: compiled, it rounds once
    for tokens in (1, 33):
        x = torch.randn(tokens, HIDDEN).to(dtype)
        with fused_calls() as calls:
            expected = separate(x)
            assert not calls
            assert torch.equal(fused(x), expected)
            assert len(calls) == 1


def test_the_compiled_mlp_calls_the_fused_op_and_no_silu() -> None:
    fused = build(LlamaMLP)
    targets: list[str] = []

    def capture(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Any:
        targets.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    x = torch.randn(3, HIDDEN).bfloat16()
    compiled = torch.compile(fused, fullgraph=True, dynamic=True, backend=capture)
    assert torch.equal(compiled(x), fused(x))
    assert [target for target in targets if "smoothrot" in target] == [
        "smoothrot.linear",
        "smoothrot.silu_mul_linear",
    ]
    assert not [target for target in targets if "silu" in target and "smoothrot" not in target]


def test_an_activation_registered_before_its_reader_is_moved_too() -> None:
    parent = torch.nn.Module()
    parent.act_fn = SiluAndMul()
    parent.down_proj = torch.nn.Linear(2, 2)
    assert type(parent.act_fn) is SiluAndMul
    parent.down_proj = build(LlamaMLP).down_proj
    assert type(parent.act_fn) is DeferredSiluAndMul


def test_the_activation_stays_where_an_adapter_reads_it(vllm_config: VllmConfig) -> None:
    with patch.object(vllm_config, "lora_config", LoRAConfig()):
        assert type(build(LlamaMLP).act_fn) is SiluAndMul


def test_the_activation_stays_before_a_down_proj_that_is_not_ours(vllm_config: VllmConfig) -> None:
    build(LlamaMLP)  # the hook is there
    unquantized = LlamaMLP(HIDDEN, INTERMEDIATE, "silu", prefix="model.layers.0.mlp")
    assert type(unquantized.act_fn) is SiluAndMul
    config = make_config(ignore=["model.layers.0.mlp.down_proj"])
    kept = LlamaMLP(HIDDEN, INTERMEDIATE, "silu", quant_config=config, prefix="model.layers.0.mlp")
    assert type(kept.act_fn) is SiluAndMul


def test_an_activation_that_is_no_plain_silu_or_not_the_only_one_stays() -> None:
    down = build(LlamaMLP).down_proj

    class Other(SiluAndMul):
        """Of another plugin."""

    for activations in ([Other()], [SiluAndMul(), SiluAndMul()]):
        parent = torch.nn.Module()
        for number, activation in enumerate(activations):
            parent.add_module(f"act_{number}", activation)
        parent.down_proj = down
        assert list(map(type, activations)) == [
            type(module) for name, module in parent.named_children() if name != "down_proj"
        ]


def test_gate_and_up_of_another_layer_are_refused() -> None:
    down: RowParallelLinear = build(LlamaMLP).down_proj
    with pytest.raises(
        UnsupportedModelError,
        match=r"0\.mlp\.down_proj: expected its own input, got gate and up of .*1\.mlp",
    ):
        down(GateUp(torch.randn(2, 2 * INTERMEDIATE), "model.layers.1.mlp.down_proj"))


def test_an_option_that_is_no_boolean_is_refused(vllm_config: VllmConfig) -> None:
    with (
        option(vllm_config, "no"),
        pytest.raises(ConfigError, match=f"{OPTION}: expected true or false, got 'no'"),
    ):
        build(LlamaMLP)
