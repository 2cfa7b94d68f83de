# SPDX-License-Identifier: Apache-2.0
"""Several checkpoints served by vLLM's own engine, one after another, in this one process, which
starts but once.

Reads ``{directory: [[token, ...], ...]}`` from standard input as JSON, and writes to the file that
is its argument what each
prompt is continued with, and how often the engine called the op that takes the activation of an MLP
along: ``{directory: {"continuations": [{"tokens": [...], "logprobs": [...]}, ...],
"silu_mul_linear_calls": number}}``.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt

from smoothrot_vllm import ops

TOKENS = 4
silu_mul_linear = ops.silu_mul_linear
calls: list[None] = []


def counted(*arguments: Any) -> torch.Tensor:
    """The op, counted."""
    calls.append(None)
    return silu_mul_linear(*arguments)


def continuations(directory: str, prompts: list[list[int]]) -> dict[str, Any]:
    """Greedy continuations, ends of text included, and the calls they took."""
    before = len(calls)
    llm = LLM(directory, dtype="float32", max_model_len=256, enforce_eager=True)
    sampling = SamplingParams(
        temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=1, detokenize=False
    )
    outputs = llm.generate(
        [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts], sampling, use_tqdm=False
    )
    found = []
    for output in outputs:
        (completion,) = output.outputs
        tokens = list(completion.token_ids)
        steps: Any = completion.logprobs
        logprobs = [step[token].logprob for step, token in zip(steps, tokens, strict=True)]
        found.append({"tokens": tokens, "logprobs": logprobs})
    return {"continuations": found, "silu_mul_linear_calls": len(calls) - before}


if __name__ == "__main__":
    ops.silu_mul_linear = counted  # type: ignore[assignment]
    answers = {
        directory: continuations(directory, prompts)
        for directory, prompts in json.load(sys.stdin).items()
    }
    Path(sys.argv[1]).write_text(json.dumps(answers))
