"""How much of an FFN's weights a token reads, and how much is held for it: bytes, and bits a weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ltepass.routed.routed import Routed
from ltepass.routed.router import Router
from ltepass.routed.sites import FFNSite, NeuronRows, find_parameter, read_rows
from ltepass.routed.tiered_router import TieredRouter
from ltepass.routed.torchao_weights import holds_codes, holds_int4, holds_int8, int4_of_neurons, int8_parts


@dataclass(frozen=True)
class FFNBits:
    """Mean over all weights of gate, up and down; routers, scales and codes are counted.

    Arguments:
        read: by one token, at the sparsity that the thresholds are placed for.
        held: for that; with inactive="low_bit" the planes, without the linears' own weights, which serve dense mode.
    Raises: nothing.
    Example:
        >>> bits = ltepass.report(model).bits  # calibrated at 50 %, in fp32
        >>> 16 < bits.read < bits.held / 1.5
        True
    """

    read: float
    held: float


def ffn_bits(routed: Routed) -> FFNBits | None:
    """None where no table says how many neurons are active, or a weight is no parameter any more."""
    read, held, weights = 0.0, 0, 0
    for site, router in routed:
        nbytes = bytes_by_neuron(routed, site, router)
        if router.density is None or nbytes is None:
            return None
        everything = [t for t in (*router.operands(), *router.planes_of_down(), *router.low_planes()) if t is not None]
        everything += _scales_of_down(routed, site) if router.coded is None else router.coded.whole()
        all_held = sum(t.nbytes for t in everything) + sum(nbytes.values())
        read += all_held - unread(routed, site, router, nbytes, router.density)
        held += all_held - (sum(nbytes.values()) if router.tiered else 0)
        weights += ((1 if site.gate_rows is None else 2) * site.d_model + site.d_out) * site.d_ff
    return FFNBits(8 * read / weights, 8 * held / weights)


def bytes_by_neuron(routed: Routed, site: FFNSite, router: Router) -> dict[NeuronRows, int] | None:
    """Of what is read for active neurons alone, by the rows that it stands for; None where one is no parameter."""
    own = {rows: _held(routed, site, rows) for rows in site.neurons}
    nbytes = {rows: _nbytes(held) for rows, held in own.items() if held}
    if len(nbytes) < len(own):
        return None
    return nbytes if router.coded is None else nbytes | router.coded.by_neuron(site)


def _held(routed: Routed, site: FFNSite, rows: NeuronRows) -> tuple[Tensor, ...]:
    """The neurons' rows of one parameter; of one in codes these, and the scales that are a neuron's own."""
    floats = read_rows(routed.model, site, rows)
    if floats is not None:
        return (floats,)
    held = find_parameter(routed.model, rows.param)
    if held is None or not holds_codes(held):
        return ()
    if holds_int4(held):
        return int4_of_neurons(rows, held, site.d_ff)
    codes, scale = int8_parts(held)
    return (rows.take(codes, site.d_ff), *([rows.take(scale, site.d_ff)] if rows.dim == 0 else []))


def _scales_of_down(routed: Routed, site: FFNSite) -> list[Tensor]:
    """In int8: one an output, which every token reads."""
    down = find_parameter(routed.model, site.down_rows.param)
    return [int8_parts(down)[1]] if down is not None and holds_int8(down) else []


def unread(routed: Routed, site: FFNSite, router: Router, nbytes: Mapping[NeuronRows, int], active: float) -> float:
    """Of an FFN's bytes, its own weights' and its router's planes': those that a token leaves alone.

    active: share of neurons. nbytes: of the weights by their rows. Cuts count with the share that they were set for:
    units that `hidden_sparsity` leaves out are not read by down, inputs that `input_sparsity` leaves out not by up and
    gate.
    """
    if router.tiered:
        # Packed, all of down's high plane is read.
        whole = isinstance(router, TieredRouter) and router.packed_once is not None
        kept = 1.0 if whole else max(active, 1.0 - float(routed.config["low_bit_sparsity"]))
        planes = (1 - kept) * _nbytes(router.planes_of_down()) + (1 - active) * _nbytes(router.low_planes())
        return planes + sum(nbytes.values())
    inputs, hidden = (float(routed.config.get(name) or 0) for name in ("input_sparsity", "hidden_sparsity"))
    cuts = {rows: inputs for rows in (site.up_rows, site.gate_rows) if rows is not None}
    cuts[site.down_rows] = hidden
    return sum(n * (1 - active * (1 - cuts.get(rows, 0.0))) for rows, n in nbytes.items())


def _nbytes(tensors: tuple[Tensor, ...]) -> int:
    return sum(t.nbytes for t in tensors)
