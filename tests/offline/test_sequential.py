# SPDX-License-Identifier: Apache-2.0
"""Error-compensated rounding within a conversion: the converted model comes closer to the
original."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from family_models import MODELS
from moe_models import with_separate_experts
from tiny_models import SHORT_TEXT, save_tiny_model
from transformers import AutoTokenizer, PreTrainedModel

from smoothrot_offline.config import make_config
from smoothrot_offline.convert import convert
from smoothrot_offline.report.model import load_model
from smoothrot_offline.rounding.served import BuiltLayer, output_of
from smoothrot_offline.source.layers import LayerRunner
from smoothrot_offline.source.resolve import resolve


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_the_halves_of_a_layer_make_the_whole(
    name: str, build_model: Callable[..., PreTrainedModel]
) -> None:
    model = build_model(**MODELS[name])
    spec = resolve(model.config.to_dict())
    for index, source in enumerate(with_separate_experts(model, spec).model.layers):
        built, layer = LayerRunner(spec).build(index, source.state_dict())
        halves = BuiltLayer(built, layer, spec, spec.layer_table(index), {})
        stream = torch.randn(2, 12, spec.stream, generator=torch.Generator().manual_seed(0))
        middle = halves.middle(stream, halves.output_input(stream))
        torch.testing.assert_close(halves.finish(middle), output_of(built, stream))


@pytest.fixture(scope="module", params=["qwen2", "gemma3", "gemma4", "mixtral"])
def logit_errors(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, float]:
    """:func:`errors_of` each of some families."""
    return errors_of(request.param, tmp_path_factory.mktemp("sequential"))


def errors_of(family: str, folder: Path) -> dict[str, float]:
    """Relative logit error on the calibration text, by rounding."""
    source = save_tiny_model(folder / "source", family)
    tokens = torch.tensor(
        [AutoTokenizer.from_pretrained(source)(SHORT_TEXT.read_text()).input_ids[:512]]
    )
    with torch.inference_mode():
        expected = load_model(source, torch.float32)(tokens).logits
        errors = {}
        for rounding in ("rtn", "gptq", "gptaq", "qronos"):
            options = {
                "activation_bits": 8,
                "calib": str(SHORT_TEXT),
                "calib_samples": 16,
                "calib_seqlen": 256,
            }
            convert(source, folder / rounding, make_config(rounding=rounding, **options))
            logits = load_model(folder / rounding, torch.float32)(tokens).logits
            errors[rounding] = float((logits - expected).norm() / expected.norm())
    return errors


def test_gptq_at_least_halves_the_logit_error_of_rtn(logit_errors: dict[str, float]) -> None:
    assert logit_errors["gptq"] < 0.5 * logit_errors["rtn"]


@pytest.mark.parametrize("rounding", ["gptaq", "qronos"])
def test_asymmetric_rounding_makes_up_for_earlier_layers_errors(
    logit_errors: dict[str, float], rounding: str
) -> None:
    assert logit_errors[rounding] < 0.95 * logit_errors["gptq"]


def test_layers_of_each_kind_are_rounded_for_what_they_read(tmp_path: Path) -> None:
    """Linear attention magnifies what error is left, see test_function_is_kept.py."""
    errors = errors_of("qwen3_5", tmp_path)
    assert errors["gptq"] < 0.6 * errors["rtn"]
    assert errors["gptaq"] < 0.95 * errors["gptq"]
