# SPDX-License-Identifier: Apache-2.0
"""The entry point: what vLLM finds, what importing it costs, and under which versions it steps
aside."""

import importlib.metadata
import logging
import subprocess
import sys
from importlib.metadata import entry_points

import pytest
import vllm
from vllm.model_executor.layers import quantization
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from smoothrot_vllm.errors import UnsupportedPlatformError
from smoothrot_vllm.plugin import register as plugin
from smoothrot_vllm.plugin.quant_config import SmoothRotConfig


def test_vllm_finds_the_entry_point() -> None:
    (entry,) = (e for e in entry_points(group="vllm.general_plugins") if e.name == "smoothrot")
    assert entry.load() is plugin.register


def test_registering_twice_changes_nothing() -> None:
    plugin.register()
    plugin.register()
    assert QUANTIZATION_METHODS.count("smoothrot") == 1
    assert get_quantization_config("smoothrot") is SmoothRotConfig


def test_importing_the_plugin_imports_neither_torch_nor_vllm() -> None:
    code = (
        "import sys, smoothrot_vllm.plugin.register;"
        " print([m for m in ('torch', 'vllm', 'pydantic') if m in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


@pytest.mark.parametrize("version", ["0.32.0", "0.32.5", "0.33.0"])
def test_supported_versions_pass(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    _install(monkeypatch, version)
    assert plugin.unsupported_version() is None


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, type[QuantizationConfig]]:
    """vLLM's, as it was before our plugin, and put back afterwards."""
    found: dict[str, type[QuantizationConfig]] = {}
    monkeypatch.setattr(quantization, "_CUSTOMIZED_METHOD_TO_QUANT_CONFIG", found)
    methods = [name for name in QUANTIZATION_METHODS if name != "smoothrot"]
    monkeypatch.setattr(quantization, "QUANTIZATION_METHODS", methods)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    return found


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "1.32.0", "0.0.dev"])
def test_under_other_versions_only_converted_models_are_refused(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    registry: dict[str, type[QuantizationConfig]],
    version: str,
) -> None:
    _install(monkeypatch, version)
    plugin.register()
    assert [
        record.getMessage() for record in caplog.records if record.name == "vllm.smoothrot"
    ] == [
        f"the smoothrot plugin expects vLLM 0.32 or 0.33, got {version}: converted models are"
        " refused, others are served without it"
    ]
    (refused,) = registry.values()
    # vLLM asks every method about every quantized model.
    assert refused.override_quantization_method({"quant_method": "gptq"}, None) is None
    words = rf"expects vLLM 0\.32 or 0\.33, got {version}.*SMOOTHROT_ALLOW_ANY_VLLM=1"
    with pytest.raises(UnsupportedPlatformError, match=words):
        refused.from_config({"quant_method": "smoothrot"})
    with pytest.raises(UnsupportedPlatformError, match=words):
        refused()
    with pytest.raises(UnsupportedPlatformError, match=words):
        refused.get_config_filenames()


def test_a_vllm_that_registers_otherwise_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    registry: dict[str, type[QuantizationConfig]],
) -> None:
    _install(monkeypatch, "1.0.0")
    monkeypatch.delattr(quantization, "register_quantization_config")
    plugin.register()
    assert registry == {}
    assert "converted models are refused" in caplog.text


def test_another_version_can_be_allowed_and_warns(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    registry: dict[str, type[QuantizationConfig]],
) -> None:
    _install(monkeypatch, "0.34.0")
    monkeypatch.setenv("SMOOTHROT_ALLOW_ANY_VLLM", "1")
    plugin.register()
    assert "got 0.34.0" in caplog.text
    assert registry == {"smoothrot": SmoothRotConfig}


@pytest.mark.parametrize(
    ("installed", "cuda", "main_process", "warned"),
    [
        ("0.1.0+cpu", True, True, True),
        ("0.1.0+cpu", True, False, False),  # once, not in every process
        ("0.1.0+cpu", False, True, False),
        ("0.1.0", True, True, False),
    ],
)
def test_a_build_without_cuda_kernels_warns_on_a_gpu(
    installed: str,
    cuda: bool,
    main_process: bool,
    warned: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(plugin, "version", lambda _: installed)
    monkeypatch.setattr(plugin, "parent_process", lambda: None if main_process else object())
    monkeypatch.setattr(vllm.platforms.current_platform, "is_cuda", lambda: cuda)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    plugin.register()
    assert ("built without CUDA kernels" in caplog.text) == warned


def test_the_installed_version_tells_whether_there_are_cuda_kernels() -> None:
    from smoothrot_vllm import ops

    assert importlib.metadata.version("smoothrot-vllm").endswith(plugin.WITHOUT_CUDA) == (
        not ops.cuda_architectures()
    )


def _install(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.delenv("SMOOTHROT_ALLOW_ANY_VLLM", raising=False)
    monkeypatch.setattr(vllm, "__version__", version)
    parts = tuple(int(p) if p.isdigit() else p for p in version.split("."))
    monkeypatch.setattr(vllm, "__version_tuple__", parts)
