# SPDX-License-Identifier: Apache-2.0
"""What a report holds: the conditions of its measurements, and each directory's."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from smoothrot_offline.options import MOST


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ReportConfig(_Record):
    """Options of ``smoothrot-convert report``; what is not asked for is not measured."""

    texts: tuple[str, ...] = ()
    seqlen: int = Field(default=2048, ge=2, le=MOST)
    limit_chunks: int | None = Field(default=None, ge=1, le=MOST)
    tasks: tuple[str, ...] = ()
    include_path: str | None = None
    limit: int | None = Field(default=None, ge=1, le=MOST)
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    speed: bool = True
    prompt_tokens: int = Field(default=128, ge=1, le=MOST)
    new_tokens: int = Field(default=16, ge=1, le=MOST)
    rounds: int = Field(default=5, ge=1, le=MOST)


class SizeRecord(_Record):
    """Bytes of the weight files on disk, bytes of the same model with 16 bits a weight, and their
    ratio.

    ``linears_ratio`` is that of the decoder's linear layers alone, for a converted directory.
    """

    disk_bytes: int
    sixteen_bit_bytes: int
    ratio: float
    linears_ratio: float | None


class PerplexityRecord(_Record):
    """Perplexity on one text in windows that do not overlap, tail included; ``nll`` in nats for
    each predicted token."""

    perplexity: float
    nll: float
    tokens: int
    chunks: int
    bos_in_each_chunk: bool


class TaskScore(_Record):
    """One metric of one lm-eval task, with its standard error where lm-eval gives one."""

    task: str
    metric: str
    value: float
    standard_error: float | None
    samples: int


class SpeedRecord(_Record):
    """Medians of the rounds, tokens a second, and their ratios to the first directory's; every
    round's in ``rounds_*``."""

    prefill: float
    decode: float
    prefill_ratio: float
    decode_ratio: float
    rounds_prefill: list[float]
    rounds_decode: list[float]


class SpeedConditions(_Record):
    """What the speeds are of."""

    method: str
    threads: int
    kernel: str


class DirectoryRecord(_Record):
    """One directory; ``kind`` is plain, SmoothRot or the name of another quantisation method,
    ``conversion`` the options in the manifest of a SmoothRot one."""

    directory: str
    kind: str
    architecture: str
    dtype: str
    size: SizeRecord
    conversion: dict[str, Any] | None
    perplexity: dict[str, PerplexityRecord]
    tasks: list[TaskScore]
    speed: SpeedRecord | None


class Report(_Record):
    """The whole report; directories in the order they were given."""

    report_version: Literal[1] = 1
    config: ReportConfig
    packages: dict[str, str]
    speed_conditions: SpeedConditions | None
    directories: list[DirectoryRecord]
