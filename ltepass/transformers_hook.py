"""Makes transformers know the name "lte" as soon as it is imported, without importing it.

`AutoModelForCausalLM.from_pretrained` looks quantizers up in two tables of `transformers.quantizers.auto`, which
transformers fills in its own source; it has no entry point for others. So `import ltepass` fills them at once where
that module is loaded already, and otherwise leaves one import hook that fills them right after it loads.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

from torch import nn

TABLES = "transformers.quantizers.auto"
_quantizer = ""  # the module that fills them; it stands above this one, which is told its name


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds only TABLES, through the other finders, and imports the quantizer after it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != TABLES:
            return None
        sys.meta_path.remove(self)  # once, and so that the look-up below does not come back here
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            importlib.import_module(_quantizer)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register(quantizer: str) -> None:
    """Idempotent; called by `import ltepass`. quantizer: the module whose import fills the tables."""
    global _quantizer
    _quantizer = quantizer
    if TABLES in sys.modules:
        importlib.import_module(_quantizer)
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def attach(model: nn.Module) -> None:
    """After transform: `model.save_pretrained` writes what `from_pretrained` needs. Nothing to do for other models."""
    if hasattr(model, "save_pretrained") and hasattr(model, "config"):
        importlib.import_module(_quantizer).attach(model)


def detach(model: nn.Module) -> None:
    """After remove: the model saves as the dense model that it is again."""
    if _quantizer in sys.modules:
        importlib.import_module(_quantizer).detach(model)
