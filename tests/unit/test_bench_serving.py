# SPDX-License-Identifier: Apache-2.0
"""What benchmarks.serving compares: peers of the same weights, floors, medians, whole answers."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file
from tiny_models import byte_tokenizer

from benchmarks.kernels.schemes import preset_schema
from benchmarks.serving import contender, headline, llama_cpp, models, serve
from benchmarks.serving.contender import Cell, Contender
from benchmarks.serving.devices import TOGETHER, CudaServing
from benchmarks.support.compressed_tensors_models import group_size, write_peer
from benchmarks.support.timing import Floors
from smoothrot_offline.source.resolve import resolve
from smoothrot_vllm.format import WEIGHT_GROUP_SCALE, WEIGHT_PACKED, parse_schema

TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "vocab_size": 320,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with a tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    byte_tokenizer().save_pretrained(folder / "tokenizer")
    models.random_model(folder / "bf16", TINY, folder / "tokenizer")
    return folder / "bf16"


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in directory.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


@pytest.mark.parametrize("scheme", models.PEERS)
def test_a_peer_holds_the_rounded_weights_of_the_source(
    source: Path, tmp_path: Path, scheme: str
) -> None:
    write_peer(source, tmp_path / scheme, scheme)
    written, plain = tensors(tmp_path / scheme), tensors(source)
    projections = [name for name in plain if name.endswith("_proj.weight")]
    assert len(projections) == 2 * 7
    for name in projections:
        scale = written[f"{name}_scale"].float()
        codes = written.get(name)
        if codes is None:
            codes = unpack_from_int32(written[f"{name}_packed"], 4, plain[name].shape)
        width = plain[name].shape[1] // scale.shape[1]
        restored = codes.float().view(-1, scale.shape[1], width) * scale[..., None]
        error = (restored - plain[name].float().view(restored.shape)).abs()
        # Half a step of rounding; a bfloat16 scale adds its own of up to seven steps' 2^-9.
        assert (error <= scale[..., None] * (0.5 + 7 * 2**-8)).all()
    config = models.read_config(tmp_path / scheme)["quantization_config"]
    (linears,) = QuantizationConfig.model_validate(config).config_groups.values()
    assert linears.weights.num_bits == int(scheme[1])
    assert linears.weights.group_size == (32 if scheme == "w4a16" else None)
    assert (linears.input_activations is not None) == (scheme == "w8a8")


def test_widths_that_no_group_divides_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no group of 128, 64 or 32 inputs divides .*\(96, 100\)"):
        group_size({"hidden_size": 96, "intermediate_size": 100})


def test_parameters_are_those_of_the_written_linears(source: Path) -> None:
    projections = [t for name, t in tensors(source).items() if name.endswith("_proj.weight")]
    found = models.linear_parameters(models.read_config(source))
    assert found == sum(tensor.numel() for tensor in projections)


def test_floors_read_all_weights_once_or_multiply_once_a_token(source: Path) -> None:
    linears = models.linear_parameters(models.read_config(source))
    whole = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    slow = serve.floor("best_w4a8", source, Cell(1, 10), Floors(1e3, 1e12))
    assert slow["tpot_floor_ms"] == slow["ttft_floor_ms"] == pytest.approx(whole)
    busy = serve.floor("best_w4a8", source, Cell(2, 10), Floors(1e12, 1e3))
    assert list(busy.values()) == [pytest.approx(2 * linears), pytest.approx(20 * linears)]
    # The rate of int8 products says nothing about 16-bit activations.
    w4a16 = serve.floor("w4a16", source, Cell(2, 10), Floors(1e3, 1e3))
    assert w4a16["ttft_floor_ms"] == pytest.approx(whole)
    # Four-bit activations are multiplied as int4 where the device can.
    w4a4 = serve.floor("best_w4a4", source, Cell(2, 10), Floors(1e12, 1e3, 4e3))
    assert w4a4["ttft_floor_ms"] == pytest.approx(20 * linears / 4)


def test_an_embedding_beside_a_head_is_not_read(source: Path, tmp_path: Path) -> None:
    models.write_random_preset(source, tmp_path / "ours", "best", 8)
    found = tensors(tmp_path / "ours")
    embedding = found.pop("model.embed_tokens.weight")
    headers = models.read_bytes(tmp_path / "ours") - sum(t.nbytes for t in found.values())
    assert 0 < headers < embedding.nbytes


def test_a_random_model_has_the_schemes_of_its_preset(source: Path, tmp_path: Path) -> None:
    models.write_random_preset(source, tmp_path / "ours", "best", 4)
    config = models.read_config(tmp_path / "ours")
    schema = parse_schema(config["quantization_config"])
    assert schema == preset_schema(resolve(models.read_config(source)), "best", 4)
    assert {scheme.weights.bits for scheme in schema.overrides.values()} == {8}
    found = tensors(tmp_path / "ours")
    for name in [name for name in found if name.endswith(f".{WEIGHT_PACKED}")]:
        linear = name.removesuffix(f".{WEIGHT_PACKED}")
        scheme = schema.scheme(linear)
        assert scheme is not None
        grouped = f"{linear}.{WEIGHT_GROUP_SCALE}" in found
        assert grouped == (scheme.weights.group_size == 32)
        assert found[name].dtype == (torch.uint8 if scheme.weights.bits == 4 else torch.int8)


def test_the_order_of_q_and_k_is_the_one_of_neighboring_pairs() -> None:
    rows = torch.arange(16).float()[:, None].expand(16, 2)
    first = llama_cpp.pairs_of_neighbors(rows, heads=2)[:8, 0]
    assert first.tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


def test_a_batch_with_a_short_answer_is_no_measurement() -> None:
    measured = {"completed": 4, "total_output_tokens": 4 * 32 - 1}
    with pytest.raises(RuntimeError, match="4 answers of 32 tokens, got 4 answers, 127 tokens"):
        contender.figures(measured, Cell(4, 128))


def test_a_row_has_medians_over_its_rounds(source: Path) -> None:
    rounds = [{"tpot_ms": ms, "tokens_per_s": 1e3 / ms} for ms in (10.0, 50.0, 20.0)]
    row = serve.row("m", Contender("bf16", source), Cell(1, 8), rounds, Floors(1e9, None))
    assert (row["tpot_ms"], row["tokens_per_s"], row["rounds"]) == (20.0, 50.0, rounds)


def test_servers_on_a_gpu_get_shares_that_fit_together() -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser, device = EngineArgs.add_cli_args(FlexibleArgumentParser()), object.__new__(CudaServing)
    for servers in range(1, 9):
        parsed = parser.parse_args(device.options(3 << 30, servers))
        assert parsed.kv_cache_memory_bytes == 3 << 30
        assert 0 < parsed.gpu_memory_utilization * servers <= TOGETHER


def test_the_headline_has_a_row_and_a_dot_for_each_contender(tmp_path: Path) -> None:
    def rows(scheme: str, speed: float) -> list[dict[str, Any]]:
        figures = {"tpot_ms": 9.0, "tokens_per_s": speed, "ttft_ms": 400.0, "peak_rss_bytes": 2e9}
        return [{"scheme": scheme, **asdict(cell), **figures} for cell in serve.QUICK_CELLS]

    judged = {"bf16": 20.0, "w8a8": 20.5, "best_w4a8": 21.0}
    report = {
        "results": [*rows("bf16", 100.0), *rows("w8a8", 150.0), *rows("best_w4a8", 300.0)],
        "judged": {scheme: {"perplexity": found, "bytes": 1e8} for scheme, found in judged.items()},
    }
    assert headline.markdown(report).splitlines()[-1] == (
        "| **ours, W4A8 best** | 1.05x | 100 | 9.0 | 300 | 400 | 2.0 |"
    )
    for name in ("one.svg", "two.svg"):
        headline.draw(report, tmp_path / name)
    drawn = (tmp_path / "one.svg").read_text()
    assert drawn == (tmp_path / "two.svg").read_text()
    assert all(name in drawn for name in ("16-bit", "vLLM W8A8", "ours, W4A8 best"))
