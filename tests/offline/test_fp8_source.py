# SPDX-License-Identifier: Apache-2.0
"""FP8 weights with a scale for each block are dequantized as they are read."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from packers import pack_linears
from refusal import edit_config, edit_weights

from smoothrot_offline.check.plan import plan_conversion
from smoothrot_offline.check.verify import verify
from smoothrot_offline.config import make_config
from smoothrot_offline.convert import convert
from smoothrot_offline.presets import choose_preset
from smoothrot_offline.source.checkpoint import open_checkpoint
from smoothrot_vllm.errors import (
    CheckpointError,
    ConfigError,
    SmoothRotError,
    UnsupportedModelError,
)

MakeModel = Callable[..., Path]
OPTIONS = make_config(scales="none")
# Blocks that divide neither 72 nor 152: the last ones are cut off.
BLOCK = (32, 48)
UP = "model.layers.1.mlp.up_proj.weight"


def blocks(weight: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """FP8 with a random scale for each block; what it is worth, an element at a time from the
    definition."""
    codes = weight.to(torch.float8_e4m3fn)
    shape = [-(-size // step) for size, step in zip(codes.shape, BLOCK, strict=True)]
    scale = torch.rand(shape) + 0.5
    rows, columns = torch.meshgrid(*(torch.arange(size) for size in codes.shape), indexing="ij")
    worth = codes.float() * scale[rows // BLOCK[0], columns // BLOCK[1]]
    return worth, {"weight": codes, "weight_scale_inv": scale}


def as_fp8(source: Path) -> dict[str, torch.Tensor]:
    """Make the linears of a checkpoint FP8; returns what they are worth."""
    said = {"quant_method": "fp8", "weight_block_size": list(BLOCK)}
    return pack_linears(source, said, blocks)


@pytest.mark.parametrize("shard", ["1GB", "60KB"], ids=["one file", "sharded"])
def test_converts_as_the_float32_model_that_it_stands_for(
    make_model: MakeModel, tmp_path: Path, shard: str
) -> None:
    source = make_model(shard=shard)
    worth = as_fp8(source)
    plain = make_model(name="plain")
    edit_weights(plain, lambda tensors: tensors.update(worth))
    assert torch.equal(open_checkpoint(source).load([UP])[UP], worth[UP])
    assert plan_conversion(open_checkpoint(source), OPTIONS).refusals == []
    convert(source, tmp_path / "out", OPTIONS)
    convert(plain, tmp_path / "expected", OPTIONS)
    assert verify(tmp_path / "out").ok
    for file in (tmp_path / "expected").glob("*.safetensors"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    return lambda source: edit_weights(source, change)


def config(**changes: object) -> Callable[[Path], None]:
    return lambda source: edit_config(source, **changes)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (
            weights(lambda t: t.pop(f"{UP}_scale_inv")),
            CheckpointError,
            "up_proj.*_scale_inv.* got none",
        ),
        (
            weights(lambda t: t.update({f"{UP}_scale_inv": torch.ones(5, 3)})),
            CheckpointError,
            r"\(5, 3\)",
        ),
        (
            config(quantization_config={"quant_method": "fp8", "weight_block_size": [0, 48]}),
            UnsupportedModelError,
            "weight_block_size: expected two positive numbers",
        ),
        (config(quantization_config=None), CheckpointError, "expected dtype .* got F8_E4M3"),
        (
            weights(lambda t: t[f"{UP}_scale_inv"].fill_(float("nan"))),
            CheckpointError,
            "10 NaN or infinite",
        ),
        (weights(lambda t: t[UP].view(torch.uint8)[3].fill_(127)), CheckpointError, "72 NaN"),
    ],
    ids=[
        "no scale",
        "scale of another shape",
        "blocks of no rows",
        "not said in config",
        "NaN scale",
        "NaN weight",
    ],
)
def test_refused_by_name(
    make_model: MakeModel,
    tmp_path: Path,
    change: Callable[[Path], None],
    kind: type[SmoothRotError],
    words: str,
) -> None:
    source = make_model()
    as_fp8(source)
    change(source)
    with pytest.raises(kind, match=words):
        convert(source, tmp_path / "out", OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_is_not_distilled(make_model: MakeModel, tmp_path: Path) -> None:
    source, out = make_model(), tmp_path / "out"
    as_fp8(source)
    with pytest.raises(ConfigError, match=r"--distill-steps 3: expected 16-bit weights"):
        convert(source, out, make_config(scales="none", distill_steps=3))
    assert not out.exists()
    choice = choose_preset("best", {}, open_checkpoint(source))
    assert choice.config.distill_steps == 0
    assert any("not distilled: the original cannot run" in note for note in choice.notes)


def test_does_not_generate_its_own_calibration_text(make_model: MakeModel, tmp_path: Path) -> None:
    source = make_model()
    as_fp8(source)
    assert (
        "got FP8 weights"
        in plan_conversion(open_checkpoint(source), make_config(calib_seqlen=16)).refusals[0]
    )
    with pytest.raises(ConfigError, match="got FP8 weights"):
        convert(source, tmp_path / "out", make_config(calib_seqlen=16))
