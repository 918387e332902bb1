"""Fewer neurons in an FFN: its parameters with the rows of those that stay, and the sites that say where these lie."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ltepass.errors import PruningError
from ltepass.routed.sites import FFNSite, NeuronRows

Neurons = tuple[NeuronRows, ...]  # of a site: what sites that share their weights have in common


def narrow(model: nn.Module, sites: Sequence[FFNSite], kept: Mapping[Neurons, Tensor]) -> list[FFNSite]:
    """Take all other neurons out of the model's FFNs, in new parameters of the same names.

    kept: by a site's `neurons`, those that stay: int64, ascending. Returns the sites as they are then. What a failing
    call leaves is undone by the modules' attributes alone. Raises PruningError.
    """
    moved: dict[NeuronRows, NeuronRows] = {}
    for neurons, site in {s.neurons: s for s in sites}.items():
        by_name: dict[str, list[NeuronRows]] = defaultdict(list)
        for rows in neurons:
            by_name[rows.param].append(rows)
        for name, together in by_name.items():
            moved |= _narrow_one(model, site, name, together, kept[neurons])
    return [_moved(site, moved, len(kept[site.neurons])) for site in sites]


def _narrow_one(
    model: nn.Module, site: FFNSite, name: str, together: Sequence[NeuronRows], kept: Tensor
) -> dict[NeuronRows, NeuronRows]:
    """One parameter, in which a neuron may have several rows (gate and up in one linear)."""
    old, dim = model.get_parameter(name), together[0].dim
    stays = torch.ones(old.shape[dim], dtype=torch.bool)
    places = {rows: torch.tensor(rows.indices(site.d_ff)) for rows in together}
    for indices in places.values():
        stays[indices] = False
        stays[indices[kept]] = True
    number = stays.cumsum(0) - 1
    moved = {rows: _renumbered(site, rows, number[indices[kept]].tolist()) for rows, indices in places.items()}
    _put(model, old, old.detach().index_select(dim, stays.nonzero()[:, 0].to(old.device)))
    return moved


def _renumbered(site: FFNSite, rows: NeuronRows, places: list[int]) -> NeuronRows:
    step = places[1] - places[0] if len(places) > 1 else 1
    now = replace(rows, start=places[0], step=step)
    if list(now.indices(len(places))) != places:
        raise PruningError(
            f"{site.name}: the neurons that stay lie in no regular order in {rows.param}; expected steps of one size; "
            "please report this class"
        )
    return now


def _moved(site: FFNSite, moved: Mapping[NeuronRows, NeuronRows], d_ff: int) -> FFNSite:
    return replace(
        site,
        d_ff=d_ff,
        up_rows=moved[site.up_rows],
        up_bias=site.up_bias and moved[site.up_bias],
        gate_rows=site.gate_rows and moved[site.gate_rows],
        gate_bias=site.gate_bias and moved[site.gate_bias],
        down_rows=moved[site.down_rows],
        neurons=tuple(moved[rows] for rows in site.neurons),
    )


def narrow_to(model: nn.Module, sites: Sequence[FFNSite]) -> bool:
    """Make a freshly built model's FFNs as narrow as a checkpoint's sites say, whose weights then fill them.

    Sizes alone: what a wrong list says beside them is refused by later checks. Returns whether any was wider.
    """
    held, sizes = dict(model.named_parameters(remove_duplicate=False)), dict[int, tuple[nn.Parameter, list[int]]]()
    for site in {s.neurons: s for s in sites}.values():
        down = held.get(site.down_rows.param)
        if down is None or down.dim() <= site.down_rows.dim:
            continue
        fewer = down.shape[site.down_rows.dim] - site.d_ff
        for rows in site.neurons if fewer > 0 else ():
            parameter = held.get(rows.param)
            if parameter is not None and parameter.dim() > rows.dim:
                _, size = sizes.setdefault(id(parameter), (parameter, list(parameter.shape)))
                size[rows.dim] -= fewer
    for parameter, size in sizes.values():
        if min(size) > 0:
            _put(model, parameter, parameter.detach().new_empty(size))
    return bool(sizes)


def _put(model: nn.Module, old: nn.Parameter, values: Tensor) -> None:
    """In the place of a parameter, wherever the model holds it."""
    new = nn.Parameter(values, requires_grad=old.requires_grad)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is old:
                module._parameters[name] = new
                _say_sizes(module, new)


def _say_sizes(module: nn.Module, weight: Tensor) -> None:
    """What a linear says of itself follows its weight."""
    if isinstance(module, nn.Linear) and weight.dim() == 2:
        module.out_features, module.in_features = weight.shape
    elif type(module).__name__ == "Conv1D" and weight.dim() == 2:  # transformers': the other way round
        module.nx, module.nf = weight.shape  # type: ignore[assignment]
