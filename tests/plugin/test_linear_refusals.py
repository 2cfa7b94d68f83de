# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint lacks or has wrong of a linear is refused by name, and so are layers that
cannot be loaded."""

from collections.abc import Callable

import pytest
import torch
from configs import make_config
from linears import (
    DOWN,
    HIDDEN,
    INTERMEDIATE,
    SCHEMES,
    VOCAB,
    Stored,
    down,
    finish,
    gate_up,
    in_proj_qkvz,
    load,
)
from vllm.config import VllmConfig
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from smoothrot_vllm.errors import CheckpointError, ConfigError, UnsupportedModelError
from smoothrot_vllm.format import WEIGHT_GROUP_SCALE, WEIGHT_PACKED, WEIGHT_SCALE

GROUPED = SCHEMES["w4 in groups of 32"]


@pytest.mark.parametrize("name", [WEIGHT_PACKED, WEIGHT_SCALE, WEIGHT_GROUP_SCALE])
@pytest.mark.parametrize("part", [0, 1])
def test_a_missing_tensor_is_refused_by_name(vllm_config: VllmConfig, part: int, name: str) -> None:
    layer = gate_up(make_config(weights=GROUPED))
    tensors = Stored.random(INTERMEDIATE, HIDDEN, GROUPED, 1).tensors()
    for other in (0, 1):
        for tensor, data in tensors.items():
            if (other, tensor) != (part, name):
                load(layer, tensor, data, other)
    missing = f"model.layers.0.mlp.{('gate_proj', 'up_proj')[part]}.{name}"
    with pytest.raises(
        CheckpointError, match=rf"expected 6 .* got none named {missing} \(1 missing\)\. "
    ):
        finish(layer)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
def test_an_unusable_scale_is_refused_with_its_value(vllm_config: VllmConfig, value: float) -> None:
    layer = down(make_config())
    stored = Stored.random(HIDDEN, INTERMEDIATE, SCHEMES["w4 per channel"], 3)
    stored.scale[11, 0] = value
    stored.load_into(layer)
    with pytest.raises(
        CheckpointError,
        match=rf"{DOWN}\.weight_scale .*row 11, column 0 .*got {value} and 0 others of 128",
    ):
        finish(layer)


@pytest.mark.parametrize(("rank", "row", "column"), [(0, 127, 0), (1, 0, 2), (1, 40, 1)])
def test_a_group_scale_of_zero_is_refused_with_its_place(
    tensor_parallel: Callable[[int, int], None], rank: int, row: int, column: int
) -> None:
    stored = Stored.random(HIDDEN, INTERMEDIATE, GROUPED, 3)
    assert stored.group_scale is not None
    stored.group_scale[row, 3 * rank + column] = 0
    for other in (0, 1):
        tensor_parallel(other, 2)
        layer = down(make_config(weights=GROUPED))
        stored.load_into(layer)
        if other != rank:
            finish(layer)
            continue
        with pytest.raises(
            CheckpointError,
            match=rf"{DOWN}\.weight_group_scale .*row {row}, column {column} of this rank: "
            "expected finite scales > 0, got 0 and 0 others of 384",
        ):
            finish(layer)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (
            torch.ones(HIDDEN, 6, dtype=torch.uint8),
            "expected torch.uint8 with 3 columns, got torch.uint8 (128, 6)",
        ),
        (
            torch.ones(HIDDEN, 3, dtype=torch.int8),
            "expected torch.uint8 with 3 columns, got torch.int8 (128, 3)",
        ),
        (
            torch.ones(HIDDEN - 1, 3, dtype=torch.uint8),
            "stored (127, 3) does not fill this rank's (128, 6)",
        ),
    ],
)
def test_group_scales_of_another_shape_or_dtype_are_refused(
    vllm_config: VllmConfig, tensor: torch.Tensor, message: str
) -> None:
    layer = down(make_config(weights=GROUPED))
    with pytest.raises(CheckpointError) as refusal:
        load(layer, WEIGHT_GROUP_SCALE, tensor)
    assert str(refusal.value).startswith(f"{DOWN}.weight_group_scale: {message}")


def test_scales_of_the_first_format_are_refused(vllm_config: VllmConfig) -> None:
    """It stored a float for each group."""
    layer = down(make_config(weights=GROUPED))
    with pytest.raises(CheckpointError, match=r"weight_scale: expected .* with 1 columns, got"):
        load(layer, WEIGHT_SCALE, torch.ones(HIDDEN, 6))


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


def test_a_fusion_of_unknown_parts_is_refused(vllm_config: VllmConfig) -> None:
    config = make_config()
    config.packed_modules_mapping = {}
    with pytest.raises(
        UnsupportedModelError,
        match=r"gate_up_proj: vLLM fuses 2 linears here, .* names 1 \(gate_up_proj\)",
    ):
        gate_up(config)


def test_a_piece_of_a_part_is_refused(vllm_config: VllmConfig) -> None:
    layer = in_proj_qkvz(make_config())
    with pytest.raises(
        UnsupportedModelError,
        match=r"in_proj_qkvz: expected in_proj_qkv as the first 3 shards .* got shards \(1,\)",
    ):
        load(layer, WEIGHT_PACKED, torch.zeros(64, HIDDEN // 2, dtype=torch.uint8), 1)


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
