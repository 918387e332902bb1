"""What an up linear of a lowered inline site hands on: zeros that the activation runs on, and that nobody reads.

The sparse op computes the whole FFN where down is called, so that one token of zeros will do, where the owner's code
between the linears reads nothing but them: it then takes every size from them too. Else zeros of the whole shape.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from torch.fx import Graph, Node

from ltepass.passes.capture.trace_owner import trace_owner


class Stub:
    """Stands for a linear's forward; width: its output features."""

    def __init__(self, width: int, *, one_token: bool) -> None:
        self.width, self.one_token = width, one_token

    def __call__(self, x: Tensor) -> Tensor:
        tokens = (1,) * (x.dim() - 1) if self.one_token else x.shape[:-1]
        return x.new_zeros((*tokens, self.width))


def one_token_will_do(owner: nn.Module, ups: Iterable[str], down: str) -> bool:
    """Whether up linears may hand on zeros of one token: nothing else is read between the linears. False where the
    owner's forward cannot be read.
    """
    paths = {*ups, down}
    parents = {".".join(path.split(".")[:i]) for path in paths for i in range(1, path.count(".") + 1)}
    if any(m._forward_hooks or m._forward_pre_hooks for m in map(owner.get_submodule, parents)):
        return False  # a trace would run them
    graphs = trace_owner(owner, defaults=True, through=paths)
    return graphs is not None and all(_apart(graph, paths - {down}, down) for graph in graphs)


def _apart(graph: Graph, ups: set[str], down: str) -> bool:
    """Whether zeros of one token can go from the up linears to down: what lies between reads nothing else, and nothing
    else reads it.
    """
    called = {str(n.target): n for n in graph.nodes if n.op == "call_module"}
    if not {*ups, down} <= called.keys():
        return False
    end, starts = called[down], {called[path] for path in ups}
    between, todo = set(starts), list(starts)
    while todo:
        for user in todo.pop().users:
            if user is not end and user not in between:
                between.add(user)
                todo.append(user)
    inner = between - starts
    return (
        end not in between and all(_reads_only(n, between) for n in inner) and not any(n.op == "output" for n in inner)
    )


def _reads_only(node: Node, between: set[Node]) -> bool:
    return all(source in between or source.op == "get_attr" for source in node.all_input_nodes)
