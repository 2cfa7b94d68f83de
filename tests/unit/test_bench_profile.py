# SPDX-License-Identifier: Apache-2.0
"""How a trace becomes the parts of a decode step."""

from typing import Any

import pytest

from benchmarks.serving.profile_decode import OUTSIDE, decode_step

VOCABULARY = 100


def event(
    name: str, start: float, length: float, shapes: list[list[int]] | None = None, **changes: Any
) -> dict[str, Any]:
    plain = {"ph": "X", "cat": "cpu_op", "pid": 1, "tid": 1, "name": name, "ts": start}
    return plain | {"dur": length, "args": {"Input Dims": shapes or []}} | changes


def step(start: float) -> list[dict[str, Any]]:
    """100 µs: 70 in operators, of which 5 in copies that attention makes."""
    return [
        event("execute_context_0(0)_generation_1(1)", start, 90, cat="user_annotation"),
        event("smoothrot::linear", start + 5, 20, [[1, 64], [3, 9], [96, 1]]),
        event("vllm::unified_attention", start + 30, 15),
        event("aten::copy_", start + 32, 5),
        event("_C::rms_norm", start + 50, 4),
        event("smoothrot::linear", start + 60, 25, [[1, 64], [4, 9], [128, 1]]),
        event("aten::argmax", start + 86, 3),
        event("aten::add", start + 95, 3),
    ]


@pytest.fixture
def events() -> list[dict[str, Any]]:
    """A prompt, three decode steps, and another thread that is busy all the while."""
    prompt = [
        event("execute_context_1(16)_generation_0(0)", 0, 900, cat="user_annotation"),
        event("aten::mm", 10, 500),
    ]
    busy = event("aten::mm", 1000, 300, tid=2)
    return [*prompt, *step(1000), *step(1100), *step(1200), busy]


def test_groups_add_up_to_the_step_of_own_times_alone(events: list[dict[str, Any]]) -> None:
    measured = decode_step(events, VOCABULARY)
    assert (measured["steps"], measured["step_ms"]) == (2, 0.1)
    assert measured["groups_ms"] == {
        OUTSIDE: 0.03,
        "output head": 0.025,
        "linears": 0.02,
        "attention": 0.015,
        "norms, activations, rotary": 0.004,
        "sampling": 0.003,
        "other operators": 0.003,
    }


def test_our_operators_are_told_apart_by_shape(events: list[dict[str, Any]]) -> None:
    operators = {o["operator"]: o for o in decode_step(events, VOCABULARY)["operators"]}
    assert operators["smoothrot::linear 1x64 4x9 128x1"] == {
        "group": "output head",
        "operator": "smoothrot::linear 1x64 4x9 128x1",
        "calls": 1.0,
        "ms": 0.025,
    }
    assert operators["aten::copy_"]["group"] == "attention"
    assert operators["vllm::unified_attention"]["ms"] == 0.01
