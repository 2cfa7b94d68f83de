# SPDX-License-Identifier: Apache-2.0
"""Several vision-language checkpoints served by vLLM's own engine, one after another, in this one
process, which starts but once.

Reads ``{directory: {"prompts": [text, ...], "images": number, "videos": bool}}`` from standard
input as JSON. Each of the first ``images`` prompts has a random image. Writes to the file that is
its argument, for each prompt, the inputs that transformers' own processor makes of it, and the
tokens that vLLM read and continued with: ``{directory: [{"inputs": {...}, "prompt": [...],
"tokens": [...], "logprobs": [...]}, ...]}``. With no images, and no ``videos``, the model is served
for text alone. Where vLLM ends with an error, ``{directory: error}``.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import AutoProcessor
from vllm import LLM, SamplingParams

TOKENS = 4
SIDE = 32


def continuations(
    directory: str, prompts: list[str], images: int, videos: bool = True
) -> list[dict[str, Any]]:
    """Greedy continuations, ends of text included."""
    random = np.random.default_rng(0)
    pictures = [
        Image.fromarray(random.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
        for _ in range(images)
    ]
    limits: dict[str, int] = {"image": 1 if images else 0}
    if not videos:
        limits["video"] = 0
    llm = LLM(
        directory,
        dtype="float32",
        max_model_len=256,
        enforce_eager=True,
        limit_mm_per_prompt=limits,
    )
    sampling = SamplingParams(
        temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=1, detokenize=False
    )
    asked: list[Any] = [
        {"prompt": prompt, "multi_modal_data": {"image": picture}}
        for prompt, picture in zip(prompts, pictures, strict=False)
    ] + prompts[images:]
    processor = AutoProcessor.from_pretrained(directory)
    found = []
    for index, output in enumerate(llm.generate(asked, sampling, use_tqdm=False)):
        seen = {"images": pictures[index]} if index < images else {}
        inputs = processor(text=prompts[index], return_tensors="pt", **seen)
        (completion,) = output.outputs
        tokens = list(completion.token_ids)
        steps: Any = completion.logprobs
        found.append(
            {
                "inputs": {name: tensor.tolist() for name, tensor in inputs.items()},
                "prompt": output.prompt_token_ids,
                "tokens": tokens,
                "logprobs": [
                    step[token].logprob for step, token in zip(steps, tokens, strict=True)
                ],
            }
        )
    return found


if __name__ == "__main__":
    answers: dict[str, Any] = {}
    for model, asked in json.load(sys.stdin).items():
        try:
            answers[model] = continuations(model, **asked)
        except Exception as error:
            answers[model] = f"{type(error).__name__}: {error}"
    Path(sys.argv[1]).write_text(json.dumps(answers))
