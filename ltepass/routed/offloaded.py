"""Weights that a `device_map` left on disk or in another memory: accelerate's hooks fetch them for each forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from ltepass.errors import MetaWeightsError
from ltepass.routed.router import Router
from ltepass.routed.sites import FFNSite


def require_weights(model: nn.Module, what: str) -> None:
    """Raises MetaWeightsError where weights are on the meta device and nothing fetches them, or a router's are, which
    are to be written.
    """
    for path, module in model.named_modules():
        readable = is_fetched(module) and not isinstance(module, Router)
        if not readable and any(p.is_meta for p in module.parameters(recurse=False)):
            raise MetaWeightsError(
                f"{what} needs real weights and those of {path or type(model).__name__} are on the meta device; load "
                "them first"
            )


def is_fetched(module: nn.Module) -> bool:
    """Whether a hook of accelerate's brings this module's own weights for a forward."""
    return bool(getattr(module.__dict__.get("_hf_hook"), "offload", False))


def is_offloaded(model: nn.Module, site: FFNSite) -> bool:
    """Whether some of the site's weights are elsewhere, where no other order of them can be written."""
    return any(map(is_fetched, _holders(model, site)))


@contextmanager
def fetched(model: nn.Module, site: FFNSite) -> Iterator[None]:
    """Inside, the site's weights are there to be read; what is written to those that were fetched does not last."""
    away = [module for module in _holders(model, site) if is_fetched(module)]
    with ExitStack() as stack:
        if away:
            from accelerate.utils import align_module_device  # not above: `import ltepass` stays light

            for module in away:
                stack.enter_context(align_module_device(module))
        yield


def _holders(model: nn.Module, site: FFNSite) -> list[nn.Module]:
    """The modules whose parameters hold the site's neurons."""
    paths = dict.fromkeys(rows.param.rpartition(".")[0] for rows in site.neurons)
    return [model.get_submodule(path) for path in paths]
