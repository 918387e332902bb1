"""An FFN and its linear router in codes, as a lowered site holds them beside the model's own weights."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ltepass.errors import LoweredError
from ltepass.kernels.weight_formats import (
    BLOCK,
    Format,
    SparseFormat,
    int4_rows,
    int8_columns,
    int8_rows,
    sparse_format,
)
from ltepass.routed.proxy_router import ProxyRouter
from ltepass.routed.router import Router
from ltepass.routed.sites import FFNSite, NeuronRows
from ltepass.routed.source import Source
from ltepass.routed.torchao_weights import (
    Coded,
    holds_int4,
    holds_int8,
    int4_of_neurons,
    int8_parts,
)


@dataclass(frozen=True, kw_only=True)
class CodedFFN:
    """As `ltepass::routed_ffn_int8` or `routed_ffn_int4` reads them; down's codes lie a neuron after the other.

    router: of a linear one, in int8; a proxy's codes are its own, and stay with it. sources: what was quantised.
    """

    format: SparseFormat
    router: Coded | None
    up: Coded
    gate: Coded | None
    down: Coded
    sources: tuple[Source, ...]

    def require_sources(self, up: Tensor, gate: Tensor | None, down: Tensor, router: Router) -> None:
        """Raises LoweredError where a weight is another one now, or was written to."""
        now = [up, *([] if gate is None else [gate]), down, *([] if self.router is None else [router.weight])]
        for source, weight in zip(self.sources, now, strict=True):
            if not source.is_still(weight):
                raise LoweredError(
                    f"a weight of a lowered FFN was changed after its {self.format} codes were made; call "
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

    def whole(self) -> list[Tensor]:
        """What every token reads of the FFN: in int8 down's scales, one an output."""
        return [self.down[1]] if self.format == "int8" else []

    def by_neuron(self, site: FFNSite) -> dict[NeuronRows, int]:
        """Bytes that are read where a neuron is active, in the place of those of a weight's rows."""
        up_and_gate = ((site.up_rows, self.up), (site.gate_rows, self.gate))
        read = {rows: sum(t.nbytes for t in pair) for rows, pair in up_and_gate if rows and pair}
        return read | {site.down_rows: sum(t.nbytes for t in self.down) - sum(t.nbytes for t in self.whole())}


def why_not_in_codes(site: FFNSite, linears: Format | None) -> str | None:
    """Why no sparse op reads an FFN in this format, or None."""
    if sparse_format(linears) is None:
        return "only int8 and int4 are read by a sparse op"
    if linears == "int4" and (site.d_model % BLOCK or site.d_out % BLOCK):
        return f"blocks of 4 bits are {BLOCK} long, and d_model is {site.d_model}, d_out {site.d_out}"
    return None


def coded_ffn(model: nn.Module, site: FFNSite, router: Router, format: SparseFormat) -> CodedFFN:
    """Of the weights as they are: rounded where they are floats, and codes that torchao holds as they stand."""
    read = _int8_rows if format == "int8" else _int4_rows
    down = _int8_columns if format == "int8" else _int4_rows
    weight = {rows: model.get_parameter(rows.param).detach() for rows in (site.up_rows, site.gate_rows) if rows}
    linear = None if isinstance(router, ProxyRouter) else router.weight
    own = [model.get_parameter(rows.param) for rows in (site.up_rows, site.gate_rows, site.down_rows) if rows]
    return CodedFFN(
        format=format,
        router=None if linear is None else int8_rows(linear.detach()),
        up=read(site.up_rows, weight[site.up_rows], site.d_ff),
        gate=None if site.gate_rows is None else read(site.gate_rows, weight[site.gate_rows], site.d_ff),
        down=down(site.down_rows, model.get_parameter(site.down_rows.param).detach(), site.d_ff),
        sources=tuple(Source(p) for p in (*own, *([] if linear is None else [linear]))),
    )


def _int8_rows(rows: NeuronRows, weight: Tensor, d_ff: int) -> Coded:
    if not holds_int8(weight):
        return int8_rows(rows.take(weight, d_ff))
    codes, scale = int8_parts(weight)
    return rows.take(codes, d_ff).contiguous(), rows.take(scale, d_ff).contiguous()


def _int4_rows(rows: NeuronRows, weight: Tensor, d_ff: int) -> Coded:
    """Of up and gate, and of down, whose neurons are its inputs."""
    return int4_of_neurons(rows, weight, d_ff) if holds_int4(weight) else int4_rows(rows.take(weight, d_ff))


def _int8_columns(rows: NeuronRows, weight: Tensor, d_ff: int) -> Coded:
    if not holds_int8(weight):
        return int8_columns(rows.take(weight, d_ff).t())
    codes, scale = int8_parts(weight)
    return rows.take(codes, d_ff).contiguous().t(), scale
