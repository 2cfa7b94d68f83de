# SPDX-License-Identifier: Apache-2.0
"""Every error the project raises on purpose.

A message says what failed, where (file, tensor, layer or option), what was expected, what was got,
and what to do about it.
"""


class SmoothRotError(Exception):
    """Base of every deliberate error: catch this one to catch them all."""


class ConfigError(SmoothRotError, ValueError):
    """An option or a configuration value is unknown, out of range or contradicts another."""


class CheckpointError(SmoothRotError):
    """A checkpoint on disk is missing, truncated, malformed or holds unusable values."""


class OutputError(CheckpointError):
    """The output cannot be written: no space, no permission, or a failing disk."""


class ResumeError(ConfigError):
    """An interrupted conversion cannot go on: it was another one, or its files are not those
    that were written."""


class DeviceMemoryError(SmoothRotError):
    """A GPU has too little memory for what was asked of it."""


class UnsupportedModelError(SmoothRotError):
    """The model's architecture or one of its sizes cannot be converted or served."""


class UnsupportedPlatformError(SmoothRotError):
    """The CPU, the GPU, or the installed vLLM lacks what was asked for."""
