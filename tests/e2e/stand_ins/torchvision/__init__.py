# SPDX-License-Identifier: Apache-2.0
"""Stands in for torchvision, which vLLM's module of Qwen3.5 imports for images and which this
environment leaves out (``requirements/relock.py``). Any of its modules can be imported and any of
its names mentioned; text needs no more, and nothing can be computed with them."""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__version__ = "0.28.0"


class Unusable:
    """What any name stands for."""

    def __getattr__(self, name: str) -> "Unusable":
        return _mention(name)


def _mention(name: str) -> Unusable:
    if name.startswith("__"):
        raise AttributeError(name)
    return Unusable()


class _Modules(MetaPathFinder, Loader):
    """Finds every module within this package."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        inside = fullname.startswith(f"{__name__}.")
        return ModuleSpec(fullname, self, is_package=True) if inside else None

    def exec_module(self, module: ModuleType) -> None:
        module.__getattr__ = _mention  # type: ignore[method-assign]


sys.meta_path.append(_Modules())
