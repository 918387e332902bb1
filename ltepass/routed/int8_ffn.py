"""An FFN and its linear router in int8, as a lowered site holds them beside the model's own weights."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ltepass.errors import LoweredError
from ltepass.kernels.weight_formats import int8_columns, int8_rows
from ltepass.routed.proxy_router import ProxyRouter
from ltepass.routed.router import Router
from ltepass.routed.sites import FFNSite, NeuronRows
from ltepass.routed.source import Source
from ltepass.routed.torchao_weights import Int8Weight, holds_int8, int8_parts


@dataclass(frozen=True, kw_only=True)
class Int8FFN:
    """As `ltepass::routed_ffn_int8` reads them; down's codes lie a neuron after the other.

    router: of a linear one; a proxy's codes are its own, and stay with it. sources: what was quantised.
    """

    router: Int8Weight | None
    up: Int8Weight
    gate: Int8Weight | None
    down: Int8Weight
    sources: tuple[Source, ...]

    def require_sources(self, up: Tensor, gate: Tensor | None, down: Tensor, router: Router) -> None:
        """Raises LoweredError where a weight is another one now, or was written to."""
        now = [up, *([] if gate is None else [gate]), down, *([] if self.router is None else [router.weight])]
        for source, weight in zip(self.sources, now, strict=True):
            if not source.is_still(weight):
                raise LoweredError(
                    "a weight of a lowered FFN was changed after its int8 codes were made; call "
                    "ltepass.unlower(model) before changing weights, then lower again"
                )

    def weights(
        self, up_bias: Tensor | None, gate_bias: Tensor | None, down_bias: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """In the op's order."""
        gate, gate_scale = (None, None) if self.gate is None else self.gate
        return self.up[0], up_bias, gate, gate_bias, self.down[0], down_bias, self.up[1], gate_scale, self.down[1]

    def weights_left(self) -> list[Tensor]:
        """What no token reads any more."""
        return [source.weight for source in self.sources]

    def tensors(self) -> list[Tensor]:
        """Of the FFN; the router's are its operands."""
        return [t for pair in (self.up, self.gate, self.down) if pair is not None for t in pair]

    def by_neuron(self, site: FFNSite) -> dict[NeuronRows, int]:
        """Bytes that are read where a neuron is active, in the place of those of a weight's rows."""
        up_and_gate = ((site.up_rows, self.up), (site.gate_rows, self.gate))
        read = {rows: sum(t.nbytes for t in pair) for rows, pair in up_and_gate if rows and pair}
        return read | {site.down_rows: self.down[0].nbytes}


def int8_ffn(model: nn.Module, site: FFNSite, router: Router) -> Int8FFN:
    """Of the weights as they are: rounded where they are floats, and codes that torchao made as they stand."""

    def rows_of(rows: NeuronRows) -> Int8Weight:
        weight = model.get_parameter(rows.param).detach()
        if not holds_int8(weight):
            return int8_rows(rows.take(weight, site.d_ff))
        codes, scale = int8_parts(weight)
        return rows.take(codes, site.d_ff).contiguous(), rows.take(scale, site.d_ff).contiguous()

    def columns_of(rows: NeuronRows) -> Int8Weight:
        weight = model.get_parameter(rows.param).detach()
        if not holds_int8(weight):
            return int8_columns(rows.take(weight, site.d_ff).t())
        codes, scale = int8_parts(weight)
        return rows.take(codes, site.d_ff).contiguous().t(), scale

    linear = None if isinstance(router, ProxyRouter) else router.weight
    own = [model.get_parameter(rows.param) for rows in (site.up_rows, site.gate_rows, site.down_rows) if rows]
    return Int8FFN(
        router=None if linear is None else int8_rows(linear.detach()),
        up=rows_of(site.up_rows),
        gate=None if site.gate_rows is None else rows_of(site.gate_rows),
        down=columns_of(site.down_rows),
        sources=tuple(Source(p) for p in (*own, *([] if linear is None else [linear]))),
    )
