# SPDX-License-Identifier: Apache-2.0
"""vLLM's own routed experts with our method: loading the tensors of each, checking them,
computing; and what is refused."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from configs import make_config
from vllm.config import VllmConfig
from vllm.model_executor.layers.fused_moe import FusedMoEFactory, RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.models.gpt_oss import GptOssModel, GptOssRoutedExperts

import smoothrot_vllm.plugin.experts
from smoothrot_vllm import reference
from smoothrot_vllm.errors import (
    CheckpointError,
    ConfigError,
    UnsupportedModelError,
    UnsupportedPlatformError,
)
from smoothrot_vllm.plugin.experts import SmoothRotExpertsMethod, check_experts

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 128, 192, 4, 2
PREFIX = "model.layers.0.mlp.experts"
NAMES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
SCHEMES = {
    "w4 per channel": {"bits": 4, "group_size": -1},
    "w4 in groups of 32": {"bits": 4, "group_size": 32},
    "w8 per channel": {"bits": 8, "group_size": -1},
}
Tensors = dict[str, torch.Tensor]


def routed_experts(
    prefix: str,
    tp_size: int | None = None,
    as_gpt_oss: bool = False,
    weighs_inputs: bool = False,
    **changes: Any,
) -> RoutedExperts:
    """As vLLM's model classes build them."""
    own: dict[str, Any] = {"apply_router_weight_on_input": weighs_inputs}
    if as_gpt_oss:
        own |= {
            "has_bias": True,
            "activation": "swigluoai",
            "routed_experts_cls": GptOssRoutedExperts,
        }
    runner = FusedMoEFactory(
        **own,
        num_experts=EXPERTS,
        top_k=TOP_K,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        params_dtype=torch.float32,
        quant_config=make_config(**changes),
        tp_size=tp_size,
        prefix=prefix,
    )
    return runner.routed_experts


@pytest.fixture
def build(vllm_config: VllmConfig) -> Iterator[Callable[..., RoutedExperts]]:
    """:func:`routed_experts`; vLLM knows each layer by a name that is used once."""

    def make(**options: Any) -> RoutedExperts:
        vllm_config.compilation_config.static_forward_context.clear()
        return routed_experts(PREFIX, **options)

    yield make
    vllm_config.compilation_config.static_forward_context.clear()


def stored_tensors(weights: dict[str, int]) -> Tensors:
    """Tensors of all experts by their names in the checkpoint, relative to the layer's."""
    generator, bits = torch.Generator().manual_seed(3), weights["bits"]
    top, tensors = reference.quant_max(bits), {}
    for expert in range(EXPERTS):
        for name in NAMES.values():
            rows, columns = (
                (HIDDEN, INTERMEDIATE) if name == "down_proj" else (INTERMEDIATE, HIDDEN)
            )
            codes = torch.randint(
                -top - 1, top + 1, (rows, columns), generator=generator, dtype=torch.int8
            )
            tensors[f"{expert}.{name}.weight_packed"] = reference.encode(codes, bits)
            scale = (torch.rand(rows, 1, generator=generator) + 0.5) / (top * columns**0.5)
            if weights["group_size"] != -1:
                shape = (rows, columns // weights["group_size"])
                groups = torch.randint(1, 16, shape, generator=generator, dtype=torch.uint8)
                tensors[f"{expert}.{name}.weight_group_scale"] = reference.pack_group_scale(groups)
                scale /= 8
            tensors[f"{expert}.{name}.weight_scale"] = scale
    return tensors


def gpt_oss_tensors(weights: dict[str, int]) -> Tensors:
    """:func:`stored_tensors` by the names of a gpt-oss, and biases."""
    names = {stored: own for own, stored in NAMES.items()}
    tensors = {
        name.replace(leaf, names[leaf]): tensor
        for name, tensor in stored_tensors(weights).items()
        for leaf in names
        if leaf in name
    }
    generator = torch.Generator().manual_seed(4)
    return tensors | {
        f"{expert}.{name}.bias": torch.randn(rows, generator=generator).bfloat16()
        for expert in range(EXPERTS)
        for name, rows in {"w1": INTERMEDIATE, "w3": INTERMEDIATE, "w2": HIDDEN}.items()
    }


def load_gpt_oss(layer: RoutedExperts, tensors: Tensors) -> None:
    """By what vLLM's class of gpt-oss asks for each tensor of an expert."""
    prefix = "layers.0.mlp.experts."
    params = {f"{prefix}routed_experts.{name}": p for name, p in layer.named_parameters()}
    loaded = set[str]()
    for name, tensor in tensors.items():
        assert GptOssModel._try_load_streamed_expert(prefix + name, tensor, params, loaded)
    assert loaded <= params.keys()
    other = f"{prefix}0.w1.weight_of_others"
    assert not GptOssModel._try_load_streamed_expert(other, tensor, params, loaded)


def load(layer: RoutedExperts, tensors: Tensors) -> None:
    list(layer.load_weights((name.replace(PREFIX, ""), tensor) for name, tensor in tensors.items()))


def stacked(tensors: Tensors, names: list[str], suffix: str) -> torch.Tensor:
    return torch.stack(
        [torch.cat([tensors[f"{e}.{name}.{suffix}"] for name in names]) for e in range(EXPERTS)]
    )


def reference_stack(
    tensors: Tensors, weights: dict[str, int], names: list[str], inputs: int
) -> reference.QuantizedExperts:
    groups = None
    if weights["group_size"] != -1:
        stored = stacked(tensors, names, "weight_group_scale")
        groups = reference.unpack_group_scale(stored, inputs // weights["group_size"])
    codes, scale = (stacked(tensors, names, f"weight_{what}") for what in ("packed", "scale"))
    return codes, scale, groups


@pytest.mark.parametrize("weights", SCHEMES.values(), ids=list(SCHEMES))
def test_experts_compute_the_reference(
    build: Callable[..., RoutedExperts], weights: dict[str, int]
) -> None:
    layer: Any = build(weights=weights)
    assert isinstance(layer.quant_method, SmoothRotExpertsMethod)
    tensors = stored_tensors(weights)
    load(layer, tensors)
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(7, HIDDEN, generator=torch.Generator().manual_seed(7))
    share, chosen = (
        torch.randn(7, EXPERTS, generator=torch.Generator().manual_seed(8)).softmax(-1).topk(TOP_K)
    )
    got = layer.forward_modular(x, share, chosen.int())
    expected = reference.experts(
        x,
        share,
        chosen,
        reference_stack(tensors, weights, ["gate_proj", "up_proj"], HIDDEN),
        reference_stack(tensors, weights, ["down_proj"], INTERMEDIATE),
        96,
        1.0,
        8,
        weights["bits"],
    )
    assert torch.equal(got, expected)
    assert {name.partition("_")[2] for name, _ in layer.named_parameters()} == {
        "weight_packed",
        "weight_scale",
    }
    compiled = torch.compile(layer.forward_modular, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, share, chosen.int()), got)


@pytest.mark.parametrize("weights", SCHEMES.values(), ids=list(SCHEMES))
def test_experts_of_gpt_oss_compute_the_reference(
    build: Callable[..., RoutedExperts], weights: dict[str, int]
) -> None:
    layer: Any = build(weights=weights, as_gpt_oss=True)
    tensors = gpt_oss_tensors(weights)
    load_gpt_oss(layer, tensors)
    layer.quant_method.process_weights_after_loading(layer)
    x = 4 * torch.randn(7, HIDDEN, generator=torch.Generator().manual_seed(7))
    share, chosen = (
        torch.randn(7, EXPERTS, generator=torch.Generator().manual_seed(8)).softmax(-1).topk(TOP_K)
    )
    got = layer.forward_modular(x, share, chosen.int())
    expected = reference.experts(
        x,
        share,
        chosen,
        reference_stack(tensors, weights, ["w1", "w3"], HIDDEN),
        reference_stack(tensors, weights, ["w2"], INTERMEDIATE),
        96,
        1.0,
        8,
        weights["bits"],
        (stacked(tensors, ["w1", "w3"], "bias"), stacked(tensors, ["w2"], "bias")),
        "swigluoai",
    )
    assert torch.equal(got, expected)
    compiled = torch.compile(layer.forward_modular, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, share, chosen.int()), got)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_adds_its_share_of_the_biases(
    build: Callable[..., RoutedExperts], monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    weights = SCHEMES["w4 in groups of 32"]
    tensors = gpt_oss_tensors(weights)
    layer: Any = build(weights=weights, as_gpt_oss=True, tp_size=2)
    monkeypatch.setattr(layer.moe_config.moe_parallel_config, "tp_rank", rank)
    load_gpt_oss(layer, tensors)
    gate, up, down = (stacked(tensors, [name], "bias") for name in ("w1", "w3", "w2"))
    own = slice(rank * INTERMEDIATE // 2, (rank + 1) * INTERMEDIATE // 2)
    expected = torch.cat([gate[:, own], up[:, own]], dim=1).float()
    assert torch.equal(layer.w13_bias, expected)
    # What down gives is summed over ranks.
    assert torch.equal(layer.w2_bias, down.float() if rank == 0 else torch.zeros_like(down).float())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("2.w3.bias"), r"none named .*experts\.2\.w3\.bias \(1 missing\)"),
        (
            lambda t: t.update({"1.w2.bias": t["1.w2.bias"][1:]}),
            r"experts\.1\.w2\.bias: expected .*\(128,\), got .*\(127,\)",
        ),
        (
            lambda t: t.update({"1.w1.bias": t["1.w1.bias"].int()}),
            r"experts\.1\.w1\.bias: expected torch\.float32 .*got torch\.int32",
        ),
    ],
    ids=["missing", "short", "integers"],
)
def test_biases_that_do_not_fit_are_named(
    build: Callable[..., RoutedExperts], change: Callable[[Tensors], object], words: str
) -> None:
    weights = SCHEMES["w4 per channel"]
    layer: Any = build(weights=weights, as_gpt_oss=True)
    tensors = gpt_oss_tensors(weights)
    change(tensors)

    def loaded() -> None:
        load_gpt_oss(layer, tensors)
        layer.quant_method.process_weights_after_loading(layer)

    with pytest.raises(CheckpointError, match=words):
        loaded()


def test_a_rank_loads_its_share_of_each_expert(
    build: Callable[..., RoutedExperts], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = SCHEMES["w4 in groups of 32"]
    tensors = stored_tensors(weights)
    layer: Any = build(weights=weights, tp_size=2)
    assert layer.w13_weight_packed.shape == (EXPERTS, INTERMEDIATE, HIDDEN // 2)
    monkeypatch.setattr(layer.moe_config.moe_parallel_config, "tp_rank", 1)
    load(layer, tensors)
    half = INTERMEDIATE // 2
    both, down = ["gate_proj", "up_proj"], ["down_proj"]
    for suffix, part in zip(
        ("weight_packed", "weight_scale", "weight_group_scale"),
        reference_stack(tensors, weights, both, HIDDEN),
        strict=True,
    ):
        assert part is not None
        gate, up = (rows[:, half:] for rows in part.chunk(2, dim=1))
        assert torch.equal(getattr(layer, f"w13_{suffix}"), torch.cat([gate, up], dim=1))
    # Three of six group scales, which are one and a half of their stored bytes.
    packed, scale, groups = reference_stack(tensors, weights, down, INTERMEDIATE)
    assert groups is not None
    assert torch.equal(layer.w2_weight_packed, packed[..., half // 2 :])
    assert torch.equal(layer.w2_weight_scale, scale)
    assert torch.equal(layer.w2_weight_group_scale, groups[..., half // 32 :])


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        (
            "2.up_proj.weight_packed",
            None,
            r"experts: expected 36 tensors.*none named .*experts\.2\.up_proj\.weight_packed",
        ),
        (
            "3.down_proj.weight_scale",
            None,
            r"none named .*experts\.3\.down_proj\.weight_scale \(1 missing\)",
        ),
        (
            "1.up_proj.weight_scale",
            lambda t: t.index_fill(0, torch.tensor([5]), torch.nan),
            r"1\.up_proj.*row 5, column 0 .*scales > 0, got nan",
        ),
        (
            "0.down_proj.weight_scale",
            lambda t: t.index_fill(0, torch.tensor([9]), 0.0),
            r"0\.down_proj.*row 9, column 0 .*got 0\.0",
        ),
        (
            "0.gate_proj.weight_packed",
            lambda t: t[:-1],
            r"0\.gate_proj\.weight_packed: expected .*\(192, 64\), got .*\(191, 64\)",
        ),
        (
            "3.down_proj.weight_group_scale",
            None,
            r"expected 36 tensors.*none named .*3\.down_proj\.weight_group_scale \(1 missing\)",
        ),
        (
            "2.up_proj.weight_group_scale",
            lambda t: t.index_fill(0, torch.tensor([5]), 0x50),
            r"2\.up_proj\.weight_group_scale, row 5, column 0 of .*got 0 and 1 others",
        ),
        (
            "1.down_proj.weight_group_scale",
            lambda t: t.repeat_interleave(2, dim=1),
            r"1\.down_proj\.weight_group_scale: expected .*\(128, 3\), got .*\(128, 6\)",
        ),
        (
            "0.gate_proj.weight_scale",
            lambda t: t.half(),
            r"0\.gate_proj\.weight_scale: expected torch\.float32 .*got torch\.float16",
        ),
    ],
)
def test_missing_and_damaged_tensors_are_named(
    build: Callable[..., RoutedExperts],
    name: str,
    change: Callable[[torch.Tensor], torch.Tensor] | None,
    words: str,
) -> None:
    weights = SCHEMES["w4 in groups of 32"]
    layer, tensors = build(weights=weights), stored_tensors(weights)
    damaged = tensors.pop(name)
    if change is not None:
        tensors[name] = change(damaged)

    def loaded() -> None:
        load(layer, tensors)
        layer.quant_method.process_weights_after_loading(layer)

    with pytest.raises(CheckpointError, match=words):
        loaded()


def test_experts_of_mixed_schemes_and_widths_are_refused(
    build: Callable[..., RoutedExperts],
) -> None:
    eight = {"weights": {"bits": 8}, "activations": {"bits": 8}}
    with pytest.raises(
        ConfigError, match=r"experts: expected one scheme.*W4A8.*W8A8.*experts\.1\.up_proj"
    ):
        build(overrides={f"{PREFIX}.1.up_proj": eight})
    with pytest.raises(ConfigError, match=r"experts: .*online: expected size 192, .*got 256"):
        build(online={"down_proj": {"size": 256, "block": 256}}, max_tensor_parallel=1)
    with pytest.raises(
        ConfigError,
        match=r"experts: .*whole number of weight groups of 64 on each of 2 .*got 96 of 192",
    ):
        build(weights={"bits": 4, "group_size": 64}, tp_size=2)
    with pytest.raises(UnsupportedModelError, match=r"experts: .*online\.readers"):
        build(online={"readers": {"size": HIDDEN, "block": HIDDEN}})


def test_experts_that_stay_16_bit_are_vllms(build: Callable[..., RoutedExperts]) -> None:
    layer = build(
        ignore=[f"{PREFIX}.{expert}.{name}" for expert in range(EXPERTS) for name in NAMES.values()]
    )
    assert not isinstance(layer.quant_method, SmoothRotExpertsMethod)


@pytest.fixture
def moe(build: Callable[..., RoutedExperts]) -> FusedMoEConfig:
    config: FusedMoEConfig = build().moe_config
    check_experts(PREFIX, config)
    return config


@pytest.mark.parametrize(
    ("option", "change"),
    [
        ("--enable-expert-parallel", {"use_ep": True}),
        ("--enable-eplb", {"enable_eplb": True}),
        ("--data-parallel-size", {"dp_size": 2}),
    ],
)
def test_options_that_do_not_go_with_experts_are_refused(
    moe: FusedMoEConfig, option: str, change: dict[str, Any]
) -> None:
    parallel = replace(moe.moe_parallel_config, **change)
    with pytest.raises(ConfigError, match=f"experts: expected no {option}"):
        check_experts(PREFIX, replace(moe, moe_parallel_config=parallel))


def test_other_experts_are_refused(moe: FusedMoEConfig) -> None:
    with pytest.raises(ConfigError, match="experts: expected no --enable-lora"):
        check_experts(PREFIX, replace(moe, is_lora_enabled=True))
    oai: dict[str, Any] = {"activation": MoEActivation.SWIGLUOAI, "has_bias": True}
    changes: list[dict[str, Any]] = [
        {"activation": MoEActivation.GELU},
        {"has_bias": True},
        {"activation": MoEActivation.SWIGLUOAI},
        {"swiglu_limit": 7.0},
        oai | {"swiglu_limit": 5.0},
        oai | {"swiglu_alpha": 1.5},
    ]
    check_experts(PREFIX, replace(moe, **oai))
    for change in changes:
        with pytest.raises(UnsupportedModelError, match="experts: expected experts of the form"):
            check_experts(PREFIX, replace(moe, **change))


def test_experts_whose_inputs_are_weighed_are_refused(
    build: Callable[..., RoutedExperts],
) -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"experts: apply_router_weight_on_input: .*got True"
    ):
        build(weighs_inputs=True)


def test_on_a_gpu_experts_are_accepted_as_far_as_the_kernels_go(
    build: Callable[..., RoutedExperts], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        smoothrot_vllm.plugin.experts, "current_platform", SimpleNamespace(is_cpu=lambda: False)
    )
    assert isinstance(build().quant_method, SmoothRotExpertsMethod)
    with pytest.raises(UnsupportedPlatformError, match="experts: expected experts without biases"):
        build(as_gpt_oss=True)
    with pytest.raises(
        UnsupportedPlatformError,
        match=r"experts: 48 channels of a rank's experts: expected a multiple of 32",
    ):
        build(tp_size=4, online={}, max_tensor_parallel=4)


def test_on_a_gpu_codes_stay_as_stored_and_the_rotation_is_prepared(
    build: Callable[..., RoutedExperts], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the method asks of the device is recorded; a GPU's prepacked codes are a copy of the
    stored ones."""
    layer = build()
    load(layer, stored_tensors(SCHEMES["w4 per channel"]))
    stored = {name: parameter.shape for name, parameter in layer.named_parameters()}
    prepared: list[tuple[int, torch.device]] = []
    monkeypatch.setattr(
        smoothrot_vllm.ops,
        "prepare_rotation",
        lambda block, device: prepared.append((block, device)),
    )
    monkeypatch.setattr(
        smoothrot_vllm.ops, "prepack_weight", lambda weight, scale, groups, bits: weight.clone()
    )
    method: Any = layer.quant_method
    method.process_weights_after_loading(layer)
    assert set(prepared) == {(96, torch.device("cpu"))}
    assert {name: parameter.shape for name, parameter in layer.named_parameters()} == stored
