"""A transformed model as one call sees it: public calls make a `Routed` of their model, and hand that down."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from ltepass.errors import AmbiguousModelError, LoweredError, NotTransformedError
from ltepass.routed.router import Router
from ltepass.routed.sites import FFNSite, LTEState, router_of, routers_of, state_of


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
        """Of the model itself or what wraps it, lowered or not. Raises NotTransformedError, AmbiguousModelError."""
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
    """Whether transform changed this module, or one inside it."""
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
        )
    if len(found) > 1:
        raise AmbiguousModelError(
            f"{type(model).__name__} holds {len(found)} transformed models ({', '.join(found)}); {what} expects one; "
            "pass the one that is meant"
        )
    (root,) = found.values()
    return root
