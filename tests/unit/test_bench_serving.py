# SPDX-License-Identifier: Apache-2.0
"""What benchmarks.serving compares: peers of the same weights, floors, medians, whole answers."""

from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file
from tiny_models import byte_tokenizer

from benchmarks.serving import contender, models, serve
from benchmarks.serving.contender import Cell, Contender
from benchmarks.serving.devices import TOGETHER, CudaServing
from benchmarks.support.compressed_tensors_models import group_size, write_peer
from benchmarks.support.timing import Floors

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


def test_floors_read_all_weights_once_or_multiply_once_a_token() -> None:
    config = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
    config |= {"num_key_value_heads": 1, "num_hidden_layers": 1, "vocab_size": 100}
    linears, head = 8 * (2 * 8 + 2 * 4) + 3 * 8 * 16, 800
    slow = serve.floor("w4a8", config, Cell(1, 10), Floors(1e3, 1e9))
    assert slow["tpot_floor_ms"] == slow["ttft_floor_ms"] == pytest.approx(linears / 2 + head)
    busy = serve.floor("w4a8", config, Cell(2, 10), Floors(1e9, 1e3))
    assert list(busy.values()) == [pytest.approx(2 * linears), pytest.approx(20 * linears)]
    # The rate of int8 products says nothing about 16-bit activations.
    w4a16 = serve.floor("w4a16", config, Cell(2, 10), Floors(1e3, 1e3))
    assert w4a16["ttft_floor_ms"] == pytest.approx(linears / 2 + 2 * head)
    # Four-bit activations are multiplied as int4 where the device can.
    w4a4 = serve.floor("w4a4", config, Cell(2, 10), Floors(1e9, 1e3, 4e3))
    assert w4a4["ttft_floor_ms"] == pytest.approx(20 * linears / 4)


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
