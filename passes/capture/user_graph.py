"""Graphs that users bring: captured on fake tensors, in one dialect.

    before:  h = call_module[mlp.up](x);      a = call_module[mlp.act](h)
    after:   h = linear(x, mlp.up.weight, mlp.up.bias);      a = silu(h)

Legal because a leaf module's forward is traced and pasted in place, with the same parameters by reference. Leaves that
cannot be traced stay as they are; the matcher then stops at them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node, Tracer
from torch.fx.node import Argument, map_arg

from ltepass.errors import CaptureError
from ltepass.passes.capture.example_inputs import described
from ltepass.passes.graph.captured import Captured
from ltepass.passes.graph.leaves_and_linears import Flow


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


def capture_user_graph(gm: GraphModule, args: Sequence[object], kwargs: Mapping[str, object]) -> Captured:
    """Shapes for a user's graph, on a copy whose plain leaf modules are inlined."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    flat = inline_leaf_modules(gm)
    placeholders = [n for n in flat.graph.nodes if n.op == "placeholder"]
    try:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        values = _bind(placeholders, args, kwargs)
        with torch.no_grad():
            FakeTensorProp(flat, mode).propagate(*values)
    except MemoryError:
        raise  # other inputs would not help
    except Exception as e:
        raise CaptureError(
            f"the GraphModule could not be run on fake tensors with {described(args, kwargs)}: "
            f"{type(e).__name__}: {e}; pass example_inputs for its {len(placeholders)} placeholders"
        ) from e
    leaves = {
        n: str(n.target) for n in flat.graph.nodes if n.op == "get_attr" and isinstance(n.meta.get("val"), Tensor)
    }
    return Captured(flow=Flow(flat, leaves))


def _bind(placeholders: Sequence[Node], args: Sequence[object], kwargs: Mapping[str, object]) -> list[object]:
    """Values in placeholder order: positional, then by name, then the value that the graph itself was traced with."""
    out: list[object] = list(args)
    for node in placeholders[len(out) :]:
        if str(node.target) in kwargs:
            out.append(kwargs[str(node.target)])
        elif node.args:
            out.append(node.args[0])
        else:
            val = node.meta.get("val", node.meta.get("example_value"))
            if val is None:
                raise ValueError(f"no value for placeholder {node.target}")
            out.append(torch.empty(tuple(int(s) for s in val.shape), dtype=val.dtype))
    return out
