"""Makes transformers know the method "lte", so that a folder loads by its name, without `import ltepass`.

`AutoModelForCausalLM.from_pretrained` looks a checkpoint's method up in a table of `transformers.quantizers.auto`,
which transformers fills in its own source; it has no entry point for others. `import torch` calls `install` by the
entry point group `torch.backends`, which `TORCH_DEVICE_BACKEND_AUTOLOAD=0` switches off; `import ltepass` calls it too.

A module of the standard library alone, outside the package: torch is not whole yet when it calls, and every program
that imports torch pays for what stands here. The package is imported when the first checkpoint of ours is read.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

METHOD = "lte"
TORCHAO = "torchao"  # the method under which a model in int8 is saved, for those who have no ltepass
TABLES = "transformers.quantizers.auto"
QUANTIZER = "ltepass.saving.quantizer"  # its import puts the real entries in


class FirstRead:
    """In transformers' table until the first config of ours is read."""

    @staticmethod
    def from_dict(entry: dict[str, object]) -> object:
        return importlib.import_module(QUANTIZER).LTEQuantizationConfig.from_dict(entry)


def install() -> None:
    """Idempotent. It raises nothing, which would end `import torch` in every program; folders then load dense."""
    try:
        if not _filled() and not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
            sys.meta_path.insert(0, _AfterImport())
    except Exception:  # the contract above
        return


def _filled() -> bool:
    """Puts our entry into the table, once that is there."""
    table = getattr(sys.modules.get(TABLES), "AUTO_QUANTIZATION_CONFIG_MAPPING", None)
    if table is None:
        return False
    table.setdefault(METHOD, FirstRead)
    theirs = table.get(TORCHAO)
    if isinstance(theirs, type) and not hasattr(theirs, "hands_on"):
        table[TORCHAO] = type(theirs.__name__, (theirs,), {"from_dict": _from_dict, "hands_on": theirs})
    return True


@classmethod  # type: ignore[misc]  # of the class above
def _from_dict(cls: type, entry: dict[str, object], *args: object, **kwargs: object) -> object:
    """An entry of torchao's that holds one of ours is read by us: it has routers beside its int8 weights."""
    if METHOD in entry:
        return FirstRead.from_dict(entry)
    return cls.hands_on.from_dict(entry, *args, **kwargs)  # type: ignore[attr-defined]


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds only TABLES, through the other finders, to fill the table after it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        try:
            if fullname == TABLES:
                return self._spec()
            self._late()
        except Exception:  # the import goes on without us
            return None
        return None

    def _late(self) -> None:
        """Where torch was imported by TABLES itself, whose run began before there was a finder."""
        if TABLES in sys.modules and _filled():
            sys.meta_path.remove(self)

    def _spec(self) -> importlib.machinery.ModuleSpec | None:
        sys.meta_path.remove(self)  # once, and so that the look-up below does not come back here
        spec = importlib.util.find_spec(TABLES)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            install()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
