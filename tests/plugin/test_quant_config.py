# SPDX-License-Identifier: Apache-2.0
"""The configuration in vLLM's hands: what it accepts, what it answers for each layer, what it
refuses."""

import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from configs import make_config
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.utils import WeightsMapper

from smoothrot_vllm.errors import ConfigError, UnsupportedModelError, UnsupportedPlatformError
from smoothrot_vllm.plugin.linear import SmoothRotLinearMethod
from smoothrot_vllm.plugin.lm_head import SmoothRotLMHeadMethod
from smoothrot_vllm.plugin.quant_config import SmoothRotConfig


def test_survives_pickling_as_vllm_sends_it_to_workers() -> None:
    config = make_config(ignore=["model.layers.0.mlp.down_proj"])
    copy = pickle.loads(pickle.dumps(config))
    assert copy.schema == config.schema
    assert copy.packed_modules_mapping == config.packed_modules_mapping


def test_offers_the_three_activation_dtypes() -> None:
    assert set(make_config().get_supported_act_dtypes()) == {
        torch.bfloat16,
        torch.float16,
        torch.float32,
    }


def test_the_method_without_a_configuration_is_refused() -> None:
    """So vLLM asks for it where ``--quantization smoothrot`` is given for a 16-bit model."""
    with pytest.raises(
        ConfigError,
        match=r"--quantization smoothrot: expected a converted model.*smoothrot-convert first",
    ):
        SmoothRotConfig()


def test_takes_over_no_other_checkpoint() -> None:
    assert (
        SmoothRotConfig.override_quantization_method({"quant_method": "gptq"}, "smoothrot") is None
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 1}, "format_version: expected 2, got 1"),
        ({"format_version": None}, "format_version: expected 2, got None"),
        ({"kv_cache": {"bits": 4}}, "kv_cache"),
        ({"weights": {"bits": 3}}, "weights.bits"),
        ({"activations": {"bits": 8, "clip": 0.0}}, "activations.clip"),
        ({"online": {"down_proj": {"size": 192, "block": 100}}}, "block 100"),
        ({"online": {"readers": {"size": 128, "block": 96}}}, "online.readers: .*block 96"),
        ({"online": {"o_proj": {"size": 128, "block": 128}}}, "online.o_proj"),
        ({"online": {"within": {"shared_expert": {"size": 224, "block": 96}}}}, "block 96"),
        ({"online": {"within": {"shared_expert": {"size": 96, "block": 96}}}}, "96 / 2"),
        ({"max_tensor_parallel": 4}, "192 / 4"),
    ],
)
def test_a_bad_configuration_is_refused_by_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(**changes)


def pretend_gpu(
    monkeypatch: pytest.MonkeyPatch, built_for: str, capability: tuple[int, int] | None
) -> None:
    """vLLM on a GPU of this capability, with a library that was built for these architectures."""
    found = (
        None if capability is None else SimpleNamespace(major=capability[0], minor=capability[1])
    )
    platform = SimpleNamespace(
        is_cpu=lambda: False, is_cuda=lambda: True, get_device_capability=lambda: found
    )
    monkeypatch.setattr("vllm.platforms._current_platform", platform)
    monkeypatch.setattr("smoothrot_vllm.ops.cuda_architectures", lambda: tuple(built_for.split()))


def test_another_platform_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    platform = SimpleNamespace(is_cpu=lambda: False, is_cuda=lambda: False, device_name="tpu")
    monkeypatch.setattr("vllm.platforms._current_platform", platform)
    with pytest.raises(
        UnsupportedPlatformError, match="expected vLLM's CPU or CUDA platform, got tpu"
    ):
        make_config()


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 3), (12, 1)])
def test_a_gpu_with_kernels_is_accepted(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    pretend_gpu(monkeypatch, "80 90a 100 120", capability)
    assert make_config(lm_head=None).schema.weights.bits == 4


@pytest.mark.parametrize(
    ("built_for", "capability", "message"),
    [
        ("", (8, 0), "GPU of sm_80: expected CUDA kernels in .* found none. .*SMOOTHROT_CUDA=1"),
        ("80 90a", (7, 5), "GPU of sm_75: expected one that runs the code for sm_80, sm_90a"),
        ("80 90a", (11, 0), "GPU of sm_110: .*TORCH_CUDA_ARCH_LIST=11.0"),
        ("89", (8, 6), "GPU of sm_86: .* sm_89"),
        ("80", None, "expected a visible GPU, got none"),
    ],
)
def test_a_gpu_without_kernels_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    built_for: str,
    capability: tuple[int, int] | None,
    message: str,
) -> None:
    pretend_gpu(monkeypatch, built_for, capability)
    with pytest.raises(UnsupportedPlatformError, match=message):
        make_config()


def test_weights_of_8_bits_are_served_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, "80", (8, 0))
    eight = {"weights": {"bits": 8}, "activations": {"bits": 8}}
    config = make_config(overrides={"model.layers.1.mlp.down_proj": eight}, lm_head=eight)
    for name in ("model.layers.1.mlp.down_proj", "lm_head"):
        scheme = config.scheme(name)
        assert scheme is not None
        assert scheme.weights.bits == 8


def test_kernels_that_cannot_run_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> str:
        raise UnsupportedPlatformError("SMOOTHROT_CPU_ISA=avx512_vnni: this CPU lacks it")

    monkeypatch.setattr("smoothrot_vllm.ops.kernel_name", fail)
    with pytest.raises(UnsupportedPlatformError, match="this CPU lacks it"):
        make_config()


def test_a_tied_quantized_head_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"tie_word_embeddings true.*lm_head is 8-bit"):
        make_config().maybe_update_config(
            "some/model", hf_config=SimpleNamespace(tie_word_embeddings=True)
        )
    make_config(lm_head=None).maybe_update_config(
        "some/model", hf_config=SimpleNamespace(tie_word_embeddings=True)
    )


def test_each_kind_of_layer_gets_its_method(vllm_config: VllmConfig) -> None:
    online = {"down_proj": {"size": 192, "block": 96}, "readers": {"size": 128, "block": 128}}
    config = make_config(ignore=["model.layers.1.self_attn.o_proj"], online=online)
    layers: dict[str, LinearBase | ParallelLMHead] = {
        "qkv_proj": QKVParallelLinear(
            128,
            32,
            4,
            2,
            bias=False,
            quant_config=config,
            prefix="model.layers.0.self_attn.qkv_proj",
        ),
        "gate_up_proj": MergedColumnParallelLinear(
            128,
            [192, 192],
            bias=False,
            quant_config=config,
            prefix="model.layers.0.mlp.gate_up_proj",
        ),
        "down_proj": RowParallelLinear(
            192, 128, bias=False, quant_config=config, prefix="model.layers.0.mlp.down_proj"
        ),
        "lm_head": ParallelLMHead(261, 128, quant_config=config, prefix="lm_head"),
    }
    methods: dict[str, Any] = {name: layer.quant_method for name, layer in layers.items()}
    assert {name: type(method) for name, method in methods.items()} == {
        "qkv_proj": SmoothRotLinearMethod,
        "gate_up_proj": SmoothRotLinearMethod,
        "down_proj": SmoothRotLinearMethod,
        "lm_head": SmoothRotLMHeadMethod,
    }
    numbers = [m.stored.numbers for m in methods.values()]
    assert [n[0] for n in numbers] == [128, 128, 96, 0]
    assert [n[3] for n in numbers] == [4, 4, 4, 8]
    # Nothing of the 16-bit layer is left beside the codes, which a silent fallback would compute
    # with.
    assert all(not hasattr(layer, "weight") for layer in layers.values())


def test_readers_are_rotated_only_if_the_checkpoint_says_so(vllm_config: VllmConfig) -> None:
    gate_up = MergedColumnParallelLinear(
        128,
        [192, 192],
        bias=False,
        quant_config=make_config(),
        prefix="model.layers.0.mlp.gate_up_proj",
    )
    assert isinstance(gate_up.quant_method, SmoothRotLinearMethod)
    assert gate_up.quant_method.stored.rotation is None


def test_what_stays_16_bit(vllm_config: VllmConfig) -> None:
    config = make_config(ignore=["model.layers.1.self_attn.o_proj"], lm_head=None)
    ignored = RowParallelLinear(
        128, 128, bias=False, quant_config=config, prefix="model.layers.1.self_attn.o_proj"
    )
    embedding = VocabParallelEmbedding(261, 128, quant_config=config)
    head = ParallelLMHead(261, 128, quant_config=config, prefix="lm_head")
    assert isinstance(ignored.quant_method, UnquantizedLinearMethod)
    assert isinstance(embedding.quant_method, UnquantizedEmbeddingMethod)
    assert isinstance(head.quant_method, UnquantizedEmbeddingMethod)


def test_a_layer_kind_the_format_lacks_is_refused_by_name(vllm_config: VllmConfig) -> None:
    class Convolution(torch.nn.Module):
        pass

    with pytest.raises(
        UnsupportedModelError, match=r"layers\.0\.mixer: expected .*routed experts, got Convolution"
    ):
        make_config().get_quant_method(Convolution(), "model.layers.0.mixer")


def test_an_override_must_cover_every_part_of_a_fused_layer() -> None:
    eight = {"weights": {"bits": 8}, "activations": {"bits": 8}}
    partial = make_config(overrides={"model.layers.0.mlp.up_proj": eight})
    with pytest.raises(
        ConfigError, match=r"gate_up_proj: .*gate_proj: W4A8 per channel.*up_proj: W8A8 per channel"
    ):
        partial.scheme("model.layers.0.mlp.gate_up_proj")
    whole = make_config(
        overrides={f"model.layers.0.mlp.{part}_proj": eight for part in ("gate", "up")}
    )
    assert whole.scheme("model.layers.0.mlp.gate_up_proj").weights.bits == 8
    assert whole.scheme("model.layers.1.mlp.gate_up_proj").weights.bits == 4


def test_a_layer_that_is_stored_fused_may_be_overridden_by_its_own_name() -> None:
    eight = {"weights": {"bits": 8}, "activations": {"bits": 8}}
    config = make_config(
        overrides={"model.layers.0.mlp.gate_up_proj": eight},
        ignore=["model.layers.2.mlp.gate_up_proj"],
    )
    assert config.part_names("model.layers.0.mlp.gate_up_proj") == ["gate_up_proj"]
    assert config.part_names("model.layers.1.mlp.gate_up_proj") == ["gate_proj", "up_proj"]
    bits = [config.scheme(f"model.layers.{index}.mlp.gate_up_proj") for index in range(3)]
    assert [scheme and scheme.weights.bits for scheme in bits] == [8, 4, None]


def test_ignoring_one_part_of_a_fused_layer_is_refused() -> None:
    config = make_config(ignore=["model.layers.0.self_attn.k_proj"])
    with pytest.raises(ConfigError, match=r"qkv_proj: .*q_proj: W4A8.*k_proj: 16-bit"):
        config.scheme("model.layers.0.self_attn.qkv_proj")


def test_module_names_follow_vllms_renaming() -> None:
    eight = {"weights": {"bits": 8}, "activations": {"bits": 8}}
    config = make_config(
        ignore=["model.layers.0.mlp.down_proj"], overrides={"model.layers.1.mlp.down_proj": eight}
    )
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."}))
    assert config.scheme("language_model.model.layers.0.mlp.down_proj") is None
    assert config.scheme("language_model.model.layers.1.mlp.down_proj").weights.bits == 8


def test_modules_that_stay_16_bit_as_a_whole_follow_vllms_renaming() -> None:
    config = make_config(ignore=["model.vision_tower."])
    names = {"model.vision_tower.": "vision_tower.", "model.": "language_model.model."}
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix=names))
    assert config.scheme("vision_tower.vision_model.encoder.layers.0.self_attn.qkv_proj") is None
    assert config.scheme("vision_tower.head.mlp.fc1") is None
    assert config.scheme("language_model.model.layers.0.mlp.down_proj") is not None
    assert config.scheme("vision_tower_of_another.mlp.fc1") is not None


@pytest.mark.parametrize("where", ["down_proj", "within"])
@pytest.mark.parametrize(("size", "block", "limit"), [(4, 96, 2), (2, 192, 1)])
def test_a_tensor_parallel_size_that_splits_a_block_is_refused(
    tensor_parallel: Callable[[int, int], None], size: int, block: int, limit: int, where: str
) -> None:
    tensor_parallel(0, size)
    found = {"size": 192, "block": block}
    config = make_config(
        online={"down_proj": {"size": 192, "block": 48}}
        | {where: found if where == "down_proj" else {"shared_expert": found}},
        max_tensor_parallel=limit,
    )
    with pytest.raises(
        ConfigError,
        match=(
            rf"tensor parallel size {size}: .*192/{size}.*blocks of {block}.*--tensor-parallel-size"
            rf" {limit}"
        ),
    ):
        ColumnParallelLinear(
            128, 128, bias=False, quant_config=config, prefix="model.layers.0.mlp.gate_proj"
        )


def test_a_rank_with_part_of_a_weight_group_is_refused_with_the_numbers(
    tensor_parallel: Callable[[int, int], None],
) -> None:
    tensor_parallel(1, 2)
    config = make_config(weights={"bits": 4, "group_size": 128}, online={})
    with pytest.raises(
        ConfigError, match=r"o_proj: .*weight groups of 128 on each of 2 .*got 64 of 128"
    ):
        RowParallelLinear(
            128, 128, bias=False, quant_config=config, prefix="model.layers.0.self_attn.o_proj"
        )


def test_a_rotation_of_another_width_is_refused(vllm_config: VllmConfig) -> None:
    online = {"readers": {"size": 256, "block": 256}}
    with pytest.raises(ConfigError, match=r"qkv_proj: .*expected size 128, .* got 256"):
        QKVParallelLinear(
            128,
            32,
            4,
            2,
            quant_config=make_config(online=online),
            prefix="model.layers.0.self_attn.qkv_proj",
        )
    with pytest.raises(ConfigError, match=r"down_proj: .*expected size 256, .* got 192"):
        RowParallelLinear(
            256, 128, bias=False, quant_config=make_config(), prefix="model.layers.0.mlp.down_proj"
        )


def test_a_module_with_a_rotation_of_its_own_has_that_alone(vllm_config: VllmConfig) -> None:
    down, shared = ({"size": size, "block": size} for size in (192, 256))
    config = make_config(
        online={"down_proj": down, "within": {"shared_expert": shared}}, max_tensor_parallel=1
    )

    def build(inputs: int, prefix: str) -> RowParallelLinear:
        return RowParallelLinear(inputs, 128, bias=False, quant_config=config, prefix=prefix)

    for inputs, module in ((192, "layers.0.mlp"), (256, "layers.0.mlp.shared_expert")):
        method = build(inputs, f"{module}.down_proj").quant_method
        assert isinstance(method, SmoothRotLinearMethod)
        assert method.stored.rotation is not None
        assert method.stored.rotation.block == inputs
    with pytest.raises(ConfigError, match=r"shared_expert.down_proj: .*expected size 192, .* 256"):
        build(192, "layers.0.mlp.shared_expert.down_proj")
