# SPDX-License-Identifier: Apache-2.0
"""A tiny model of a made-up language, and an EAGLE head that drafts for it, both trained in
seconds."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_models import byte_tokenizer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

SYMBOLS, RULE, LENGTH, BATCH = 32, 0.9, 64, 24
FIRST = 32
"""The language's first symbol, as a token of the tests' tokenizer: an A."""


@dataclass(frozen=True)
class Language:
    """The next symbol follows from the last two by a fixed table, but for one in ten."""

    table: torch.Tensor
    generator: torch.Generator

    @classmethod
    def made_up(cls) -> "Language":
        generator = torch.Generator().manual_seed(0)
        table = torch.randint(SYMBOLS, (SYMBOLS, SYMBOLS), generator=generator)
        return cls(table, generator)

    def texts(self, count: int, length: int) -> torch.Tensor:
        """Token ids, int64 ``(count, length)``."""
        draw = torch.randint(SYMBOLS, (count, length), generator=self.generator)
        ruled = torch.rand(count, length, generator=self.generator) < RULE
        for i in range(2, length):
            follows = self.table[draw[:, i - 2], draw[:, i - 1]]
            draw[:, i] = torch.where(ruled[:, i], follows, draw[:, i])
        return draw + FIRST


class EagleHead(nn.Module):
    """What vLLM's ``EagleLlamaForCausalLM`` computes: an embedding and a hidden state become the
    next hidden state, by one layer without its first norm."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.layers = nn.ModuleList([LlamaDecoderLayer(config, 0)])
        self.layers[0].input_layernorm = nn.Identity()
        self._rotary = LlamaRotaryEmbedding(config)

    def forward(self, embedded: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states that follow ``hidden (batch, length, size)`` and the tokens whose embedding
        ``embedded`` of the same shape is."""
        length = hidden.shape[1]
        mask = torch.full((length, length), -torch.inf, dtype=hidden.dtype).triu(1)
        out: torch.Tensor = self.layers[0](
            self.fc(torch.cat([embedded, hidden], -1)),
            attention_mask=mask[None, None],
            position_embeddings=self._rotary(hidden, torch.arange(length)[None]),
        )
        return out


def trained_model(language: Language) -> LlamaForCausalLM:
    """A two-layer Llama that has learned the language, with norm weights far from one."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
        initializer_range=0.08,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)

    def loss() -> torch.Tensor:
        texts = language.texts(BATCH, LENGTH)
        return model(texts, labels=texts).loss

    train(model, loss, 400)
    return model


def trained_head(model: LlamaForCausalLM, language: Language) -> EagleHead:
    """A head that has learned what the model's next hidden states and tokens are."""
    torch.manual_seed(1)
    head = EagleHead(model.config)
    model.requires_grad_(False)

    def loss() -> torch.Tensor:
        texts = language.texts(BATCH, LENGTH)
        hidden = model.model(texts).last_hidden_state
        target = hidden[:, 1:]
        found = head(model.model.embed_tokens(texts[:, 1:]), hidden[:, :-1])
        answers = model.lm_head(target).softmax(-1)
        said = model.lm_head(found).log_softmax(-1)
        return nn.functional.smooth_l1_loss(found, target) - (answers * said).sum(-1).mean()

    train(head, loss, 150)
    return head


def train(module: nn.Module, loss: Callable[[], torch.Tensor], steps: int) -> None:
    """Adam with a rate that falls along a cosine."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def save_model(model: LlamaForCausalLM, directory: Path) -> Path:
    model.bfloat16().save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def save_head(head: EagleHead, config: LlamaConfig, directory: Path) -> Path:
    """As EAGLE heads are published: tensors without the model's prefix, no embedding, no head."""
    directory.mkdir()
    tensors = {
        name: tensor.detach().bfloat16().contiguous() for name, tensor in head.state_dict().items()
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    content = config.to_dict() | {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1}
    (directory / "config.json").write_text(json.dumps(content))
    return directory
