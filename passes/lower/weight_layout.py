"""How a lowered site's weights lie in memory: what the kernel gathers is contiguous. `unlower` lays them as before."""

from __future__ import annotations

from ltepass.routed.routed import Routed
from ltepass.routed.sites import FFNSite
from ltepass.routed.undo import lay_as


def lay_out(routed: Routed, site: FFNSite) -> dict[str, tuple[int, ...]]:
    """Store what the kernel gathers so that it is contiguous: same logical shape, no copy kept.

    That is a neuron; of up and gate an input, where small inputs are left out. Returns the strides that were, by name.
    """
    before = {}
    by_input = routed.router(site).input_cut is not None
    wanted = {site.down_rows: site.down_rows.dim}
    wanted |= {rows: 1 - rows.dim if by_input else rows.dim for rows in (site.up_rows, site.gate_rows) if rows}
    for rows, contiguous_along in wanted.items():
        parameter = routed.model.get_parameter(rows.param)
        if contiguous_along == 1 and parameter.device.type == "cpu" and not parameter.is_meta:
            before[rows.param] = parameter.stride()
            parameter.data = parameter.data.t().contiguous().t()
    return before


def give_back_strides(routed: Routed) -> None:
    """Of the weights that still lie as `lay_out` stored them: others were replaced meanwhile."""
    parameters = dict(routed.model.named_parameters(remove_duplicate=False))
    for name, stride in routed.state.strides.items():
        parameter = parameters.get(name)
        if parameter is not None and parameter.dim() == 2 and parameter.t().is_contiguous():
            lay_as(parameter, stride)
    routed.state.strides = {}
