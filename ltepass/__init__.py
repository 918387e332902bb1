"""ltepass: make any transformer decoder learn to be efficient (LTE, arXiv 2402.06126).

Find the FFN blocks in the traced graph, insert trainable routers with threshold gates over groups of neurons, train
them to a sparsity, and lower the result to fused sparse kernels through the torch.compile backend "lte".

In the examples of the docstrings, `dense` is a language model of transformers, `model` one that is transformed and
calibrated, `ids` token ids [n, T], `batches` a list of such, and `folder` a path.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ltepass import old_names as _old_names
from ltepass.kernels import routed_ffn as _ops  # noqa: F401  # registers what a saved program calls (torch.export.load)
from ltepass.routed import gate as _gate  # noqa: F401  # likewise
from ltepass.version import __version__
from ltepass_autoload import install as _install

if TYPE_CHECKING:
    from ltepass.calibration.calibrate_model import calibrate
    from ltepass.calibration.refit_down import warm_start
    from ltepass.config import LTEConfig
    from ltepass.exporting.run_exported import exported_loop
    from ltepass.measure.quality import perplexity
    from ltepass.measure.sparsity import measure_sparsity, measure_union
    from ltepass.pruning.schedule import CubicSchedule
    from ltepass.quantise_weights import quantize
    from ltepass.routed.modes import set_mode
    from ltepass.routed.report_tables import Report, report
    from ltepass.routed.sites import FFNSite, Refusal
    from ltepass.saving.plain_modules import load, save
    from ltepass.sparsity.cuts import set_hidden_sparsity, set_input_sparsity
    from ltepass.sparsity.draft_model import draft
    from ltepass.sparsity.thresholds import set_sparsity
    from ltepass.training.auxiliary_loss import take_auxiliary
    from ltepass.training.contrastive import ContrastiveSettings, contrastive_loss
    from ltepass.training.controller import SparsityController
    from ltepass.training.labels import label_mask
    from ltepass.training.settings import LTESettings
    from ltepass.training.stages import begin_stage, settle
    from ltepass.training.trainer import LTETrainer, LTETrainerMixin
    from ltepass.transform_and_lower import export, lower, prune, remove, transform, unlower

# name -> module; loaded on first use, so that importing ltepass is quick and touches neither transformers nor a GPU
_PUBLIC = {
    "export": "ltepass.transform_and_lower",
    "lower": "ltepass.transform_and_lower",
    "prune": "ltepass.transform_and_lower",
    "remove": "ltepass.transform_and_lower",
    "transform": "ltepass.transform_and_lower",
    "unlower": "ltepass.transform_and_lower",
    "calibrate": "ltepass.calibration.calibrate_model",
    "warm_start": "ltepass.calibration.refit_down",
    "LTEConfig": "ltepass.config",
    "exported_loop": "ltepass.exporting.run_exported",
    "quantize": "ltepass.quantise_weights",
    "perplexity": "ltepass.measure.quality",
    "measure_sparsity": "ltepass.measure.sparsity",
    "measure_union": "ltepass.measure.sparsity",
    "CubicSchedule": "ltepass.pruning.schedule",
    "Report": "ltepass.routed.report_tables",
    "report": "ltepass.routed.report_tables",
    "FFNSite": "ltepass.routed.sites",
    "Refusal": "ltepass.routed.sites",
    "load": "ltepass.saving.plain_modules",
    "save": "ltepass.saving.plain_modules",
    "set_hidden_sparsity": "ltepass.sparsity.cuts",
    "set_input_sparsity": "ltepass.sparsity.cuts",
    "draft": "ltepass.sparsity.draft_model",
    "set_mode": "ltepass.routed.modes",
    "set_sparsity": "ltepass.sparsity.thresholds",
    "ContrastiveSettings": "ltepass.training.contrastive",
    "contrastive_loss": "ltepass.training.contrastive",
    "SparsityController": "ltepass.training.controller",
    "LTESettings": "ltepass.training.settings",
    "begin_stage": "ltepass.training.stages",
    "label_mask": "ltepass.training.labels",
    "settle": "ltepass.training.stages",
    "take_auxiliary": "ltepass.training.auxiliary_loss",
    "LTETrainer": "ltepass.training.trainer",
    "LTETrainerMixin": "ltepass.training.trainer",
}

__all__ = [
    "ContrastiveSettings",
    "CubicSchedule",
    "FFNSite",
    "LTEConfig",
    "LTESettings",
    "LTETrainer",
    "LTETrainerMixin",
    "Refusal",
    "Report",
    "SparsityController",
    "__version__",
    "begin_stage",
    "calibrate",
    "contrastive_loss",
    "draft",
    "export",
    "exported_loop",
    "label_mask",
    "load",
    "lower",
    "measure_sparsity",
    "measure_union",
    "perplexity",
    "prune",
    "quantize",
    "remove",
    "report",
    "save",
    "set_hidden_sparsity",
    "set_input_sparsity",
    "set_mode",
    "set_sparsity",
    "settle",
    "take_auxiliary",
    "transform",
    "unlower",
    "warm_start",
]


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'ltepass' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


_install()
_old_names.register()
