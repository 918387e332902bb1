"""What saves and loads through transformers is imported by those calls alone: its module imports transformers."""

from __future__ import annotations

import importlib
import sys

from torch import nn

from ltepass_autoload import QUANTIZER


def attach(model: nn.Module) -> None:
    """After transform: `model.save_pretrained` writes what `from_pretrained` needs. Nothing to do for other models."""
    if hasattr(model, "save_pretrained") and hasattr(model, "config"):
        importlib.import_module(QUANTIZER).attach(model)


def attach_quantised(model: nn.Module) -> None:
    """After quantize of a dense model: `save_pretrained` writes what torchao holds, as transformers has it."""
    if hasattr(model, "save_pretrained") and hasattr(model, "config"):
        importlib.import_module(QUANTIZER).attach_quantised(model)


def detach(model: nn.Module) -> None:
    """After remove: the model saves as the dense model that it is again."""
    if QUANTIZER in sys.modules:
        importlib.import_module(QUANTIZER).detach(model)
