# SPDX-License-Identifier: Apache-2.0
"""Experts stored as transformers has them in memory convert as the same experts one by one."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from refusal import edit_weights
from transformers import AutoModelForCausalLM

from smoothrot_offline.check.plan import plan_conversion
from smoothrot_offline.check.verify import compare_with_source
from smoothrot_offline.config import make_config
from smoothrot_offline.convert import convert
from smoothrot_offline.report.model import load_model
from smoothrot_offline.source.checkpoint import open_checkpoint
from smoothrot_vllm.errors import CheckpointError

MakeModel = Callable[..., Path]
OPTIONS = make_config(scales="none")
GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"


def fuse(source: Path, shard: str = "1GB") -> Path:
    """The same model, its experts not taken apart as they are saved."""
    fused = source.with_name(f"{source.name}-fused")
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(
        fused, save_original_format=False, max_shard_size=shard
    )
    assert any(info.part for info in open_checkpoint(fused).tensors.values())
    return fused


@pytest.mark.parametrize(
    ("family", "shard"),
    [
        ("mixtral", "1GB"),
        ("qwen2_moe", "1GB"),
        ("qwen3_moe", "60KB"),
        ("qwen3_5_moe", "1GB"),
        ("olmoe", "1GB"),
        ("glm4_moe", "1GB"),
        ("deepseek_v3", "1GB"),
    ],
)
def test_fused_experts_give_the_bytes_of_separate_ones(
    make_model: MakeModel, tmp_path: Path, family: str, shard: str
) -> None:
    source = make_model(family)
    fused = fuse(source, shard)
    plans = [plan_conversion(open_checkpoint(path), OPTIONS) for path in (source, fused)]
    assert plans[0].source_bytes == plans[1].source_bytes
    assert plans[1].refusals == []
    for path in (source, fused):
        convert(path, tmp_path / f"{path.name}-out", OPTIONS)
    assert compare_with_source(tmp_path / "model-fused-out", fused).problems == []
    files = sorted((tmp_path / "model-out").glob("*.safetensors"))
    assert len(files) == 5
    for file in files:
        assert (tmp_path / "model-fused-out" / file.name).read_bytes() == file.read_bytes()


@torch.no_grad()
def test_a_model_of_fused_experts_runs_as_a_whole(make_model: MakeModel) -> None:
    source, tokens = make_model("mixtral"), torch.arange(12)[None]
    logits = [load_model(path)(tokens).logits for path in (source, fuse(source))]
    assert torch.equal(*logits)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.update({GATE_UP: t[GATE_UP][:, 1:].contiguous()}), r"\(experts, 2 \* width"),
        (lambda t: t.update({GATE_UP: t[GATE_UP][0].contiguous()}), r"got \(304, 72\)"),
        (lambda t: t.update({GATE_UP: t[GATE_UP][1:].contiguous()}), r"experts\.3\.w1.* missing"),
        (lambda t: t.update({GATE_UP: t[GATE_UP][:, 2:].contiguous()}), r"\(151, 72\)"),
        (lambda t: t[GATE_UP][2, 3].fill_(torch.inf), r"experts\.2\.w1.*72 NaN or infinite"),
        (
            lambda t: t.update({GATE_UP: torch.empty(200_000, 2, 0)}),
            "expected at most 65536 experts",
        ),
        (
            lambda t: t.update(
                {"model.layers.1.block_sparse_moe.experts.3.w3.weight": torch.ones(152, 72)}
            ),
            "fused or each by itself",
        ),
    ],
    ids=[
        "odd rows",
        "two dimensions",
        "an expert less",
        "rows of other experts",
        "infinite",
        "too many",
        "both",
    ],
)
def test_fused_experts_are_refused_by_name(
    make_model: MakeModel,
    tmp_path: Path,
    change: Callable[[dict[str, torch.Tensor]], object],
    words: str,
) -> None:
    fused = fuse(make_model("mixtral"))
    edit_weights(fused, change)
    with pytest.raises(CheckpointError, match=words):
        convert(fused, tmp_path / "out", OPTIONS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model-fused"]
