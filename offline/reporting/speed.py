# SPDX-License-Identifier: Apache-2.0
"""Tokens a second of several loaded models, side by side: each round runs every model, so that a
drift hits them alike."""

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from smoothrot_offline.foreign_models import load_config
from smoothrot_offline.progress import ProgressCallback
from smoothrot_offline.reporting.record import SpeedConditions, SpeedRecord
from smoothrot_vllm import ops
from smoothrot_vllm.errors import ConfigError

METHOD = (
    "batch 1, through the forward pass of transformers with its key-value cache, in this process:"
    " prefill is one pass over {prompt} tokens, decode is {new} greedy steps of one token after it."
    " Quantised linears run on this project's compiled kernels, everything else on torch's. This is"
    " no serving speed: vLLM batches, and has other attention kernels. Medians of {rounds} rounds"
    " after one to warm up; each round runs every directory in turn"
)


def check_context(directory: Path, prompt_tokens: int, new_tokens: int) -> None:
    """Refuse to measure beyond the model's context, which its config.json gives.

    Raises:
        ConfigError: ``prompt_tokens + new_tokens`` exceeds ``max_position_embeddings``.
    """
    context = load_config(directory).get_text_config().max_position_embeddings
    if prompt_tokens + new_tokens > context:
        raise ConfigError(
            f"{directory}: --prompt-tokens {prompt_tokens} and --new-tokens {new_tokens}: expected"
            f" at most the model's context of {context} together. Choose fewer, or --no-speed."
        )


def measure_speed(
    models: Mapping[str, PreTrainedModel],
    prompt_tokens: int,
    new_tokens: int,
    rounds: int,
    progress: ProgressCallback,
) -> dict[str, SpeedRecord]:
    """Prefill and decode speed of each model; ratios are to the first. Tokens are arbitrary:
    their values cost no time."""
    prefill: dict[str, list[float]] = {name: [] for name in models}
    decode: dict[str, list[float]] = {name: [] for name in models}
    for number in range(rounds + 1):
        progress(f"speed, round {number} of {rounds}", number, rounds + 1)
        for name, model in models.items():
            seconds = _one_round(model, prompt_tokens, new_tokens)
            if number:
                prefill[name].append(prompt_tokens / seconds[0])
                decode[name].append(new_tokens / seconds[1])
    first = next(iter(models))
    return {
        name: SpeedRecord(
            prefill=statistics.median(prefill[name]),
            decode=statistics.median(decode[name]),
            prefill_ratio=_ratio(prefill[name], prefill[first]),
            decode_ratio=_ratio(decode[name], decode[first]),
            rounds_prefill=prefill[name],
            rounds_decode=decode[name],
        )
        for name in models
    }


def speed_conditions(prompt_tokens: int, new_tokens: int, rounds: int) -> SpeedConditions:
    """What :func:`measure_speed` measures, in words, and what it runs on."""
    method = METHOD.format(prompt=prompt_tokens, new=new_tokens, rounds=rounds)
    return SpeedConditions(method=method, threads=torch.get_num_threads(), kernel=ops.kernel_name())


@torch.inference_mode()
def _one_round(model: PreTrainedModel, prompt_tokens: int, new_tokens: int) -> tuple[float, float]:
    """Seconds of prefill and of all decode steps."""
    prompt = torch.arange(prompt_tokens)[None] % model.config.get_text_config().vocab_size
    started = time.perf_counter()
    output = model(prompt, use_cache=True, logits_to_keep=1)
    prefilled = time.perf_counter()
    for _ in range(new_tokens):
        output = model(
            output.logits[:, -1:].argmax(dim=-1),
            past_key_values=output.past_key_values,
            use_cache=True,
        )
    return prefilled - started, time.perf_counter() - prefilled


def _ratio(own: Sequence[float], reference: Sequence[float]) -> float:
    return statistics.median(own) / statistics.median(reference)
