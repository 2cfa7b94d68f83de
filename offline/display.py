# SPDX-License-Identifier: Apache-2.0
"""Results as tables for people; every command prints the same facts as one JSON object under
``--json``."""

from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.table import Table

from smoothrot_offline.convert import Conversion
from smoothrot_offline.inspect import Inspection
from smoothrot_offline.plan import Plan
from smoothrot_offline.presets import Choice
from smoothrot_offline.sizes import Sizes
from smoothrot_vllm.format import Online


def show_plan(plan: Plan, choice: Choice) -> RenderableType:
    """The recipe, sizes, Hadamard factorisations, tensor-parallel sizes, memory and time, and what
    to know of it.

    Only of a conversion that is not refused: then there is nothing to show but the reason.
    """
    if plan.refusals:
        return Group()
    parts: list[RenderableType] = [f"{plan.model}: {plan.architecture}, {plan.layers} layers"]
    parts.append(f"recipe: {choice.config.described()} ({choice.reason})")
    if plan.source_bytes is not None and plan.output_bytes is not None:
        parts.append(_size_table("source", plan.source_bytes, plan.output_bytes))
    if plan.hadamard:
        table = make_table("rotation", "width", "Hadamard blocks")
        for name, rotation in plan.hadamard.items():
            table.add_row(
                name,
                str(rotation.size),
                f"{rotation.size // rotation.block} of {rotation.block} = {rotation.factors}",
            )
        parts.append(table)
    if plan.tensor_parallel:
        table = make_table("tensor parallel", "served")
        for entry in plan.tensor_parallel:
            table.add_row(str(entry.size), entry.refused or "yes")
        parts.append(table)
    if plan.seconds is not None and plan.memory_bytes is not None:
        on_cpu = "" if plan.device == "cpu" else "; memory and time below are those of the CPU"
        parts.append(f"device: {plan.device}{on_cpu}")
        parts.append(
            f"memory: about {decimal(plan.memory_bytes)}; time: about {plan.seconds:.0f} s"
            " (estimates; --json says how)"
        )
    parts += [f"note: {note}" for note in (*choice.notes, *plan.notes)]
    return Group(*parts)


def show_inspection(found: Inspection) -> RenderableType:
    """What the checkpoint is, how it is stored, and how well each layer kept its weights."""
    weights, acts = found.quantization.weights, found.quantization.activations
    groups = "per channel" if weights.group_size == -1 else f"groups of {weights.group_size}"
    facts = make_table("", "", header=False)
    facts.add_row("architecture", f"{found.architecture}, {found.layers} layers, {found.dtype}")
    facts.add_row(
        "linears", f"W{weights.bits} ({groups}) A{acts.bits} (per token, clip {acts.clip})"
    )
    facts.add_row(
        "head",
        (
            "16 bits"
            if found.quantization.lm_head is None
            else f"{found.quantization.lm_head.weights.bits} bits"
        ),
    )
    facts.add_row("online Hadamard", _online_rotations(found.quantization.online))
    facts.add_row("tensor parallel", f"up to {found.quantization.max_tensor_parallel}")
    errors = make_table(
        "layer", "mean weight error", "worst", "smoothing scales", "largest activation"
    )
    for index, layer in enumerate(found.origin["layers"]):
        worst = max(layer["weight_error"], key=layer["weight_error"].get)
        scales, activation = _smoothing_cells(
            [record for record in [layer["smoothing"], *layer["experts"]] if record is not None]
        )
        errors.add_row(
            str(index),
            f"{sum(layer['weight_error'].values()) / len(layer['weight_error']):.4f}",
            f"{layer['weight_error'][worst]:.4f} {worst}",
            scales,
            activation,
        )
    return Group(facts, _size_table("16 bits", found.sixteen_bit_bytes, found.output_bytes), errors)


def _smoothing_cells(records: list[dict[str, Any]]) -> tuple[str, str]:
    """Range of the scales and largest activation of a layer's down_proj, or of those of its
    experts."""
    if not records:
        return "none", "not measured"
    least, most, activation = (
        combine(record[key] for record in records)
        for combine, key in ((min, "scale_min"), (max, "scale_max"), (max, "activation_max"))
    )
    return f"{least:.3g} to {most:.3g}", f"{activation:.4g}"


def show_conversion(done: Conversion, out: str) -> RenderableType:
    """Where the output is and what it took."""
    return (
        f"{out}: {len(done.manifest.tensors)} tensors, {decimal(done.output_bytes.total)}, in"
        f" {done.seconds:.0f} s"
    )


def _online_rotations(online: Online) -> str:
    inputs = {"down_proj input": online.down_proj, "input of q, k, v, gate and up": online.readers}
    return (
        "; ".join(
            f"{name}, {r.size} in blocks of {r.block}"
            for name, r in inputs.items()
            if r is not None
        )
        or "none"
    )


def _size_table(before_name: str, before: Sizes, after: Sizes) -> Table:
    table = make_table("", before_name, "SmoothRot", "ratio")
    for kind in Sizes.model_fields:
        table.add_row(kind, *_size_cells(getattr(before, kind), getattr(after, kind)))
    table.add_row("total", *_size_cells(before.total, after.total))
    return table


def _size_cells(before: int, after: int) -> tuple[str, str, str]:
    return decimal(before), decimal(after), f"{before / after:.2f}x" if before and after else ""


def make_table(*columns: str, header: bool = True) -> Table:
    """A table in the style of every command."""
    return Table(*columns, box=box.SIMPLE, show_header=header)
