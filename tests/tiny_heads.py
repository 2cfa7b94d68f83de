# SPDX-License-Identifier: Apache-2.0
"""Tiny models of a made-up language, and heads that draft for them, all trained in seconds."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, OWN_SIZES, byte_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from smoothrot_offline.source.resolve import SUPPORTED

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


class MtpHead(nn.Module):
    """What vLLM's ``Qwen3_5MTP`` computes, but for embedding and output head, which are the
    model's: an embedding and what the model's final norm gives out become what that norm gives out
    next, by the family's own layer of full attention. Tensors are named as a checkpoint has them,
    after ``mtp.``."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        decoder = model.get_decoder()
        config, norm = decoder.config, type(decoder.norm)
        place = config.layer_types.index("full_attention")
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.pre_fc_norm_hidden, self.pre_fc_norm_embedding, self.norm = (
            norm(config.hidden_size, eps=config.rms_norm_eps) for _ in range(3)
        )
        self.layers = nn.ModuleList([type(decoder.layers[place])(config, place)])
        self._rotary = type(decoder.rotary_emb)(config)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if "norm" in name:  # multiplies by one more
                    parameter.uniform_(-0.5, 0.5)
                else:
                    parameter.normal_(std=parameter.shape[-1] ** -0.5)

    def forward(self, embedded: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """As that of :class:`EagleHead`."""
        read = [self.pre_fc_norm_embedding(embedded), self.pre_fc_norm_hidden(hidden)]
        length = hidden.shape[1]
        mask = torch.full((length, length), -torch.inf, dtype=hidden.dtype).triu(1)
        out = self.layers[0](
            self.fc(torch.cat(read, -1)),
            attention_mask=mask[None, None],
            position_embeddings=self._rotary(hidden, torch.arange(length)[None]),
        )
        return self.norm(out)


def trained_model(language: Language, family: str, steps: int) -> PreTrainedModel:
    """A two-layer model that has learned the language, with norm weights far from one."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "tie_word_embeddings": True,
        "initializer_range": 0.08,
    }
    config = FAMILIES[family](**sizes | OWN_SIZES.get(family, {}))
    model = AutoModelForCausalLM.from_config(config)
    offset = SUPPORTED[config.model_type].norm_offset
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and "linear_attn" not in name:
                parameter.uniform_(0.5, 1.5).sub_(offset)

    def loss() -> torch.Tensor:
        texts = language.texts(BATCH, LENGTH)
        return model(texts, labels=texts).loss

    train(model, loss, steps)
    return model


def train_head(head: nn.Module, model: PreTrainedModel, language: Language, steps: int) -> None:
    """Teach a head what the model's next hidden states and tokens are."""
    model.requires_grad_(False)

    def loss() -> torch.Tensor:
        texts = language.texts(BATCH, LENGTH)
        hidden = model.model(texts).last_hidden_state
        target = hidden[:, 1:]
        found = head(model.model.embed_tokens(texts[:, 1:]), hidden[:, :-1])
        answers = model.lm_head(target).softmax(-1)
        said = model.lm_head(found).log_softmax(-1)
        return nn.functional.smooth_l1_loss(found, target) - (answers * said).sum(-1).mean()

    train(head, loss, steps)


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


def save_model(model: PreTrainedModel, directory: Path) -> Path:
    model.bfloat16().save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def add_own_head(head: MtpHead, directory: Path) -> Path:
    """Store a head with the saved model that it drafts for."""
    file = directory / "model.safetensors"
    tensors = load_file(file) | {
        f"mtp.{name}": tensor.detach().bfloat16() for name, tensor in head.state_dict().items()
    }
    save_file(tensors, file, metadata={"format": "pt"})
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
