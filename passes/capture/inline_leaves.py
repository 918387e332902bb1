"""normalize: one dialect for graphs that users bring.

    before:  h = call_module[mlp.up](x);      a = call_module[mlp.act](h)
    after:   h = linear(x, mlp.up.weight, mlp.up.bias);      a = silu(h)

Legal because a leaf module's forward is traced and pasted in place, with the same parameters by reference. Leaves that
cannot be traced stay as they are; the matcher then stops at them.
"""

from __future__ import annotations

from torch import nn
from torch.fx import Graph, GraphModule, Node, Tracer
from torch.fx.node import Argument, map_arg


class _DeepTracer(Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return False


def inline_leaf_modules(gm: GraphModule) -> GraphModule:
    """A copy of the graph with every traceable call_module pasted in. Parameters are shared with `gm`."""
    graph = Graph()
    env: dict[Node, Argument] = {}
    for node in gm.graph.nodes:
        if node.op == "call_module":
            child = gm.get_submodule(str(node.target))
            env[node] = _paste(graph, node, child, env)
        elif node.op == "output":
            graph.output(map_arg(node.args[0], lambda n: env[n]))
        else:
            env[node] = _copy(graph, node, env, origin=node)
    return GraphModule(gm, graph)


def _copy(graph: Graph, node: Node, env: dict[Node, Argument], origin: Node) -> Node:
    """Copy a node, noting which node of the user's own graph it stands for: passes that edit that graph find it."""
    new = graph.node_copy(node, lambda n: env[n])
    new.meta = {**node.meta, "origin": origin}
    return new


def _paste(graph: Graph, call: Node, child: nn.Module, env: dict[Node, Argument]) -> Argument:
    try:
        inner = _DeepTracer().trace(child)
    except Exception:  # whatever the tracer cannot read stays a leaf: the matcher stops there
        return _copy(graph, call, env, origin=call)
    inner_env: dict[Node, Argument] = {}
    arguments = [env[a] if isinstance(a, Node) else a for a in call.args]
    result: Argument = None
    for node in inner.nodes:
        if node.op == "placeholder":
            name = str(node.target).lstrip("*")
            default = node.args[0] if node.args else None
            bound = call.kwargs.get(name, default)
            inner_env[node] = arguments.pop(0) if arguments else (env[bound] if isinstance(bound, Node) else bound)
        elif node.op == "output":
            result = map_arg(node.args[0], lambda n: inner_env[n])
        else:
            new = _copy(graph, node, inner_env, origin=call)
            if node.op in ("get_attr", "call_module"):
                new.target = f"{call.target}.{node.target}"
            inner_env[node] = new
    return result
