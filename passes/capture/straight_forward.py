"""Which forwards may be regenerated from a trace: those whose trace is all that they do, for ever.

A trace keeps as constants what the forward reads of the world (a global, a property, another module's attribute) and
whichever branch it takes. So only a straight forward is traced: it reads nothing but its children, their tensors,
`training` and its own attributes, which stay reads; calls nothing but these, functions of torch and methods of tensors;
and does not branch. All others are gated by hooks, around the module's own code, as is what has no source to be read.
"""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
import math
import textwrap
import warnings
from collections.abc import Callable, Mapping
from types import BuiltinFunctionType, FunctionType, MethodDescriptorType, ModuleType

import torch
from torch import Tensor, nn

_VALUE = object()  # something computed: a tensor, or what is made of tensors
_CHILD = object()  # a child that a loop hands out: which one is known when it runs
_OTHER = object()  # anything else, whose use makes a forward crooked
_COMPARISONS = (ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Eq, ast.NotEq)
_CONSTANTS = (torch.dtype, torch.layout, torch.memory_format)
_OF_CHILDREN = ("children", "_modules")


def is_straight(owner: nn.Module, original: type[nn.Module]) -> bool:
    """Whether a trace of `original.forward`, run on this owner, says all that it will ever do."""
    forward = original.forward
    if forward is nn.Sequential.forward:  # a loop over its children
        return True
    if not isinstance(forward, FunctionType):
        return False
    function = _parse(forward)
    return function is not None and _Reader(owner, forward, function).straight()


def attributes(owner: nn.Module) -> list[str]:
    """Names of what a forward may read of its owner beside children and tensors: what the instance holds itself, and no
    module has anyway.
    """
    ours = ("forward", "_old_forward", "_hf_hook")
    own = ((k, v) for k, v in owner.__dict__.items() if k not in _OF_MODULES and k not in ours and k.isidentifier())
    return [k for k, v in own if not isinstance(v, (Tensor, nn.Module)) and not k.startswith(("_lte_", "__"))]


_OF_MODULES = frozenset(nn.Module().__dict__) | {"_is_hf_initialized", "_compiled_call_impl", "_is_fsdp_managed_module"}


@functools.lru_cache(maxsize=256)
def _parse(forward: Callable[..., object]) -> ast.FunctionDef | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it was compiled before, and has said so then
            (function,) = ast.parse(textwrap.dedent(inspect.getsource(forward))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    return function if isinstance(function, ast.FunctionDef) and not function.decorator_list else None


class _Reader:
    """Reads one forward, statement by statement. names: what each local name stands for."""

    def __init__(self, owner: nn.Module, forward: FunctionType, function: ast.FunctionDef) -> None:
        self.owner, self.function = owner, function
        me, *others = [a.arg for a in function.args.args]
        self.names: dict[str, object] = {me: owner, **dict.fromkeys(others, _VALUE)}
        cells = zip(forward.__code__.co_freevars, forward.__closure__ or (), strict=True)
        closed = {name: cell.cell_contents for name, cell in cells if name != "__class__"}
        self.outside: Mapping[str, object] = {**vars(builtins), **forward.__globals__, **closed}

    def straight(self) -> bool:
        return all(map(self._statement, self.function.body))

    def _statement(self, node: ast.stmt) -> bool:
        if isinstance(node, (ast.Expr, ast.Return)):
            return node.value is not None and self._value(node.value)
        if isinstance(node, ast.Assign):
            return self._value(node.value) and all(map(self._name, node.targets))
        if isinstance(node, (ast.AnnAssign, ast.AugAssign)):
            return node.value is not None and self._value(node.value) and self._name(node.target)
        if isinstance(node, ast.For) and isinstance(node.target, ast.Name) and not node.orelse:
            self.names[node.target.id] = _CHILD
            return self._holds_children(node.iter) and all(map(self._statement, node.body))
        return False

    def _name(self, target: ast.expr) -> bool:
        """A target of an assignment: local names, and no attribute, which a trace would not write."""
        if isinstance(target, (ast.Tuple, ast.List)):
            return all(map(self._name, target.elts))
        if not isinstance(target, ast.Name) or self.names.get(target.id) is self.owner:
            return False
        self.names[target.id] = _VALUE
        return True

    def _holds_children(self, node: ast.expr) -> bool:
        """`self`, `self.layers`, `self.children()`, `self._modules.values()`."""
        if isinstance(node, ast.Call) and not node.args and isinstance(node.func, ast.Attribute):
            inner = node.func.value
            if node.func.attr == "values" and isinstance(inner, ast.Attribute) and inner.attr == "_modules":
                return self._found(inner.value) is self.owner
            return node.func.attr == "children" and self._found(inner) is self.owner
        found = self._found(node)
        return isinstance(found, (nn.ModuleList, nn.Sequential))

    def _value(self, node: ast.expr | None) -> bool:
        """Whether an expression is computed from tensors, and reads nothing else that may change."""
        if node is None or isinstance(node, ast.Constant):
            return True
        if isinstance(node, ast.Name | ast.Attribute):
            found = self._found(node)
            return found is _VALUE or isinstance(found, (Tensor, *_CONSTANTS)) or self._is_flag(node)
        if isinstance(node, ast.Call):
            return self._call(node)
        if isinstance(node, ast.Compare):
            return all(isinstance(op, _COMPARISONS) for op in node.ops) and self._values(node.left, *node.comparators)
        if isinstance(node, ast.UnaryOp):
            return not isinstance(node.op, ast.Not) and self._value(node.operand)
        if isinstance(node, (ast.BinOp, ast.Subscript, ast.Slice, ast.Tuple, ast.List, ast.Starred)):
            return self._values(*(n for n in ast.iter_child_nodes(node) if isinstance(n, ast.expr)))
        return False

    def _values(self, *nodes: ast.expr) -> bool:
        return all(map(self._value, nodes))

    def _is_flag(self, node: ast.expr) -> bool:
        """`self.training`: training and evaluation are traced apart."""
        return isinstance(node, ast.Attribute) and node.attr == "training" and self._found(node.value) is self.owner

    def _call(self, node: ast.Call) -> bool:
        arguments = [*node.args, *(k.value for k in node.keywords)]
        if any(k.arg is None for k in node.keywords) or not self._values(*arguments):
            return False
        called = self._found(node.func)
        if called is _CHILD or (isinstance(called, nn.Module) and called is not self.owner):
            return True
        if called is _VALUE:
            return True  # a method of a tensor
        given = not all(isinstance(a, ast.Constant) for a in arguments)
        return _is_torch_function(called) and given

    def _found(self, node: ast.expr) -> object:
        """What an expression stands for without running it: an object, _VALUE, _CHILD or _OTHER."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id, self.outside.get(node.id, _OTHER))
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            held = self._found(node.value)
            if isinstance(held, (nn.ModuleList, nn.Sequential)) and isinstance(node.slice.value, int):
                return held[node.slice.value] if -len(held) <= node.slice.value < len(held) else _OTHER
        if not isinstance(node, ast.Attribute):
            return _VALUE if self._value(node) else _OTHER
        held = self._found(node.value)
        if held is _VALUE:
            return _VALUE
        if isinstance(held, nn.Module):
            own = {**held._parameters, **held._buffers, **held._modules}
            if own.get(node.attr) is not None:
                return own[node.attr]
            return _VALUE if held is self.owner and node.attr in attributes(held) else _OTHER
        of_torch = isinstance(held, ModuleType) and (held is math or held.__name__.split(".")[0] == "torch")
        return getattr(held, node.attr, _OTHER) if of_torch else _OTHER


def _is_torch_function(called: object) -> bool:
    """A function that FX puts into the graph, and none that asks what its argument is."""
    name = getattr(called, "__name__", "is_")
    if name.startswith("is_") or not isinstance(called, (FunctionType, BuiltinFunctionType, MethodDescriptorType)):
        return False
    return name in vars(math) or getattr(torch, name, None) is called or hasattr(nn.functional, name)


def traceable(original: type[nn.Module]) -> bool:
    """Symbolic tracing reads a forward right only where it takes tensors and nothing optional."""
    parameters = list(inspect.signature(original.forward).parameters.values())[1:]
    return bool(parameters) and all(
        p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty and p.name != "kwargs" for p in parameters
    )
