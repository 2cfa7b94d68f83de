# SPDX-License-Identifier: Apache-2.0
"""What a vision-language model must say about itself: where its text tower is, and what is around
it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from smoothrot_offline.source.architecture import Architecture


@dataclass(frozen=True)
class SmallImage:
    """The small model that a table is proven on, and an image for it.

    ``vision`` and ``outer`` are keys of ``vision_config`` and of the configuration around it; a
    text as value names the key of the text tower's configuration whose value it is. ``pixels`` is
    the shape of the image, ``tokens`` how many it is in the text, ``beside`` what else the model
    is called with; ``types`` names the argument that tells tokens of images from those of text.
    ``audio`` are keys of ``audio_config``, of a model that has one.
    """

    vision: Mapping[str, Any]
    outer: Mapping[str, Any]
    pixels: tuple[int, ...]
    tokens: int
    beside: Mapping[str, Any] = field(default_factory=dict)
    types: str = ""
    audio: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Composite:
    """A model around a text tower of a supported family. Names are those a conversion stores."""

    model_type: str
    class_name: str
    text: tuple[Architecture, ...]
    """Families of the text tower; the first is meant where ``text_config`` names none."""
    tower: str
    """Module of the text tower: its embedding, layers and final norm."""
    kept: tuple[str, ...]
    """Modules beside it, which stay 16-bit: the towers of images and of sound, the projectors."""
    image: SmallImage
    writers: tuple[str, ...] = ()
    """Patterns of the linears among those that write into the residual stream."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Beginnings of other names that checkpoints or transformers' modules have, with those that are
    stored; the first that fits counts."""
    settings: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """As those of an :class:`Architecture`, of the configuration around the text tower's."""
    text_settings: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """As ``settings``, of the text tower's configuration: what matters to images alone."""

    def place(self, table: Architecture) -> Architecture:
        """The table of a text tower's family with the names that it has within this model."""
        return replace(
            table,
            model_type=self.model_type,
            class_name=self.class_name,
            layers=f"{self.tower}.layers",
            embedding=f"{self.tower}.embed_tokens",
            final_norm=f"{self.tower}.norm",
            beside={
                f"{self.tower}.{name.removeprefix('model.')}": of
                for name, of in table.beside.items()
            },
        )

    def stored_name(self, name: str) -> str:
        """The stored name of a tensor of a checkpoint or of transformers' model."""
        for old, new in self.renamed.items():
            if name.startswith(old):
                return new + name.removeprefix(old)
        return name

    def keeps(self, name: str) -> bool:
        """Whether a stored tensor is beside the text tower."""
        return name.startswith(tuple(f"{module}." for module in self.kept))

    def writes(self, name: str) -> bool:
        """Whether a stored tensor is one of a linear that writes into the residual stream."""
        module = name.rpartition(".")[0]
        return any(fnmatchcase(module, writer) for writer in self.writers)
