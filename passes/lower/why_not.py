"""Which sites the op may stand for: what would not run then, and what the op does not read.

What holds of a site holds of its region in Dynamo's graph too, and is said in the same words (`lower_routed_ffn.py`).
Of a site it is asked twice: before lowering, where the answer is a note; and at every call of a lowered site, where it
is an error.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.modules.module import _has_any_global_hook

from ltepass.passes.capture.replaced_forwards import is_replaced
from ltepass.passes.graph.captured import join
from ltepass.passes.graph.node_kinds import breadth_first
from ltepass.passes.insert.hooks import Hook, SparseDown
from ltepass.passes.lower.stubs import Stub
from ltepass.routed.gate import gate
from ltepass.routed.routed import Routed
from ltepass.routed.sites import FFNSite

SMALL_INPUTS_ON_GPU = "small inputs are left out, which no GPU kernel does"


def unknown_activation(activation: str) -> str:
    return f"no kernel knows its activation {activation}"


def also_scales(parameter: str) -> str:
    return f"{parameter} also scales its neurons"


def why_not(routed: Routed, site: FFNSite) -> str | None:
    """Why a site stays masked-dense, or None where the op computes just what the site computes."""
    model, router = routed.model, routed.router(site)
    if site.activation.startswith("custom"):
        return unknown_activation(site.activation)
    rows = {site.up_rows, site.gate_rows, site.up_bias, site.gate_bias, site.down_rows}
    if router.input_cut is not None and router.weight.is_cuda:
        return SMALL_INPUTS_ON_GPU
    extra = [r.param for r in site.neurons if r not in rows]
    if extra:
        return also_scales(extra[0])
    for rows_of, path in ((site.up_bias, site.up), (site.gate_bias, site.gate)):
        if rows_of is None or path is None or site.kind == "graph":
            continue
        if not _has_bias(model, path, rows_of.param):
            return f"{rows_of.param} is added apart from {path}"
    linears = dict.fromkeys(p for p in (site.up, site.gate, site.down) if p is not None)
    for path in linears:
        if site.kind == "graph" and path not in _called_modules(model):
            continue  # the graph itself holds the product
        reason = not_plain(model.get_submodule(path))
        if reason is not None:
            return f"{path} {reason}"
    return _why_not_held(model, site)


def _why_not_held(model: nn.Module, site: FFNSite) -> str | None:
    """Whether the linears hold the weights that transform found there, and all of them."""
    for rows in (r for r in (site.up_rows, site.gate_rows, site.down_rows) if r is not None):
        last, held = rows.start + (site.d_ff - 1) * rows.step, find_parameter(model, rows.param)
        if held is None:
            return f"{rows.param} is no parameter any more: the weight is computed"
        if last >= held.shape[rows.dim]:
            return f"{rows.param} holds a part of the neurons here: the model is split over devices"
    return None


def why_not_alone(model: nn.Module, site: FFNSite) -> str | None:
    """Why a site may not call the op by itself; where Dynamo traces the model, its graph says what hooks do."""
    if _has_any_global_hook():
        return GLOBAL_HOOK
    paths = [p for p in (site.up, site.gate, site.down) if p is not None]
    if site.kind == "graph":
        paths = [p for p in paths if p in _called_modules(model)]
    elif is_replaced(model.get_submodule(site.owner)):
        return f"{site.owner} runs a forward that was put on the instance"
    reasons = ((path, bypassed_code(model.get_submodule(path))) for path in dict.fromkeys(paths + idle(model, site)))
    return next((f"{path} {reason}" for path, reason in reasons if reason is not None), None)


GLOBAL_HOOK = (
    "a hook for all modules (torch.nn.modules.module.register_module_forward_hook) is one that the op would bypass"
)


def idle(model: nn.Module, site: FFNSite) -> list[str]:
    """Beside the linears, what is not called where the op stands, or runs on zeros: nobody may look there."""
    if site.kind == "graph":
        return with_inner(model, (*_called_between(model, site), site.router))
    return with_inner(model, (*_activations(model, site), site.router)) + _around(site)


def with_inner(root: nn.Module, paths: Iterable[str]) -> list[str]:
    """These paths, and those of all modules below."""
    found = (join(path, name) for path in paths for name, _ in root.get_submodule(path).named_modules())
    return list(dict.fromkeys(found))


def _activations(model: nn.Module, site: FFNSite) -> list[str]:
    """What may lie between the linears: modules without parameters beside one of them, or in the owner."""
    parents = {path.rpartition(".")[0] for path in (site.up, site.gate, site.down) if path is not None} | {site.owner}
    beside = [(join(parent, name), m) for parent in parents for name, m in model.get_submodule(parent).named_children()]
    return sorted(path for path, m in beside if next(m.parameters(), None) is None)


def _around(site: FFNSite) -> list[str]:
    """The modules below the owner that call a linear, which take or hand on zeros."""
    found: dict[str, None] = {}
    for path in (site.up, site.gate or site.up, site.down):
        parent = path.rpartition(".")[0]
        while len(parent) > len(site.owner):
            found[parent] = None
            parent = parent.rpartition(".")[0]
    return list(found)


def _called_between(model: nn.Module, site: FFNSite) -> list[str]:
    """Modules that a user's graph calls between x and the hidden units."""
    assert isinstance(model, GraphModule)
    gated = next(n for n in model.graph.nodes if n.target is gate and n.args[0].target == site.router)
    _, h, logits = gated.args
    before = set(breadth_first(logits.args[0], lambda n: n.all_input_nodes))
    between = [n for n in breadth_first(h, lambda n: n.all_input_nodes) if n not in before]
    return [str(n.target) for n in between if n.op == "call_module"]


def _has_bias(model: nn.Module, path: str, name: str) -> bool:
    """Whether the linear at `path` adds this parameter itself, also where another module shares it and names it."""
    if name.rpartition(".")[0] == path:
        return True
    own = model.get_submodule(path)._parameters.get("bias")
    return own is not None and any(p is own for n, p in model.named_parameters(remove_duplicate=False) if n == name)


def _called_modules(model: nn.Module) -> set[str]:
    assert isinstance(model, GraphModule)
    return {str(n.target) for n in model.graph.nodes if n.op == "call_module"}


def not_plain(module: nn.Module) -> str | None:
    """What makes a linear's forward more than the matrix product with tensors of torch's own; None for a plain one."""
    if "_hf_hook" in module.__dict__:
        return "carries an offload hook, which the op would bypass"
    if not is_product(module):
        return f"is a {type(module).__module__}.{type(module).__name__}, not a plain linear"
    for tensor in parameters_of(module):
        if tensor is not None and not is_ordinary(tensor):
            return f"holds a {type(tensor).__module__}.{type(tensor).__name__}, which the op does not read"
    return None


def bypassed_code(module: nn.Module) -> str | None:
    """What runs with this module's call, and would not where the op stands in its place."""
    if untouched(module):
        return None
    hooks = [h for name in _HOOKS for h in module.__dict__[name].values() if not isinstance(h, Hook)]
    if hooks:
        name = getattr(hooks[0], "__qualname__", type(hooks[0]).__name__)
        return f"carries a hook, {name}, which the op would bypass"
    return "runs a forward that was put on the instance, which the op would bypass"


def untouched(module: nn.Module) -> bool:
    """No hooks but ours, no other forward than the class's or ours; in as little time as can be."""
    own = module.__dict__
    if own["_forward_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return False
    before = own["_forward_pre_hooks"]
    if before and not all(isinstance(h, Hook) for h in before.values()):
        return False
    return "forward" not in own or isinstance(own["forward"], (Stub, SparseDown)) or not is_replaced(module)


def plain(module: nn.Module) -> bool:
    """Whether a module's call is a matrix product, and nothing runs with it."""
    return (type(module) is nn.Linear or is_product(module)) and untouched(module)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_product(module: nn.Module) -> bool:
    """A linear whose forward is the matrix product and nothing else: no subclass."""
    cls = type(module)
    return cls is nn.Linear or is_conv1d(module) or f"{cls.__module__}.{cls.__name__}" in _SAME_AS_LINEAR


def is_ordinary(tensor: Tensor) -> bool:
    """No subclass with operations of its own (quantised, distributed); fake tensors stand for ordinary ones."""
    cls = type(tensor)
    return cls is nn.Parameter or cls is Tensor or cls.__module__.startswith("torch._subclasses.")


# Subclasses of nn.Linear whose forward is the same product spelled out.
_SAME_AS_LINEAR = frozenset({"transformers.models.falcon.modeling_falcon.FalconLinear"})


def is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def find_parameter(model: nn.Module, name: str) -> nn.Parameter | None:
    """A parameter by its name; None where pruning or a parametrisation computes it from others."""
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path)._parameters.get(attribute)


def parameters_of(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """(weight, bias), without nn.Module.__getattr__, which costs more than the rest of a small FFN's call."""
    own = linear._parameters
    weight = own.get("weight")
    if weight is None:  # a DataParallel replica keeps plain tensors as attributes
        return linear.weight, linear.bias  # type: ignore[return-value]
    return weight, own.get("bias")
