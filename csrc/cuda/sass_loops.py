# SPDX-License-Identifier: Apache-2.0
"""The main loops in a kernel's machine code, as cuobjdump prints it, and the floats in them."""

import re
from collections.abc import Iterable, Mapping
from itertools import pairwise

MULTIPLIES = re.compile(r"\b(?:IMMA|IGMMA)\.")
FLOATS = re.compile(
    r"\b(?:[IF]2F\w*|F2I\w*|FADD|FMUL|FFMA|FMNMX\w*|FSETP|FSEL|FCHK|MUFU|D(?:ADD|MUL|FMA)|H\w+2)\b"
    r"(?!\S* \S+ -?RZ, -?RZ,)"  # HFMA2 that moves a constant
)
"""Conversions and arithmetic of floats."""
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);")
TARGET = re.compile(r"\b0x([0-9a-f]+)")
RECONVERGENCE = re.compile(r"\b(BSSY|BSYNC)\S* (B\d+)")
BRANCHES = re.compile(r"\b(?:BRA\b|CALL\.REL)\S* .*0x")
"""On sm_80 a loop may be left by a call from which nothing returns."""
ENDS = re.compile(r"^(?:EXIT|RET|BRX|KILL)\b")
JUMP = re.compile(r"^BRA\S* 0x[0-9a-f]+ *$")
"""Without a condition, which may be before the instruction or its first operand."""

Graph = Mapping[int, Iterable[int]]


def successors(instructions: dict[int, str]) -> dict[int, list[int]]:
    """Where each instruction can go on."""
    places = sorted(instructions)
    following = dict(pairwise(places))
    joins: dict[str, int] = {}
    graph = {}
    for place, text in instructions.items():
        found = RECONVERGENCE.search(text)
        targets = []
        if BRANCHES.search(text):
            targets = [int(TARGET.findall(text)[-1], 16)]
        elif found is not None and found[1] == "BSSY":
            joins[found[2]] = int(TARGET.findall(text)[-1], 16)
        elif found is not None and found[2] in joins:
            targets = [joins[found[2]]]
        if place in following and not ENDS.match(text) and not JUMP.match(text):
            targets = [*targets, following[place]]
        graph[place] = [target for target in targets if target in instructions]
    return graph


def reached(graph: Graph, start: int, without: int | None) -> set[int]:
    """What can be reached from ``start`` when ``without`` is gone."""
    seen, left = set(), [start]
    while left:
        place = left.pop()
        if place not in seen and place != without:
            seen.add(place)
            left += graph[place]
    return seen


def loops(graph: dict[int, list[int]]) -> list[set[int]]:
    """Every natural loop: a branch back to an instruction that it cannot be reached without, and
    what lies on the way from there."""
    backwards: dict[int, list[int]] = {place: [] for place in graph}
    for place, targets in graph.items():
        for target in targets:
            backwards[target].append(place)
    found: dict[int, set[int]] = {}
    for place, targets in graph.items():
        for head in targets:
            if head <= place and place not in reached(graph, min(graph), head):
                body = {head} if head == place else reached(backwards, place, head) | {head}
                found[head] = found.get(head, set()) | body
    return list(found.values())


def main_loops(code: str) -> tuple[int, int]:
    """Innermost loops of a kernel's code that multiply matrices, and instructions on floats in
    them."""
    instructions = {int(at, 16): text.strip() for at, text in INSTRUCTION.findall(code)}
    bodies = [
        body
        for body in loops(successors(instructions))
        if any(MULTIPLIES.search(instructions[place]) for place in body)
    ]
    innermost = [body for body in bodies if not any(other < body for other in bodies)]
    floats = sum(bool(FLOATS.search(instructions[place])) for body in innermost for place in body)
    return len(innermost), floats
