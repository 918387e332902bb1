"""A transformed model as one call sees it: public calls make a `Routed` of their model, and hand that down."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn
from torch.fx import GraphModule

from ltepass.errors import AmbiguousModelError, ConfigError, LoweredError, NotTransformedError, ShardedError, shown
from ltepass.routed.router import Router
from ltepass.routed.sites import FFNSite, LTEState, find_parameter
from ltepass.routed.torchao_weights import holds_codes


@dataclass(frozen=True, eq=False)
class Routed:
    """The transformed root, what transform did to it, and the router that decides at each site.

    Made once a call, which names itself in `what`. Another adapter of PEFT's brings other routers: a call that changes
    adapters makes it anew afterwards.
    """

    model: nn.Module
    state: LTEState

    @staticmethod
    def of(model: nn.Module, what: str) -> Routed:
        """The transformed model in `model` or in what wraps it, lowered or not. Raises NotTransformedError,
        AmbiguousModelError.
        """
        root = root_of(model, what)
        state = state_of(root)
        assert state is not None
        return Routed(root, state)

    @staticmethod
    def trained(model: nn.Module, what: str) -> Routed:
        """As `of`, for a call that reads or changes what lowering bypasses. Raises LoweredError too."""
        routed = Routed.of(model, what)
        if routed.state.lowered is not None:
            raise LoweredError(
                f"the model is lowered (scope {routed.state.lowered!r}), which is hard mode; {what} expects it as "
                "trained; call ltepass.unlower(model)"
            )
        return routed

    @property
    def sites(self) -> list[FFNSite]:
        return self.state.sites

    @property
    def config(self) -> dict[str, Any]:
        return self.state.config

    @property
    def tiered(self) -> bool:
        """Whether inactive neurons keep low bits."""
        return bool(self.config.get("inactive") == "low_bit")

    def require_gates(self, what: str) -> None:
        """Raises ConfigError where inactive neurons keep low bits, which `what` cannot serve."""
        if self.tiered:
            raise ConfigError(
                f'{what} does not serve inactive="low_bit", whose 4-bit planes stay as calibration made them; expected '
                'inactive="zero"; change the model before it is transformed with "low_bit", or train what is no FFN'
            )

    def require_floats(self, what: str) -> None:
        """Raises ConfigError where torchao holds weights of FFNs as codes, which `what` would read or change."""
        for name in dict.fromkeys(rows.param for site in self.sites for rows in site.neurons):
            held = find_parameter(self.model, name)
            if held is not None and holds_codes(held):
                raise ConfigError(
                    f"{name} is in torchao's codes, which {what} cannot change; expected weights in floats; call "
                    "it before ltepass.quantize"
                )

    @cached_property
    def routers(self) -> list[Router]:
        """The router that decides at each site."""
        return [router_of(self.model, site) for site in self.sites]

    def __iter__(self) -> Iterator[tuple[FFNSite, Router]]:
        return zip(self.sites, self.routers, strict=True)

    def router(self, site: FFNSite) -> Router:
        return next(router for own, router in self if own.name == site.name)

    def copies(self, site: FFNSite) -> list[Router]:
        """The site's router, and those that PEFT keeps in its place for other adapters."""
        return list(routers_of(self.model.get_submodule(site.router)))

    def all_routers(self) -> list[Router]:
        """Of every site, each with its copies."""
        return list(routers_of(self.model))


def is_transformed(model: nn.Module) -> bool:
    """Whether transform changed this module, or one inside it. Raises ConfigError where it is no module."""
    require_module(model)
    return any(state_of(module) is not None for module in model.modules())


def root_of(model: nn.Module, what: str) -> nn.Module:
    """The transformed model: this one, or the one inside whatever wraps it (PEFT, DDP, torch.compile, an own parent).

    what: the call that wants it. Raises NotTransformedError, AmbiguousModelError.
    """
    if state_of(model) is not None:
        return model
    found: dict[str, nn.Module] = {name: m for name, m in model.named_modules() if state_of(m) is not None}
    if not found and any(routers_of(model)):
        raise NotTransformedError(
            f"{type(model).__name__} holds routers and no record of them; {what} expects the module that was given to "
            "ltepass.transform, or what wraps it; pass that one and no part of it; copy a torch.fx.GraphModule by "
            "copy.deepcopy(model), because its shallow copies keep no attributes"
        )
    if not found:
        raise NotTransformedError(
            f"{type(model).__name__} holds no routers; {what} expects a transformed model; call "
            "ltepass.transform(model) first, and pass the same root module, or what wraps it"
            + ("; for a dense model's linears: lower(model, ffn=False)" if what == "lower" else "")
        )
    if len(found) > 1:
        raise AmbiguousModelError(
            f"{type(model).__name__} holds {len(found)} transformed models ({', '.join(found)}); {what} expects one; "
            "pass the one that is meant"
        )
    (root,) = found.values()
    return root


def state_of(model: nn.Module) -> LTEState | None:
    """The state that `transform` left on this very module, or None. Raises ConfigError where it is no module."""
    require_module(model)
    state: LTEState | None = model.__dict__.get("_lte")  # no getattr: wrappers hand that on to what they wrap
    return state


def require_module(model: object) -> None:
    """Raises ConfigError."""
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"the model is {shown(model)}, a {type(model).__name__}; expected an nn.Module, as from_pretrained gives"
        )


def set_state(model: nn.Module, state: LTEState) -> None:
    """This module is the transformed root. Torch's deepcopy of a GraphModule keeps the attributes that `meta` lists."""
    model._lte = state  # type: ignore[assignment]
    if isinstance(model, GraphModule):
        model.meta = {**model.meta, _KEPT: {**model.meta.get(_KEPT, {}), "_lte": state}}


def drop_state(model: nn.Module) -> None:
    del model._lte
    if isinstance(model, GraphModule):
        kept = {name: value for name, value in model.meta.get(_KEPT, {}).items() if name != "_lte"}
        others = {key: value for key, value in model.meta.items() if key != _KEPT}
        model.meta = {**others, _KEPT: kept} if kept else others


_KEPT = "_user_preserved_attributes"  # torch.fx.graph_module._USER_PRESERVED_ATTRIBUTES_KEY


def unwrapped(model: nn.Module) -> nn.Module:
    """The root that was or will be transformed, inside all that PEFT, DDP, FSDP, DataParallel or torch.compile wrapped
    around it. Raises ConfigError where it is no module.
    """
    require_module(model)
    inner: Any = model
    while True:
        if isinstance(inner, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = inner.module
        elif "_fsdp_wrapped_module" in inner._modules:
            inner = inner._fsdp_wrapped_module
        elif "_orig_mod" in inner._modules:  # torch.compile's; its class is not imported, which takes seconds
            inner = inner._orig_mod
        elif hasattr(type(inner), "get_base_model"):  # peft's
            inner = inner.get_base_model()
        else:
            return inner  # type: ignore[no-any-return]


def routers_of(model: nn.Module) -> Iterator[Router]:
    """Every router below `model`, transformed root or any part of one."""
    return (m for m in model.modules() if isinstance(m, Router))


def router_of(model: nn.Module, site: FFNSite) -> Router:
    """The router that decides at this site. Raises NotTransformedError where it was taken out since transform."""
    try:
        return deciding(model.get_submodule(site.router))
    except (AttributeError, StopIteration):
        raise NotTransformedError(
            f"{site.router} is there no more: what held it was replaced or taken out after ltepass.transform; put it "
            "back, or transform a model that is built as it is to be used"
        ) from None


def deciding(found: Any) -> Router:
    """The router in what stands at a router's path: PEFT's modules_to_save keeps a trained copy for each adapter."""
    if hasattr(found, "modules_to_save"):
        names = found.active_adapters
        copied = names and not found.disable_adapters and all(name in found.modules_to_save for name in names)
        found = found.modules_to_save[names[0]] if copied else found.original_module
    return next(m for m in found.modules() if isinstance(m, Router))


def refuse_tensor_parallel(model: nn.Module, what: str, planned: int | None = None) -> None:
    """Raises ShardedError for a model of transformers whose layers are split over processes, or are to be (planned)."""
    size = planned or getattr(model, "tp_size", None) or 1
    if size > 1:
        raise ShardedError(
            f"{type(model).__name__} is split over {size} processes by a tensor parallel plan, which cuts experts "
            f"apart; {what} expects whole layers; load it without tp_plan (several processes train under DDP, "
            "fully_shard or DistributedConfig(fsdp_size=...))"
        )


def require_whole(model: nn.Module, what: str, *, flat_only: bool = False) -> None:
    """Raises ShardedError where tensor parallelism or FSDP has cut parameters up, or (flat_only) FSDP has put them into
    one that has no names.
    """
    refuse_tensor_parallel(model, what)
    for path, module in model.named_modules():
        own = module.__dict__
        if own.get("_is_fsdp_managed_module") and not (flat_only and own.get("_fsdp_use_orig_params")):
            raise ShardedError(
                f"{path or type(module).__name__} was wrapped by FullyShardedDataParallel or fully_shard, and holds a "
                f"share of its weights only; {what} expects whole ones; call it before wrapping"
            )
