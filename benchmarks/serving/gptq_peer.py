# SPDX-License-Identifier: Apache-2.0
"""A W4A16 checkpoint rounded by GPTQ, as vLLM's users make one: llm-compressor's own recipe.

llm-compressor wants other versions than vLLM, so it runs in an environment of its own:

    pip install llmcompressor
    python benchmarks/serving/gptq_peer.py MODEL OUT --calib CALIB.txt --group-size 64
"""

import argparse
from pathlib import Path


def main() -> None:
    """Round the model and write it in compressed-tensors format."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    args = parse_arguments()
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
    tokens = tokenizer(args.calib.read_text())["input_ids"]
    length = args.seqlen
    starts = range(0, min(len(tokens) // length, args.samples) * length, length)
    sequences = [tokens[start : start + length] for start in starts]
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": args.group_size,
    }
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto", trust_remote_code=False)
    oneshot(
        model=model,
        dataset=Dataset.from_dict(
            {"input_ids": sequences, "attention_mask": [[1] * length] * len(sequences)}
        ),
        recipe=GPTQModifier(
            config_groups={"group_0": {"targets": ["Linear"], "weights": weights}},
            ignore=["lm_head"],
        ),
        max_seq_length=length,
        num_calibration_samples=len(sequences),
    )
    model.save_pretrained(args.out, save_compressed=True)
    tokenizer.save_pretrained(args.out)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", type=Path, help="16-bit directory")
    add("out", type=Path, help="directory to make")
    add("--calib", type=Path, required=True, help="calibration text")
    add("--group-size", type=int, default=128, help="must divide the inputs of every linear")
    add("--samples", type=int, default=64)
    add("--seqlen", type=int, default=512)
    return parser.parse_args()


if __name__ == "__main__":
    main()
