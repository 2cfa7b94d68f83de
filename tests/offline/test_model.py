# SPDX-License-Identifier: Apache-2.0
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from smoothrot_offline.report.model import QuantizedLinear, load_model
from smoothrot_offline.rounding.rtn import quantize_rtn, store
from smoothrot_vllm.errors import CheckpointError, ConfigError
from smoothrot_vllm.format import (
    ActivationScheme,
    LinearScheme,
    Online,
    OnlineHadamard,
    QuantizationSchema,
    WeightScheme,
)
from smoothrot_vllm.hadamard import hadamard_matrix

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": None,
}
Change = Callable[[dict[str, torch.Tensor]], object]
DOWN = "model.layers.1.mlp.down_proj"
TOKENS = torch.arange(24).reshape(2, 12) * 7 % 96


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model; Qwen2 has q/k/v biases and ties its embeddings."""
    torch.manual_seed(0)
    if request.param == "llama":
        model: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True))
    directory = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(directory)
    return directory


def quantized_copy(
    source: Path,
    target: Path,
    weight_bits: int,
    act_bits: int,
    lm_head: bool = False,
    group_size: int = -1,
) -> Path:
    """Quantize every decoder linear by RTN, down_proj behind an online Hadamard in blocks of 48,
    and store it."""
    target.mkdir()
    config = json.loads((source / "config.json").read_text())
    linear = LinearScheme(
        weights=WeightScheme.model_validate({"bits": weight_bits, "group_size": group_size}),
        activations=ActivationScheme.model_validate({"bits": act_bits}),
    )
    schema = QuantizationSchema(
        weights=linear.weights,
        activations=linear.activations,
        online=Online(down_proj=OnlineHadamard(size=96, block=48)),
        lm_head=linear if lm_head else None,
    )
    config["quantization_config"] = schema.model_dump()
    (target / "config.json").write_text(json.dumps(config))
    stored = {}
    rotation = torch.block_diag(*[hadamard_matrix(48)] * 2)
    for name, tensor in load_file(source / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if not module.endswith("_proj") and not (lm_head and module == "lm_head"):
            stored[name] = tensor
            continue
        weight = (tensor.double() @ rotation) if module.endswith("down_proj") else tensor
        quantized = quantize_rtn(weight, linear.weights)
        stored |= store([(weight, quantized)], weight.shape, linear.weights, module)[0]
    save_file(stored, target / "model.safetensors", metadata={"format": "pt"})
    return target


def logits(directory: Path, **options: str) -> torch.Tensor:
    model = load_model(directory, torch.float32, **options)
    with torch.inference_mode():
        return model(TOKENS).logits


@pytest.mark.parametrize("kernels", ["reference", "compiled"])
def test_eight_bit_model_follows_the_original(plain: Path, tmp_path: Path, kernels: str) -> None:
    original = logits(plain)
    quantized = logits(quantized_copy(plain, tmp_path / "w8a8", 8, 8), kernels=kernels)
    assert (quantized - original).norm() < 0.02 * original.norm()


@pytest.mark.parametrize(("act_bits", "group_size"), [(4, -1), (8, -1), (4, 32), (8, 32)])
def test_compiled_kernels_give_the_logits_of_the_reference(
    plain: Path, tmp_path: Path, act_bits: int, group_size: int
) -> None:
    directory = quantized_copy(plain, tmp_path / "q", 4, act_bits, group_size=group_size)
    torch.testing.assert_close(
        logits(directory, kernels="compiled"),
        logits(directory, kernels="reference"),
        rtol=1e-4,
        atol=1e-5,
    )


def test_auto_class_loads_the_directory_and_generates_greedily(plain: Path, tmp_path: Path) -> None:
    directory = quantized_copy(plain, tmp_path / "q", 4, 8)
    model: Any = AutoModelForCausalLM.from_pretrained(directory)
    assert sum(isinstance(m, QuantizedLinear) for m in model.modules()) == 14
    generated = model.generate(TOKENS[:, :4], max_new_tokens=8, do_sample=False)
    with torch.inference_mode():
        step_by_step = TOKENS[:, :4]
        for _ in range(8):
            best = model(step_by_step, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            step_by_step = torch.cat((step_by_step, best), dim=1)
    assert torch.equal(generated, step_by_step)


@pytest.mark.parametrize("plain", ["llama"], indirect=True)
def test_lm_head_is_quantized_where_the_scheme_says_so(plain: Path, tmp_path: Path) -> None:
    directory = quantized_copy(plain, tmp_path / "q", 8, 8, lm_head=True)
    model = load_model(directory, torch.float32, kernels="reference")
    assert isinstance(model.lm_head, QuantizedLinear)
    original = logits(plain)
    assert (model(TOKENS).logits - original).norm() < 0.02 * original.norm()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop(f"{DOWN}.weight_scale"),
            rf"missing \['{DOWN}.weight_scale'\], unexpected none",
        ),
        (
            lambda t: t.update({f"{DOWN}.weight": torch.ones(64, 96)}),
            rf"missing none, unexpected \['{DOWN}.weight'\]",
        ),
        (
            lambda t: t.update(
                {f"{DOWN}.weight_packed": t[f"{DOWN}.weight_packed"][:, 1:].clone()}
            ),
            r"\(64, 48\).*got \(64, 47\)",
        ),
        (
            lambda t: t.update({f"{DOWN}.weight_packed": t[f"{DOWN}.weight_packed"].float()}),
            "uint8, got .* torch.float32",
        ),
        (
            lambda t: t.update({f"{DOWN}.weight_scale": t[f"{DOWN}.weight_scale"].bfloat16()}),
            "float32, got .* torch.bfloat16",
        ),
        (
            lambda t: t[f"{DOWN}.weight_scale"][3].fill_(torch.nan),
            r"weight_scale: expected finite .*got nan at \[3, 0\]",
        ),
        (lambda t: t[f"{DOWN}.weight_scale"][3].fill_(0), r"above zero, got 0.0 at \[3, 0\]"),
        (
            lambda t: t["model.norm.weight"][5].fill_(torch.inf),
            r"model.norm.weight: expected finite values, got inf at \[5\]",
        ),
    ],
)
def test_unusable_tensors_are_refused_by_name(
    plain: Path, tmp_path: Path, change: Change, message: str
) -> None:
    directory = quantized_copy(plain, tmp_path / "q", 4, 4)
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        load_model(directory, kernels="reference")


@pytest.mark.parametrize("group_size", [-1, 32])
def test_linear_computes_with_the_dequantized_weight(
    plain: Path, tmp_path: Path, group_size: int
) -> None:
    """down_proj has 3 groups of 32: an odd number, so that a nibble is padding."""
    directory = quantized_copy(plain, tmp_path / "q", 4, 8, group_size=group_size)
    linear = load_model(directory, torch.float32, kernels="reference").get_submodule(DOWN)
    original = load_file(plain / "model.safetensors")[f"{DOWN}.weight"]
    weights = WeightScheme.model_validate({"group_size": group_size})
    rotation = torch.block_diag(*[hadamard_matrix(48)] * 2)
    quantized = quantize_rtn(original.double() @ rotation, weights).dequantize(torch.float64)
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
    exact = x.double() @ rotation @ quantized.T
    assert (linear(x) - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda scale: scale[3].fill_(0x01),
            rf"{DOWN}.weight_group_scale: expected group scales from 1 to 15, got 0 at \[3, 1\]",
        ),
        (
            lambda scale: scale[5, 1].fill_(0x21),
            rf"{DOWN}.weight_group_scale: expected 0 .* last of 3 groups, got 2 in row 5",
        ),
    ],
)
def test_unusable_group_scales_are_refused_by_name(
    plain: Path, tmp_path: Path, change: Callable[[torch.Tensor], object], message: str
) -> None:
    directory = quantized_copy(plain, tmp_path / "q", 4, 4, group_size=32)
    tensors = load_file(directory / "model.safetensors")
    change(tensors[f"{DOWN}.weight_group_scale"])
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        load_model(directory, kernels="reference")


def test_truncated_shard_is_refused(plain: Path, tmp_path: Path) -> None:
    directory = quantized_copy(plain, tmp_path / "q", 4, 4)
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_model(directory)


def test_missing_weights_and_missing_config_are_refused(plain: Path, tmp_path: Path) -> None:
    directory = quantized_copy(plain, tmp_path / "q", 4, 4)
    (directory / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        load_model(directory)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_model(tmp_path)


def test_plain_directory_with_a_missing_tensor_is_refused(plain: Path, tmp_path: Path) -> None:
    tensors = load_file(plain / "model.safetensors")
    del tensors["model.norm.weight"]
    (tmp_path / "config.json").write_text((plain / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        load_model(tmp_path)


def test_unknown_format_version_is_refused(plain: Path, tmp_path: Path) -> None:
    directory = quantized_copy(plain, tmp_path / "q", 4, 4)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["format_version"] = 1
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="format_version: expected 2, got 1"):
        load_model(directory)


LOADERS = ("AutoModelForCausalLM", "AutoModel")
TRANSFORMERS_ALONE = """
import json, sys, transformers

said = {}
for name in sys.argv[2:]:
    try:
        getattr(transformers, name).from_pretrained(sys.argv[1])
    except Exception as error:
        said[name] = f"{type(error).__name__}: {error}"
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said_by_transformers_alone(tiny_converted: Callable[..., Path]) -> dict[str, str]:
    """What each loader raises in a process that has not imported the converter."""
    done = subprocess.run(
        [sys.executable, "-c", TRANSFORMERS_ALONE, tiny_converted("llama"), *LOADERS],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    said: dict[str, str] = json.loads(done.stdout)
    return said


@pytest.mark.parametrize("loader", LOADERS)
def test_transformers_alone_refuses_a_converted_model(
    said_by_transformers_alone: dict[str, str], loader: str
) -> None:
    assert re.search(
        r"ValueError: .*none: these are the codes of a SmoothRot model\. Serve it with vLLM",
        said_by_transformers_alone[loader],
    )


def test_transformers_loads_a_converted_model_with_the_converter_imported(
    tiny_converted: Callable[..., Path],
) -> None:
    directory = tiny_converted("llama")
    model: Any = AutoModelForCausalLM.from_pretrained(directory)
    expected: Any = load_model(directory)
    assert torch.equal(model(TOKENS).logits, expected(TOKENS).logits)
