"""What a checkpoint's site list says, compared with the model that it is to change, before it is changed.

The list is foreign: each statement that the library relies on later is checked here, and a wrong one is a
CheckpointError. Sizes are the model's own, so nothing is allocated for what a list alone claims.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from torch import Tensor, nn
from torch.fx import GraphModule

from ltepass.errors import CheckpointError
from ltepass.routed.sites import ROWS, FFNSite, NeuronRows, site_name

_ROUTER = re.compile(r"(lte_)?router(_\d+)?", re.ASCII)


@dataclass(frozen=True)
class _Tree:
    """The model by name; what it holds under several names stands under each."""

    name: str
    modules: dict[str, nn.Module]
    parameters: dict[str, nn.Parameter]

    @staticmethod
    def of(model: nn.Module) -> _Tree:
        modules = dict(model.named_modules(remove_duplicate=False))
        parameters = dict(model.named_parameters(remove_duplicate=False))
        ties = getattr(model, "all_tied_weights_keys", None) or {}  # which transformers makes one after they are loaded
        parameters |= {one: parameters[other] for one, other in ties.items() if other in parameters}
        return _Tree(type(model).__name__, modules, parameters)

    def own(self, path: str) -> dict[str, nn.Parameter]:
        """A module's own parameters by their last name."""
        names = [name for name, p in self.modules[path]._parameters.items() if p is not None]
        return {name: self.parameters[f"{path}.{name}".lstrip(".")] for name in names}


def check_sites(model: nn.Module, sites: Sequence[FFNSite]) -> None:
    """Raises CheckpointError where the list does not fit the model. Changes nothing."""
    tree = _Tree.of(model)
    for site in sites:
        _check_inside(tree, site)
        _check_modules(tree, site)
        _check_rows(tree, site)
        _check_neurons(tree, site)
        if site.kind == "graph":
            _check_graph(model, site)
    _check_together(tree, sites)


def is_router(path: str) -> bool:
    """Whether the last part of a path is a name that `transform` gives to routers."""
    return _ROUTER.fullmatch(path.rpartition(".")[2]) is not None


def below(path: str, owner: str) -> bool:
    return path != owner and (not owner or path.startswith(owner + "."))


def _refuse(site: FFNSite, what: str) -> NoReturn:
    raise CheckpointError(
        f"site {site.name} of the checkpoint: {what}; config and model do not belong together: save the model again, "
        "or delete quantization_config to load it dense"
    )


def _check_inside(tree: _Tree, site: FFNSite) -> None:
    for rows in site.neurons:
        parameter = tree.parameters.get(rows.param)
        if parameter is None or rows.dim >= parameter.dim() or rows.indices(site.d_ff)[-1] >= parameter.shape[rows.dim]:
            seen = "no such parameter" if parameter is None else f"shape {tuple(parameter.shape)}"
            _refuse(site, f"expects {site.d_ff} neurons in {rows.param}, and this {tree.name} has {seen}")


def _check_modules(tree: _Tree, site: FFNSite) -> None:
    """The site's paths are modules of the model, below its owner, and its router has a free name there."""
    for path in (site.owner, site.up, site.gate, site.down):
        if path is not None and path not in tree.modules:
            _refuse(site, f"this {tree.name} has no such module {path}")
        if path is not None and path != site.owner and site.kind != "graph" and not below(path, site.owner):
            _refuse(site, f"{path} does not lie below its owner {site.owner}")
    if site.owner in (site.up, site.gate, site.down) and site.kind != "graph":
        _refuse(site, f"its owner {site.owner} is one of its linears")
    if site.name != site_name(site, site.number):
        _refuse(site, f"its name is not that of its owner {site.owner or 'the root'}")
    parent, _, name = site.router.rpartition(".")
    if parent != site.owner or not is_router(name):
        _refuse(site, f"{site.router} is no name of a router in {site.owner or 'the root'}")
    if hasattr(tree.modules[site.owner], name):
        _refuse(site, f"{site.router} is there already")


def _check_rows(tree: _Tree, site: FFNSite) -> None:
    """Rows have the sizes that the site says, and lie in the linears that it names."""
    for path, rows, bias in ((site.up, site.up_rows, site.up_bias), (site.gate, site.gate_rows, site.gate_bias)):
        if path is not None and rows is not None:
            _check_weight(tree, site, path, rows, site.d_model)
            _check_bias(tree, site, path, rows, bias)
    _check_weight(tree, site, site.down, site.down_rows, site.d_out)
    width = tree.parameters[site.down_rows.param].shape[site.down_rows.dim]
    if width != site.d_ff or site.down_rows.start or site.down_rows.step != 1:
        _refuse(site, f"the down projection reads {width} neurons, all of them in order")
    _check_down_bias(tree, site)


def _check_weight(tree: _Tree, site: FFNSite, path: str, rows: NeuronRows, width: int) -> None:
    weight = tree.parameters[rows.param]
    if weight.dim() != 2 or weight.shape[1 - rows.dim] != width:
        _refuse(site, f"{rows.param} has shape {tuple(weight.shape)}; the site says {width} features there")
    if site.kind != "graph" and not _holds(tree, path, weight):
        _refuse(site, f"{rows.param} is no parameter of {path}")


def _check_bias(tree: _Tree, site: FFNSite, path: str, rows: NeuronRows, bias: NeuronRows | None) -> None:
    own = tree.own(path).get("bias")
    said = tree.parameters[bias.param] if bias else None
    if own is not None and own is not said and _adds_its_bias(tree.modules[path]) and site.kind != "graph":
        _refuse(site, f"says nothing of the bias of {path}")
    if bias and said is not None and (said.dim() != 1 or (bias.start, bias.step) != (rows.start, rows.step)):
        _refuse(site, f"{bias.param} is no bias with the same rows as {rows.param}")


def _check_down_bias(tree: _Tree, site: FFNSite) -> None:
    own = tree.own(site.down).get("bias")
    if site.down_bias is None:
        if own is not None and _adds_its_bias(tree.modules[site.down]) and site.kind != "graph":
            _refuse(site, f"says nothing of the bias of {site.down}")
        return
    bias = tree.parameters.get(site.down_bias)
    if bias is None or tuple(bias.shape) != (site.d_out,):
        _refuse(site, f"{site.down_bias} is no bias of {site.d_out} features")
    if site.kind != "graph" and not _holds(tree, site.down, bias):
        _refuse(site, f"{site.down_bias} is no parameter of {site.down}")


def _adds_its_bias(module: nn.Module) -> bool:
    return type(module) is nn.Linear or type(module).__name__ == "Conv1D"


def _holds(tree: _Tree, path: str, parameter: Tensor) -> bool:
    return any(p is parameter for p in tree.own(path).values())


def _check_neurons(tree: _Tree, site: FFNSite) -> None:
    """The list of what a permutation moves: the linears' rows, and leaves of the region with one entry a neuron."""
    if site.d_ff % site.group_size:
        _refuse(site, f"group_size {site.group_size} does not divide {site.d_ff} neurons")
    linears = {getattr(site, f) for f in ROWS}
    for rows in site.neurons:
        if rows not in linears:
            parameter = tree.parameters[rows.param]
            if rows.dim != parameter.dim() - 1 or not (site.kind == "graph" or below(rows.param, site.owner)):
                _refuse(site, f"{rows.param} has no entry for each of its neurons")
    taken: dict[int, tuple[int, set[int]]] = {}
    for rows in site.neurons:
        dim, seen = taken.setdefault(id(tree.parameters[rows.param]), (rows.dim, set()))
        if dim != rows.dim or not seen.isdisjoint(rows.indices(site.d_ff)):
            _refuse(site, f"a row of {rows.param} stands for two neurons")
        seen.update(rows.indices(site.d_ff))


def _check_graph(model: nn.Module, site: FFNSite) -> None:
    """The site's nodes are x, hidden units and down projection of one FFN of a user's graph."""
    if not isinstance(model, GraphModule):
        _refuse(site, f"is one of a GraphModule, and this is a {type(model).__name__}")
    by_name = {n.name: n for n in model.graph.nodes}
    unknown = [name for name in site.nodes if name not in by_name]
    if unknown:
        _refuse(site, f"the graph has no node {unknown[0]}")
    x, h, down = (by_name[name] for name in site.nodes)
    behind, stack = {h}, [h]
    while stack:
        new = [n for n in stack.pop().all_input_nodes if n not in behind]
        behind.update(new)
        stack += new
    if h not in down.all_input_nodes or x not in behind or x is h or down in behind:
        _refuse(site, f"{', '.join(site.nodes)} are no input, hidden units and down projection of one FFN")


def _check_together(tree: _Tree, sites: Sequence[FFNSite]) -> None:
    """Names are the sites' own; each linear stands in one site; those that share weights share their neurons' order."""
    owners = [(id(tree.modules[s.owner]), s.router.rpartition(".")[2]) for s in sites]
    linears = [id(tree.modules[path]) for s in sites if s.kind != "graph" for path in {s.up, s.gate or s.up, s.down}]
    downs = [s.nodes[2] for s in sites if s.kind == "graph"]
    for what, keys in (("name", [s.name for s in sites]), ("router", owners), ("linear", linears), ("node", downs)):
        if len(set(keys)) != len(keys):
            raise CheckpointError(
                f"the checkpoint lists {len(sites)} sites and gives two of them one {what}; expected each once: save "
                "the model again"
            )
    claims: dict[int, set[tuple[NeuronRows, ...]]] = defaultdict(set)
    for site in sites:
        for rows in site.neurons:
            claims[id(tree.parameters[rows.param])].add(site.neurons)
        if any(len(claims[id(tree.parameters[rows.param])]) > 1 for rows in site.neurons):
            _refuse(site, "another site counts other neurons in its parameters")
