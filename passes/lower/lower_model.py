"""Lower and unlower a model in place: FFNs call the op `ltepass::routed_ffn`, other linears `ltepass::linear`.

scope "ffn": nothing is compiled, so there are no guards, no recompiles and no limit on lengths.
scope "model": the `lte` backend compiles the whole model and lowers the same regions in Dynamo's graph.
`state_dict`, checkpoints and names never change; `unlower` gives back what was.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TypeVar, get_args

from torch import nn

from ltepass.config import Scope
from ltepass.errors import ConfigError, LoweredError, LoweringError
from ltepass.kernels.weight_formats import Format, SparseFormat, sparse_format
from ltepass.passes.capture.guard_replaced_forwards import check_forwards
from ltepass.passes.insert.check_activation import other_activation
from ltepass.passes.lower.compile_backend import compile_model, is_compiled, uncompile_model
from ltepass.passes.lower.lay_out_neurons import give_back_strides, lay_out
from ltepass.passes.lower.lower_linear_modules import lower_linear_modules, lowered_linears, unlower_linear_modules
from ltepass.passes.lower.lower_sites import lower_sites, require_hard, unlower_sites
from ltepass.passes.lower.why_not_ffn import why_not, why_not_alone
from ltepass.routed.coded_ffn import coded_ffn, why_not_in_codes
from ltepass.routed.modes import remember_densities
from ltepass.routed.routed import Routed, is_transformed, require_whole, unwrapped
from ltepass.routed.sites import FFNSite
from ltepass.routed.tiered_router import TieredRouter
from ltepass.routed.torchao_weights import ffn_format
from ltepass.routed.undo import all_or_nothing, verb
from ltepass.threads import unshared

log = logging.getLogger("ltepass")
Model = TypeVar("Model", bound=nn.Module)


def lower_model(model: Model, scope: Scope, *, ffn: bool, linears: Format | None = None) -> Model:
    """What `ltepass.lower` does."""
    if ffn or is_transformed(model):
        return _lower(model, scope, ffn, linears)
    root = unwrapped(model)
    all_or_nothing(root, lambda: _lower_dense(root, scope, linears))
    return model


@verb
def _lower(model: Model, scope: Scope, ffn: bool, linears: Format | None) -> Model:
    routed = Routed.trained(model, "lower")
    state = routed.state
    _check(model, scope, linears)
    formats = dict[str, SparseFormat | None]()  # by the names of sites
    reasons: dict[str, str | None] = dict.fromkeys((s.name for s in state.sites), "ffn is False")
    if ffn:
        require_hard(routed)
        check_forwards(model)
        formats = {s.name: _format(routed, s, linears, scope) for s in state.sites}
        reasons = {s.name: why_not(routed, s, formats[s.name]) for s in state.sites}
        if scope == "ffn":
            reasons = {
                s.name: reasons[s.name] or why_not_alone(model, s) or other_activation(model, s) for s in state.sites
            }
    state.notes = [f"{name}: kept masked-dense: {reason}" for name, reason in reasons.items() if reason]
    sites = [s for s in state.sites if not reasons[s.name]]
    if ffn and not sites:
        raise LoweringError("no site can be lowered:\n" + "\n".join(state.notes))
    for site in sites:
        router = routed.router(site)
        if isinstance(router, TieredRouter):
            if scope == "ffn" and router.codes.device.type == "cpu":
                router.packed()
            continue
        format = formats[site.name]
        if format is not None:
            router.coded = coded_ffn(model, site, router, format)
            continue
        state.strides = lay_out(routed, site) | state.strides  # what the first of those that share a parameter found
        if linears is not None:
            state.notes.append(f"{site.name}: stays in floats: {why_not_in_codes(site, linears)}")
    remember_densities(routed)
    with unshared(routed.all_routers()):
        if scope == "ffn":
            lower_sites(routed, sites)
        else:
            compile_model(model, state, ffn=ffn)
    bypassed = [model.get_submodule(path) for path in _linears_of(sites)]
    left = lower_linear_modules(model, bypassed, quantised_only=scope == "model", format=linears)
    told = _linears_of(state.sites)  # why an FFN stays as it is says why its linears do
    state.notes += [f"{path}: calls torch's linear: {reason}" for path, reason in left.items() if path not in told]
    state.linears = lowered_linears(model)
    state.lowered = scope
    return model


def _format(routed: Routed, site: FFNSite, linears: Format | None, scope: Scope) -> SparseFormat | None:
    """The format in which a site's op reads its weights; None: in floats."""
    held = ffn_format(routed.model, site)
    if held is not None:  # a graph of scope "model" has no op that takes torchao's tensors
        return held if scope == "ffn" else None
    return sparse_format(linears) if why_not_in_codes(site, linears) is None else None


def _lower_dense(model: nn.Module, scope: Scope, linears: Format | None) -> None:
    _check(model, scope, linears)
    if is_lowered(model):
        raise LoweredError("the model's linears are lowered already; call ltepass.unlower(model) first")
    if scope == "model":
        compile_model(model, None, ffn=False)
    for path, reason in lower_linear_modules(model, (), quantised_only=scope == "model", format=linears).items():
        log.info("lower: %s calls torch's linear: %s", path, reason)


def _check(model: nn.Module, scope: Scope, linears: Format | None) -> None:
    require_whole(model, "lower")
    check_format(linears)
    if scope not in ("ffn", "model"):
        raise ConfigError(f'scope is {scope!r}; expected "ffn" or "model"')
    if linears is not None and scope == "model":
        raise ConfigError(f'linears is {linears!r} and scope "model"; expected scope "ffn", which quantises')
    if linears is not None and any(p.device.type != "cpu" for p in model.parameters()):
        raise ConfigError(f"linears is {linears!r} and not all of the model is on the CPU, which alone has the kernels")


def check_format(linears: Format | None) -> None:
    """Raises ConfigError."""
    if linears not in (None, *get_args(Format)):
        raise ConfigError(f"linears is {linears!r}; expected None or one of {', '.join(get_args(Format))}")


def _linears_of(sites: Iterable[FFNSite]) -> set[str]:
    return {path for site in sites for path in (site.up, site.gate, site.down) if path is not None}


def unlower_model(model: Model) -> Model:
    """What `ltepass.unlower` does."""
    root = unwrapped(model)
    if not is_transformed(root) and is_lowered(root):
        all_or_nothing(root, lambda: _unlower_dense(root))
        return model
    return _unlower(model)


def is_lowered(model: nn.Module) -> bool:
    """Whether `lower` changed this very module, dense or transformed."""
    return bool(lowered_linears(model)) or is_compiled(model)


def _unlower_dense(model: nn.Module) -> None:
    unlower_linear_modules(model)
    uncompile_model(model)


@verb
def _unlower(model: Model) -> Model:
    routed = Routed.of(model, "unlower")
    state = routed.state
    if state.lowered is not None:
        require_whole(model, "unlower")
    unlower_linear_modules(model)
    with unshared(routed.all_routers()):
        if state.lowered == "ffn":
            unlower_sites(routed)
        elif state.lowered == "model":
            uncompile_model(model)
    give_back_strides(routed)
    state.lowered, state.notes, state.linears = None, [], 0
    return model
