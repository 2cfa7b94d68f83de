# SPDX-License-Identifier: Apache-2.0
"""The peak memory of a conversion does not grow with the number of decoder layers, and is what
the plan says or less."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest

from benchmarks.support.random_models import make_model

HIDDEN, WIDE, VOCABULARY = 384, 1536, 1024
LAYER_WEIGHTS = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * WIDE
SHAPE = {
    "hidden_size": HIDDEN,
    "intermediate_size": WIDE,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "vocab_size": VOCABULARY,
}
# Freed blocks go back to the system at once: what is resident is what is in use. As the command
# line sets the allocator, it keeps blocks for the next tensor, and how many of them fit is luck:
# ten more layers then grew the peak by 1 to 32 MB.
GIVE_BACK = {
    "GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=65536:glibc.malloc.trim_threshold=131072"
}
ALLOCATORS: dict[str, dict[str, str]] = {"gives back": GIVE_BACK, "as the command line": {}}
FEW, MANY = 4, 14
# 8-bit weights: without the search for their scales a layer takes half the time, and its output
# twice the memory.
PLAIN = {"scales": "none", "weight_bits": 8}
CASES: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "calibrated": {**PLAIN, "scales": "l2", "calib_samples": 4, "calib_seqlen": 128},
}

# Converts in forked children, so that torch is imported once. A fork begins without the pages of
# libraries, which a first, small conversion brings back: what it grows by after that is the
# conversion's own. A plan's measurements of speed take memory too, but in another process, as a
# rule; and there is no tokenizer here.
DRIVER = """
import json, os, resource, sys, tempfile
from pathlib import Path
import torch
import smoothrot_offline.decide.stages
import smoothrot_offline.check.plan
import smoothrot_offline.check.admit
from smoothrot_offline.source.checkpoint import open_checkpoint
from smoothrot_offline.config import make_config
from smoothrot_offline.convert import convert
from smoothrot_offline.console import reuse_freed_memory
from smoothrot_offline.check.plan import plan_conversion

torch.set_num_threads(1)
smoothrot_offline.check.plan.seconds = lambda *_: 0.0
smoothrot_offline.check.admit.check_calibration = lambda *_: None
smoothrot_offline.decide.stages.load_calibration = lambda _text, _model, samples, seqlen, *_: (
    torch.arange(samples * seqlen).reshape(samples, seqlen) * 31 % 1024
)
first, *sources = map(Path, sys.argv[3:])
every = json.loads(sys.argv[2])
for options, source in ((options, source) for options in every for source in sources):
    config = make_config(**options)
    folder = Path(tempfile.mkdtemp(dir=source.parent))
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if sys.argv[1] == "as the command line":
                reuse_freed_memory()
            convert(first, folder / "first", config)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            planned = plan_conversion(open_checkpoint(source), config).memory_bytes
            os.write(writer, json.dumps({"before": before, "planned": planned}).encode())
            convert(source, folder / "out", config)
            status = 0
        finally:
            os._exit(status)
    _, status, used = os.wait4(child, 0)
    assert status == 0, status
    print(json.dumps(json.loads(os.read(reader, 1 << 16)) | {"peak": used.ru_maxrss * 1024}))
"""

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="ru_maxrss counts other units elsewhere"
)


@dataclass(frozen=True)
class Used:
    """Bytes of one conversion's process: resident before it, at its peak, and what the plan had
    said of the peak."""

    before: int
    peak: int
    planned: int


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[Used, Used]]:
    """By allocator and case, what the conversion of a model of ``FEW`` layers uses, and that of
    ``MANY``."""
    folder = tmp_path_factory.mktemp("memory")
    text = folder / "text"
    text.write_text(
        "of no matter"
    )  # text that the model writes itself would have it in memory as a whole
    sources = [
        make_model(
            folder / "first", {**SHAPE, "hidden_size": 64, "intermediate_size": 64}, random=True
        ),
        *(
            make_model(folder / str(layers), {**SHAPE, "num_hidden_layers": layers}, random=True)
            for layers in (FEW, MANY)
        ),
    ]
    options = json.dumps([own | {"calib": str(text)} for own in CASES.values()])
    found = {}
    for allocator, tunables in ALLOCATORS.items():
        command = [sys.executable, "-c", DRIVER, allocator, options, *map(str, sources)]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
            env=os.environ | tunables,
        )
        assert done.returncode == 0, done.stderr
        few_many = [Used(**json.loads(line)) for line in done.stdout.splitlines()]
        for case, few, many in zip(CASES, few_many[::2], few_many[1::2], strict=True):
            found[allocator, case] = few, many
    return found


@pytest.mark.parametrize("case", CASES)
def test_the_peak_is_that_of_one_layer_however_many_there_are(
    used: dict[tuple[str, str], tuple[Used, Used]], case: str
) -> None:
    few, many = used["gives back", case]
    # Of ten more layers the source has 47 MB, the output 24 MB, and the folds in float64 189 MB:
    # none of them stays.
    assert many.peak - few.peak < 8 * LAYER_WEIGHTS


@pytest.mark.parametrize("case", CASES)
def test_the_plan_covers_the_peak_and_is_of_its_size(
    used: dict[tuple[str, str], tuple[Used, Used]], case: str
) -> None:
    for found in used["as the command line", case]:
        assert found.peak <= found.planned
        # Of what is added to a process that has torch loaded, which alone is most of so small a
        # conversion's peak.
        assert found.planned - found.before <= 3 * (found.peak - found.before)
