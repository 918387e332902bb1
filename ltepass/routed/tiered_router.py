"""A router whose FFN keeps low bits of every neuron: it holds the whole FFN in two planes of 4 bits.

Its proxy's codes are the high plane of gate and up. Beside them it holds the high plane of down and the low plane of
all three; `kernels/tiers_reference.py` says what is read of them for which neuron. In hard mode the gate lets nothing
of the linears' own hidden units through, and `add_tiers`, behind the down projection, adds what the planes give; in
soft mode a neuron's sigmoid is the share of its low plane. The linears' own weights serve dense mode, and are what new
planes are made of; a training stage freezes them, for they do not reach the output.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ltepass.config import LTEConfig
from ltepass.errors import ConfigError
from ltepass.kernels.packed_planes import Packed, pack
from ltepass.kernels.planes import split
from ltepass.kernels.proxy_codes import Codes, blocks_of
from ltepass.kernels.tiers import tiers
from ltepass.kernels.tiers_reference import Planes, shared_ffn
from ltepass.kernels.weight_formats import HALF
from ltepass.routed.gate import straight_through
from ltepass.routed.proxy_router import ProxyRouter, proxy_of, read_weights
from ltepass.routed.quantile_table import interpolate
from ltepass.routed.sites import FFNSite, read_rows
from ltepass.routed.source import Source
from ltepass.routed.undo import keep

PLANES = tuple(f"{plane}_{part}" for plane in ("down", "low") for part in Codes._fields)


@dataclass(frozen=True)
class PackedOnce:
    """Planes as they were packed, and what of."""

    packed: Packed
    sources: tuple[Source, ...]


class TieredRouter(ProxyRouter):
    """Scores single neurons, and holds what each of them computes. k is 2 with a gate (gate, up), else 1 (up).

    down_codes: [1, d_ff, 16 blocks] uint8, of down's columns; down_multipliers: [1, d_ff, blocks] uint8;
    down_scales: [1, d_ff] fp32. low_codes, low_multipliers, low_scales: the same of the low plane, [k + 1, d_ff, ...].
    low_bit_sparsity: share of neurons, those that score least, that add nothing at all.
    Everything else is as `ProxyRouter` has it.
    """

    tiered = True
    low_bit_sparsity = 0.0
    packed_once: PackedOnce | None = None  # of a lowered site on a CPU

    def _add_tensors(self, bias: bool, device: torch.device | str | None) -> None:
        """The planes, beside what a proxy holds."""
        super()._add_tensors(bias, device)
        n, d_ff = blocks_of(self.d_model), self.d_ff
        for plane, k in (("down", 1), ("low", self.shape[0] + 1)):
            for part, width in (("codes", HALF * n), ("multipliers", n)):
                self.register_buffer(f"{plane}_{part}", torch.empty(k, d_ff, width, dtype=torch.uint8, device=device))
            self.register_buffer(f"{plane}_scales", torch.empty(k, d_ff, dtype=torch.float32, device=device))

    def _start(self, generator: torch.Generator) -> None:
        super()._start(generator)
        for name in PLANES:
            getattr(self, name).zero_()  # with scales of 0, whatever the codes

    @property
    def floor(self) -> Tensor:
        """[] fp32: the logit up to which neurons add nothing; -Inf before calibration."""
        return interpolate(self.quantiles, self.low_bit_sparsity).nan_to_num(nan=-torch.inf, neginf=-torch.inf)

    def planes(self) -> Planes:
        high = Codes(self.codes, self.multipliers, self.scales)
        return Planes(high, Codes(*self.planes_of_down()), Codes(*self.low_planes()), self.biases)

    def planes_of_down(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name) for name in PLANES[:3])

    def low_planes(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name) for name in PLANES[3:])

    def tiers(self) -> tuple[Tensor | None, ...]:
        """What `ltepass::tiered_ffn` takes of it."""
        return (*self.operands(), self.threshold, self.floor, *self.planes_of_down(), *self.low_planes())

    def packed(self) -> Packed:
        """The planes as a lowered site reads them: packed again where somebody wrote to one since."""
        planes = [*self.planes().high, *self.planes_of_down(), *self.low_planes()]
        known = self.packed_once
        if known is None or not all(s.is_still(plane) for s, plane in zip(known.sources, planes, strict=True)):
            sources = tuple(Source(plane) for plane in planes if plane is not None)
            known = self.packed_once = PackedOnce(pack(self.planes()), sources)
        return known.packed

    def packed_tiers(self) -> tuple[Tensor | None, ...]:
        """What `ltepass::packed_tiered_ffn` takes of it."""
        rest = (self.biases, self.sizes, self.weight, self.bias, self.threshold, self.floor)
        return (*self.packed(), *rest)

    def from_planes(self, x: Tensor, logits: Tensor) -> Tensor:
        """x: [..., d_model], logits: what this router gave for it -> [..., d_model] fp32, without down's bias."""
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self._from_planes(x, logits)
        return self._from_planes(x, logits)

    def _from_planes(self, x: Tensor, logits: Tensor) -> Tensor:
        planes = self.planes()
        kept = logits > torch.minimum(self.threshold, self.floor)
        if self.mode == "soft":  # of the low planes a share; what adds nothing in hard mode adds nothing here
            return shared_ffn(x.float(), torch.sigmoid(logits) * kept, kept, planes, self.activation)
        if self.straight_through and torch.is_grad_enabled():
            best = straight_through(logits, self.threshold)
            return shared_ffn(x.float(), best, kept, planes, self.activation)
        written = (*self.planes_of_down(), *self.low_planes())
        args = (x, logits, self.threshold, self.floor, *planes.high, *written, planes.biases, self.activation)
        return tiers(*args)  # type: ignore[no-any-return]

    def reorder(self, order: Tensor) -> None:
        """As every router's order of neurons, that of the planes."""
        super().reorder(order)
        for name in PLANES:
            constant = getattr(self, name)
            keep(constant)
            constant.copy_(constant.index_select(1, order.to(constant.device)))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, low_bit_sparsity={self.low_bit_sparsity}"


def tiered_of(site: FFNSite, config: LTEConfig, device: torch.device | str | None) -> TieredRouter:
    """A tiered router for a site."""
    router = proxy_of(site, config, device, TieredRouter)
    router.low_bit_sparsity = config.low_bit_sparsity
    return router


def why_no_tiers(site: FFNSite) -> str | None:
    """Why a site's inactive neurons cannot keep low bits, or None."""
    if site.kind == "inline":
        return "its FFN lies inline in a bigger module"
    if site.group_size != 1:
        return f"its experts are of {site.group_size} neurons"
    rows = (site.up_rows, site.gate_rows, site.up_bias, site.gate_bias, site.down_rows)
    extra = [r.param for r in site.neurons if r not in rows]
    return f"{extra[0]} also scales its neurons" if extra else None


def require_tierable(sites: Iterable[FFNSite]) -> None:
    """Raises ConfigError for a site that cannot have tiers."""
    for site in sites:
        reason = why_no_tiers(site)
        if reason is not None:
            raise ConfigError(
                f'{site.name}: inactive "low_bit" serves no such FFN: {reason}; pass skip={site.name!r}, or '
                'inactive="zero"'
            )


def start_planes(model: nn.Module, site: FFNSite) -> None:
    """Planes of weights that are rounded."""
    for router in (m for m in model.get_submodule(site.router).modules() if isinstance(m, TieredRouter)):
        encode_planes(model, site, router)


@torch.no_grad()
def encode_planes(model: nn.Module, site: FFNSite, router: TieredRouter, down: Codes | None = None) -> bool:
    """Fill a tiered router's planes from the weights as they are; it has their high codes of gate and up already.

    down: high codes of its columns; None rounds them. False, and nothing done, where the weights are not to be read.
    """
    weights, columns = read_weights(model, site), read_rows(model, site, site.down_rows)
    if weights is None or columns is None:
        return False
    _, low = split(weights, router.planes().high)
    high_down, low_down = split(columns[None], down)
    both = [torch.cat((a, b)) for a, b in zip(low, low_down, strict=True) if a is not None and b is not None]
    for name, value in zip(PLANES, (*high_down, *both), strict=True):
        constant = getattr(router, name)
        keep(constant)
        constant.copy_(value)
    return True
