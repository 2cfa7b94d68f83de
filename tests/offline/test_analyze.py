# SPDX-License-Identifier: Apache-2.0
"""``analyze``: its numbers against direct computations, a planted spike, its files, and its
refusals."""

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import COMMAND, run_forked
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from smoothrot_offline.cli import app
from smoothrot_offline.config import AnalysisConfig
from smoothrot_offline.report import pages as pictures
from smoothrot_offline.report.analysis import Analysis
from smoothrot_offline.report.analyze import analyze
from smoothrot_offline.report.measure import InputMeter, Transform, difficulty, quantize
from smoothrot_offline.rounding.rtn import quantize_rtn
from smoothrot_offline.source.text import load_calibration
from smoothrot_offline.transform.rotation import Rotation, random_rotation, random_signs
from smoothrot_vllm.errors import ConfigError, UnsupportedModelError
from smoothrot_vllm.format import WeightScheme
from smoothrot_vllm.hadamard import choose_block

MakeModel = Callable[..., Path]
SAMPLES, SEQLEN, SEED = 3, 16, 5
OPTIONS = ("--calib-samples", SAMPLES, "--calib-seqlen", SEQLEN, "--seed", SEED)
LINEARS = {
    "qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "o_proj": ["self_attn.o_proj"],
    "gate_up": ["mlp.gate_proj", "mlp.up_proj"],
    "down_proj": ["mlp.down_proj"],
}


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run(source: Path, out: Path, **options: Any) -> Analysis:
    config = AnalysisConfig(calib_samples=SAMPLES, calib_seqlen=SEQLEN, seed=SEED, **options)
    return analyze(source, out, config)[0]


def rounded(x: torch.Tensor, clip: float = 1.0) -> torch.Tensor:
    """Plain 4-bit symmetric quantization of each row in float64."""
    scale = x.abs().amax(dim=1, keepdim=True) * clip / 7
    return torch.round(x / scale).clamp(-8, 7) * scale


class Captured:
    """Inputs of every linear of the original model on both halves of the calibration text, in
    float64."""

    def __init__(self, source: Path) -> None:
        self.tokens = load_calibration("generated", source, 2 * SAMPLES, SEQLEN, SEED)
        self.model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64)
        self.inputs: dict[str, torch.Tensor] = {}
        for name, module in self.model.named_modules():
            if name.endswith("_proj"):
                module.register_forward_pre_hook(
                    lambda _m, inputs, name=name: self.inputs.update({name: inputs[0].detach()})
                )
        with torch.no_grad():
            self.model(self.tokens)

    def get(self, layer: int, kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Choosing and measuring halves of X, ``(tokens, K)``, and W ``(out, K)``."""
        prefix = f"model.layers.{layer}."
        x = self.inputs[prefix + LINEARS[kind][0]]
        weight = torch.cat(
            [self.model.get_submodule(prefix + linear).weight.detach() for linear in LINEARS[kind]]
        )
        return x[:SAMPLES].flatten(0, 1), x[SAMPLES:].flatten(0, 1), weight


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made but not drawn, which takes most of the time; for tests of everything
    else."""
    monkeypatch.setattr(pictures, "_png", lambda figure, tight=True: b"")


@pytest.fixture(scope="module")
def analysed(
    build_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Analysis]:
    base = tmp_path_factory.mktemp("analysis")
    build_model("qwen2", dtype=torch.float32).save_pretrained(base / "model")
    return base / "model", base / "out", run(base / "model", base / "out")


def check(found: Any, x: torch.Tensor, weight: torch.Tensor) -> None:
    exact, error = x @ weight.T, x @ weight.T - rounded(x) @ rounded(weight).T
    assert found.activation_difficulty == pytest.approx(float(x.norm(dim=0).std()), rel=1e-5)
    assert found.weight_difficulty == pytest.approx(float(weight.norm(dim=0).std()), rel=1e-5)
    # A value half way between two codes may round either way in float32.
    assert found.error == pytest.approx(float(error.square().sum()), rel=2e-3)
    assert found.relative_error == pytest.approx(
        found.error / float(exact.square().sum()), rel=1e-4
    )
    codes = torch.round(x / (x.abs().amax(dim=1, keepdim=True) / 7)).flatten()
    shares = [float((codes == code).double().mean()) for code in range(-8, 8)]
    assert found.activation_bins == pytest.approx(shares, abs=2e-3)
    assert sum(found.weight_bins) == pytest.approx(1)
    assert sum(found.peak_token_bins) == pytest.approx(1)


def even(ratio: torch.Tensor) -> torch.Tensor:
    """Scales of a norm: the square roots, with a geometric mean of 1."""
    return (ratio.sqrt().log() - ratio.sqrt().log().mean()).exp()


def check_policy(
    layer: Any,
    policy: str,
    scales: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    q: torch.Tensor,
) -> None:
    found, reference = layer.policies[policy], layer.policies["max"]
    assert found.scale_max == pytest.approx(float(scales.max()), rel=1e-5)
    assert found.scale_min == pytest.approx(float(scales.min()), rel=1e-5)
    assert found.scale_geometric_mean == pytest.approx(float(scales.log().mean().exp()), rel=1e-5)
    smoothed, folded = x / scales @ q, (weight * scales) @ q
    error = x @ weight.T - rounded(smoothed) @ rounded(folded).T
    assert found.error == pytest.approx(float(error.square().sum()), rel=2e-3)
    rtn = quantize_rtn(folded, WeightScheme()).dequantize().double()
    error = x @ weight.T - rounded(smoothed, clip=0.9) @ rtn.T
    assert found.converted_error == pytest.approx(float(error.square().sum()), rel=2e-3)
    assert found.ratio_to_max == found.error / reference.error
    assert found.converted_ratio_to_max == found.converted_error / reference.converted_error


def test_every_number_of_every_transform_is_the_direct_one(
    analysed: tuple[Path, Path, Analysis],
) -> None:
    source, _, found = analysed
    captured = Captured(source)
    eye = {size: torch.eye(size, dtype=torch.float64) for size in (72, 152)}
    for layer in found.layers:
        norms = {"qkv": "input_layernorm", "gate_up": "post_attention_layernorm"}
        for kind, linears in LINEARS.items():
            choosing, x, weight = captured.get(layer.index, kind)
            record = layer.inputs[kind]
            assert record.linears == linears
            check(record.transforms["none"], x, weight)
            magnitude = float(x.abs().max())
            assert record.peak.magnitude == pytest.approx(magnitude, rel=1e-5)
            token = record.peak.sample * SEQLEN + record.peak.position
            assert float(x[token, record.peak.channel].abs()) == pytest.approx(magnitude, rel=1e-5)
            assert (
                record.peak.token
                == captured.tokens[SAMPLES + record.peak.sample, record.peak.position]
            )
            sequence = x[record.peak.sample * SEQLEN :][:SEQLEN].float().abs()
            assert record.peak.median == pytest.approx(float(sequence.median()), rel=1e-4)
            assert record.peak.ratio == pytest.approx(record.peak.magnitude / record.peak.median)
            if kind in norms:
                gamma = captured.model.get_submodule(
                    f"model.layers.{layer.index}.{norms[kind]}"
                ).weight.detach()
                q = random_rotation(72, SEED).rotate(eye[72])
                check(record.transforms["R"], x / gamma @ q, (weight * gamma) @ q)
                scales = even(
                    (choosing / gamma @ q).norm(dim=0) / ((weight * gamma) @ q).norm(dim=0)
                )
                check(
                    record.transforms["S+R"], x / gamma @ q / scales, (weight * gamma) @ q * scales
                )
            elif kind == "o_proj":
                q = Rotation(torch.ones(72, dtype=torch.float64), 8).rotate(eye[72])
                check(record.transforms["R"], x @ q, weight @ q)
            else:
                signs = random_signs(152, SEED, f"R4/{layer.index}")
                q = Rotation(signs, choose_block(152).size).rotate(eye[152])
                scales = (choosing.abs().amax(dim=0) / weight.abs().amax(dim=0)).sqrt()
                check(record.transforms["S"], x / scales, weight * scales)
                check(record.transforms["R"], x @ q, weight @ q)
                check(record.transforms["S+R"], x / scales @ q, (weight * scales) @ q)
                assert layer.policies["max"].error == record.transforms["S+R"].error
                check_policy(layer, "max", scales, x, weight, q)
                scales = (choosing.norm(dim=0) / weight.norm(dim=0)).sqrt()
                check_policy(layer, "l2", scales, x, weight, q)


@pytest.mark.usefixtures("undrawn")
def test_readers_of_a_norm_that_cannot_be_folded_are_rotated_at_run_time(
    make_model: MakeModel, tmp_path: Path
) -> None:
    source = make_model("gemma3", dtype=torch.float32)
    found = run(source, tmp_path / "out", policies=("max",), layers=(1,))
    captured = Captured(source)
    q = Rotation(torch.ones(72, dtype=torch.float64), choose_block(72).size).rotate(
        torch.eye(72, dtype=torch.float64)
    )
    for kind in ("qkv", "gate_up"):
        choosing, x, weight = captured.get(1, kind)
        check(found.layers[0].inputs[kind].transforms["none"], x, weight)
        check(found.layers[0].inputs[kind].transforms["R"], x @ q, weight @ q)
        scales = even(choosing.norm(dim=0) / weight.norm(dim=0))
        check(found.layers[0].inputs[kind].transforms["S+R"], x / scales @ q, (weight * scales) @ q)
    _, x, weight = captured.get(1, "down_proj")
    check(found.layers[0].inputs["down_proj"].transforms["none"], x, weight)


def test_summaries_are_those_of_the_layers(analysed: tuple[Path, Path, Analysis]) -> None:
    _, _, found = analysed
    for kind in LINEARS:
        peaks = [layer.inputs[kind].peak for layer in found.layers]
        assert found.massive[kind].peak.magnitude == max(peak.magnitude for peak in peaks)
        assert found.massive[kind].peak == peaks[found.massive[kind].layer]
        assert found.massive[kind].massive_layers == []
        for name, mean in found.mean_error[kind].items():
            records = [layer.inputs[kind].transforms[name] for layer in found.layers]
            assert mean == pytest.approx(sum(record.error for record in records) / 3)
            pairs = torch.tensor(
                [[record.error, record.activation_difficulty] for record in records],
                dtype=torch.float64,
            )
            assert found.error_difficulty_correlation[kind][name] == pytest.approx(
                float(torch.corrcoef(pairs.T)[0, 1])
            )
    assert set(found.policies) == {"max", "quantile", "l2", "search", "learned"}
    for policy, summary in found.policies.items():
        own = [layer.policies[policy] for layer in found.layers]
        reference = [layer.policies["max"] for layer in found.layers]
        assert summary.mean_error == pytest.approx(sum(record.error for record in own) / 3)
        assert summary.converted_mean_error == pytest.approx(
            sum(record.converted_error for record in own) / 3
        )
        assert summary.ratio_of_means == pytest.approx(
            summary.mean_error / found.policies["max"].mean_error
        )
        expected = summary.converted_mean_error / found.policies["max"].converted_mean_error
        assert summary.converted_ratio_of_means == pytest.approx(expected)
        selected = [index for index, record in enumerate(own) if record.selected]
        assert summary.selected_layers == selected
        if selected:
            errors = (
                sum(record.error for record in (records[i] for i in selected))
                for records in (own, reference)
            )
            assert summary.selected_ratio == pytest.approx(next(errors) / next(errors))
    assert found.policies["max"].ratio_of_means == 1.0
    assert (found.policies["max"].selected_layers, found.policies["max"].selected_ratio) == (
        [],
        None,
    )
    assert found.policies["l2"].selected_layers == [0, 1, 2]


def test_difficulty_is_the_unbiased_deviation_of_the_channels() -> None:
    assert difficulty(torch.full((4,), 9.0, dtype=torch.float64)) == 0
    assert difficulty(torch.tensor([0.0, 0.0, 0.0, 16.0], dtype=torch.float64)) == 2.0


def test_quantizer_uses_codes_up_to_seven_and_no_clip() -> None:
    codes, values = quantize(torch.tensor([[7.0, -7.0, 3.4, 0.4]]))
    assert codes.tolist() == [[7, -7, 3, 0]]
    assert values.tolist() == [[7.0, -7.0, 3.0, 0.0]]


def test_chunks_of_sequences_measure_what_all_of_them_at_once_do() -> None:
    torch.manual_seed(0)
    x, transform = torch.randn(24, 6), Transform(lambda x: x * 2, torch.randn(4, 6))
    whole, parts = (InputMeter({"none": transform}, 4) for _ in range(2))
    whole.update(x)
    for part in x.split(8):
        parts.update(part)
    assert whole.peak == parts.peak
    one, other = whole.results()["none"], parts.results()["none"]
    assert one.activation_bins == other.activation_bins
    assert (one.error, one.activation_difficulty) == pytest.approx(
        (other.error, other.activation_difficulty)
    )


@pytest.mark.usefixtures("undrawn")
def test_planted_spike_is_the_massive_activation_where_it_was_planted(
    make_model: MakeModel, tmp_path: Path
) -> None:
    source, channel = make_model(), 101
    tensors = load_file(source / "model.safetensors")
    # Token 1 alone has a large first hidden value, layer 0 moves nothing between tokens, and its
    # channel 101 reads that value.
    tensors["model.embed_tokens.weight"][:, 0] = 0
    tensors["model.embed_tokens.weight"][1, 0] = 50
    tensors["model.layers.0.self_attn.o_proj.weight"].zero_()
    for linear in ("gate_proj", "up_proj"):
        tensors[f"model.layers.0.mlp.{linear}.weight"][channel] = 0
        tensors[f"model.layers.0.mlp.{linear}.weight"][channel, 0] = 100
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    found = run(source, tmp_path / "out", policies=("max",))
    assert found.massive["down_proj"].layer == 0
    peak = found.massive["down_proj"].peak
    assert (peak.channel, peak.token) == (channel, 1)
    assert peak.ratio is not None
    assert peak.ratio > found.massive_ratio == 1000
    tokens = load_calibration("generated", source, 2 * SAMPLES, SEQLEN, SEED)[SAMPLES:]
    planted = (tokens == 1).nonzero()
    record = found.layers[0].inputs["down_proj"]
    assert record.massive_tokens == len(planted)
    assert record.massive_positions == sorted({int(position) for _, position in planted})
    assert [peak.sample, peak.position] in planted.tolist()
    assert found.massive["down_proj"].massive_layers == [0]
    assert found.massive["qkv"].massive_layers == []
    # What the method is for: rotation alone spreads the spike over every channel, smoothing first
    # shrinks it.
    errors = {name: transform.error for name, transform in record.transforms.items()}
    assert errors["S+R"] < errors["R"]


class _Page(HTMLParser):
    """References and tags of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attributes if name in ("src", "href")]


def test_output_is_a_record_and_a_page_that_stands_alone(
    analysed: tuple[Path, Path, Analysis],
) -> None:
    _, out, found = analysed
    assert sorted(file.name for file in out.iterdir()) == ["analysis.json", "report.html"]
    assert Analysis.model_validate_json((out / "analysis.json").read_text()) == found
    page = (out / "report.html").read_text()
    assert len(page.encode()) < 5e6
    assert not re.search(r"https?://|url\(|@import", page)
    parsed = _Page()
    parsed.feed(page)
    assert not {"script", "link", "iframe", "object"} & set(parsed.tags)
    assert parsed.tags.count("img") == len(parsed.sources) == 9
    assert all(source.startswith("data:image/png;base64,") for source in parsed.sources)


def test_same_options_give_the_same_record_and_page(
    analysed: tuple[Path, Path, Analysis], tmp_path: Path
) -> None:
    source, out, found = analysed
    assert run(source, tmp_path / "again") == found
    for name in ("analysis.json", "report.html"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()


@pytest.mark.usefixtures("undrawn")
def test_command_prints_the_facts_and_takes_some_layers(
    analysed: tuple[Path, Path, Analysis], tmp_path: Path
) -> None:
    source, _, found = analysed
    result = invoke("analyze", source, tmp_path / "some", "--layers", "2,0-1,2", *OPTIONS, "--json")
    assert result.exit_code == 0, result.stderr
    assert Analysis.model_validate_json(result.stdout).layers == found.layers
    shown = invoke(
        "analyze", source, tmp_path / "one", "--layers", "1", *OPTIONS, "--policies", "l2"
    )
    assert shown.exit_code == 0, shown.stderr
    assert "down_proj" in shown.stdout
    assert "report.html" in shown.stdout
    alone = Analysis.model_validate_json((tmp_path / "one/analysis.json").read_text())
    assert alone.layers[0].inputs == found.layers[1].inputs
    assert alone.layers[0].policies == {
        name: found.layers[1].policies[name] for name in ("max", "l2")
    }
    assert alone.error_difficulty_correlation["qkv"]["none"] is None
    assert (tmp_path / "one/report.html").read_text().count("<img") == 6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--layers", "3"), "expected layers of this model, 0 to 2"),
        (("--layers", "1,x"), "got 'x'"),
        (("--layers", "2-1"), "--layers"),
        (("--policies", "max,magic"), "magic"),
        (("--calib-seqlen", 65), "at most the model's context of 64"),
    ],
)
def test_refusals_name_the_option_and_leave_nothing(
    make_model: MakeModel, tmp_path: Path, options: tuple[object, ...], words: str
) -> None:
    result = invoke("analyze", make_model(), tmp_path / "out", *OPTIONS, *options)
    assert result.exit_code == 1
    assert words in result.stderr
    assert result.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_taken_output_is_refused_before_anything_runs(
    make_model: MakeModel, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").touch()
    with pytest.raises(ConfigError, match="Choose another output"):
        run(make_model(), tmp_path / "out")


def test_failure_on_the_way_leaves_no_output(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> str:
        raise KeyboardInterrupt

    source = make_model()
    monkeypatch.setattr("smoothrot_offline.report.analyze.analysis_page", fail)
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_quantized_model_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    source = make_model()
    config = json.loads((source / "config.json").read_text()) | {
        "quantization_config": {"quant_method": "smoothrot"}
    }
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="already quantized"):
        run(source, tmp_path / "out")


def test_missing_matplotlib_is_named(make_model: MakeModel, tmp_path: Path) -> None:
    without = "import sys\nsys.modules['matplotlib.figure'] = None\n"
    result = run_forked(without + COMMAND, "analyze", make_model(), tmp_path / "out")
    assert result.returncode == 1
    assert "pip install 'smoothrot-vllm[plots]'" in result.stderr
