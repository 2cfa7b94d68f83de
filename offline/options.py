# SPDX-License-Identifier: Apache-2.0
"""Validation of a command's options."""

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from smoothrot_vllm.errors import ConfigError

MOST = (1 << 31) - 1
"""Of any count that is an option: torch's own sizes end not far above."""

Options = TypeVar("Options", bound=BaseModel)


def make_options(kind: type[Options], command: str, options: dict[str, Any]) -> Options:
    """The validated options of ``command``.

    Raises:
        ConfigError: an unknown option or a value out of range; the message names each.
    """
    try:
        return kind(**options)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, e['loc']))}: {e['msg']}, got {e['input']!r}"
            for e in error.errors()
        )
        raise ConfigError(f"{command} options: {problems}") from None
