# SPDX-License-Identifier: Apache-2.0
"""vLLM's engine with one set of arguments after another, in this one process, which starts but
once.

Reads ``{name: {"model": directory, "use": name of a function below, "arguments": {...}, "data":
...}}`` from standard input as
JSON, and writes to the file that is its argument what came of each: ``{name: {"found": ...} or
{"error": "Type: message"}}``.
"""

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from vllm import LLM, SamplingParams
from vllm.inputs import EmbedsPrompt, TokensPrompt
from vllm.sampling_params import BeamSearchParams, StructuredOutputsParams

TOKENS = 6


def sampling(count: int = TOKENS, **options: Any) -> SamplingParams:
    """Greedy unless told otherwise, ends of text included."""
    return SamplingParams(
        **{
            "temperature": 0,
            "max_tokens": count,
            "ignore_eos": True,
            "detokenize": False,
            **options,
        }
    )


def run(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> list[Any]:
    """What the engine returns for each prompt."""
    return llm.generate(
        [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts], params, use_tqdm=False
    )


def tokens(llm: LLM, prompts: list[list[int]], times: int = 1) -> Any:
    """Greedy continuations, of the last of several times."""
    for _ in range(times):
        found = run(llm, prompts, sampling())
    return [list(output.outputs[0].token_ids) for output in found]


def twice(llm: LLM, prompts: list[list[int]]) -> Any:
    """Greedy continuations of prompts that the prefix cache knows, and what is sampled by
    default."""
    params = llm.get_default_sampling_params()
    return {
        "tokens": tokens(llm, prompts, times=2),
        "default": {"temperature": params.temperature, "top_p": params.top_p},
    }


def first_logprobs(llm: LLM, prompts: list[list[int]]) -> Any:
    """Log-probabilities of the whole vocabulary for the second token of each continuation, and
    its first token."""
    found = run(llm, prompts, sampling(2, logprobs=-1))
    steps: Any = [output.outputs[0] for output in found]
    return [
        {
            "first": step.token_ids[0],
            "logprobs": [step.logprobs[1][token].logprob for token in range(len(step.logprobs[1]))],
        }
        for step in steps
    ]


def requests(llm: LLM, prompts: list[list[int]]) -> Any:
    """What single requests can ask for."""
    several = run(llm, prompts, sampling(n=3, temperature=1.0, seed=7, logprobs=0))
    scored = run(llm, prompts, sampling(1, prompt_logprobs=0))
    beams = llm.beam_search(
        [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts],
        BeamSearchParams(beam_width=3, max_tokens=3, ignore_eos=True),
    )
    choice = sampling(
        8,
        structured_outputs=StructuredOutputsParams(choice=["yes", "no"]),
        ignore_eos=False,
        detokenize=True,
    )
    return {
        "sampled": [
            [
                {
                    "tokens": list(o.token_ids),
                    "logprobs": [next(iter(s.values())).logprob for s in o.logprobs],
                }
                for o in output.outputs
            ]
            for output in several
        ],
        "prompt_logprobs": [
            [
                step[token].logprob
                for step, token in zip(o.prompt_logprobs[1:], prompt[1:], strict=True)
            ]
            for o, prompt in zip(scored, prompts, strict=True)
        ],
        "beams": [
            list(output.sequences[0].tokens)[len(prompt) :]
            for output, prompt in zip(beams, prompts, strict=True)
        ],
        "chosen": [output.outputs[0].text for output in run(llm, prompts, choice)],
    }


def drafted(llm: LLM, data: dict[str, Any]) -> Any:
    """Greedy continuations of some length, and how many drafts were made and how many of their
    tokens kept."""
    found = run(llm, data["prompts"], sampling(data["tokens"]))
    counted: Any = {metric.name: metric for metric in llm.get_metrics()}
    return {
        "tokens": [list(output.outputs[0].token_ids) for output in found],
        **{
            name: counted[f"vllm:spec_decode_num_{name}"].value
            for name in ("drafts", "accepted_tokens")
            if f"vllm:spec_decode_num_{name}" in counted
        },
    }


def embeddings(llm: LLM, prompts: list[list[int]]) -> Any:
    """Of a model that is served for pooling."""
    outputs = llm.embed(
        [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts], use_tqdm=False
    )
    return [output.outputs.embedding for output in outputs]


def embedded_prompts(llm: LLM, data: dict[str, Any]) -> Any:
    """Greedy continuations of prompts as tokens, and as what a source's embedding makes of them."""
    (file,) = Path(data["source"]).glob("*.safetensors")
    with safe_open(file, framework="pt") as source:
        table = source.get_tensor("model.embed_tokens.weight").float()
    prompts = [
        EmbedsPrompt(prompt_embeds=table[torch.tensor(prompt)] * data["scale"])
        for prompt in data["prompts"]
    ]
    outputs = llm.generate(prompts, sampling(), use_tqdm=False)
    return {
        "tokens": tokens(llm, data["prompts"]),
        "embeds": [list(output.outputs[0].token_ids) for output in outputs],
    }


def saved_sharded(llm: LLM, out: str) -> Any:
    """The engine's own copy of its weights."""
    llm.llm_engine.model_executor.save_sharded_state(path=out)
    return sorted(path.name for path in Path(out).glob("*.safetensors"))


def reloads(llm: LLM, data: dict[str, Any]) -> Any:
    """Greedy continuations after each directory is loaded in place of the last, or what that
    raised."""
    found = {"": tokens(llm, data["prompts"])}
    for name, directory in data["directories"].items():
        try:
            llm.collective_rpc("reload_weights", kwargs={"weights_path": directory})
            found[name] = tokens(llm, data["prompts"])
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
            try:
                found[f"{name}, after"] = tokens(llm, data["prompts"])
            except Exception as after:
                found[f"{name}, after"] = f"{type(after).__name__}: {after}"
    return found


USES: dict[str, Callable[[LLM, Any], Any]] = {
    use.__name__: use
    for use in (
        tokens,
        twice,
        first_logprobs,
        requests,
        drafted,
        embeddings,
        embedded_prompts,
        saved_sharded,
        reloads,
    )
}


def result(case: dict[str, Any]) -> dict[str, Any]:
    """What came of one case."""
    arguments = {
        "dtype": "float32",
        "max_model_len": 256,
        "enforce_eager": True,
        **case["arguments"],
    }
    try:
        return {"found": USES[case["use"]](LLM(case["model"], **arguments), case["data"])}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        gc.collect()


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(
        json.dumps({name: result(case) for name, case in json.load(sys.stdin).items()})
    )
