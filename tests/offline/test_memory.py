# SPDX-License-Identifier: Apache-2.0
"""What the system says a conversion held at most: a few layers' worth, however many there are, and no more than was planned."""

from pathlib import Path

from convert import OPTIONS, command, make_model

SIZES = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "vocab_size": 4096}
LAYER_BYTES = 2 * (2 * 512 * 512 + 2 * 512 * 512 + 3 * 512 * 2048)
"""Of one decoder layer in the source."""


def test_peak_memory_does_not_grow_with_layers_and_is_planned(tmp_path: Path) -> None:
    measured = {}
    for layers in (2, 8):
        source = make_model(tmp_path / f"source{layers}", SIZES | {"num_hidden_layers": layers}, random=True)
        planned, _ = command("plan", str(source), *OPTIONS, "--shard-mib", "4")
        _, used = command("run", str(source), str(tmp_path / f"out{layers}"), *OPTIONS, "--shard-mib", "4")
        measured[layers] = used["peak_rss_bytes"]
        assert measured[layers] <= planned["memory_bytes"] <= 1.25 * measured[layers]
    # Six layers more, kept in any form larger than the 4-bit codes, would be more.
    assert measured[8] - measured[2] < 3 * LAYER_BYTES
