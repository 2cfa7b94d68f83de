# SPDX-License-Identifier: Apache-2.0
"""Several checkpoints served by vLLM's own engine, one after another, in this one process, which starts but once.

Reads ``{directory: [[token, ...], ...]}`` from standard input as JSON, and writes to the file that is its argument what each
prompt is continued with: ``{directory: [{"tokens": [...], "logprobs": [...]}, ...]}``.
"""

import json
import sys
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt

TOKENS = 4


def continuations(directory: str, prompts: list[list[int]]) -> list[dict[str, Any]]:
    """Greedy continuations, ends of text included."""
    llm = LLM(directory, dtype="float32", max_model_len=256, enforce_eager=True)
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=1, detokenize=False)
    outputs = llm.generate([TokensPrompt(prompt_token_ids=prompt) for prompt in prompts], sampling, use_tqdm=False)
    found = []
    for output in outputs:
        (completion,) = output.outputs
        tokens = list(completion.token_ids)
        steps: Any = completion.logprobs
        logprobs = [step[token].logprob for step, token in zip(steps, tokens, strict=True)]
        found.append({"tokens": tokens, "logprobs": logprobs})
    return found


if __name__ == "__main__":
    answers = {directory: continuations(directory, prompts) for directory, prompts in json.load(sys.stdin).items()}
    Path(sys.argv[1]).write_text(json.dumps(answers))
