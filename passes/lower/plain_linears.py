"""Which modules are plain linears, matrix products with ordinary tensors, and their weights and biases."""

from __future__ import annotations

from torch import Tensor, nn


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


def parameters_of(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """(weight, bias), without nn.Module.__getattr__, which costs more than the rest of a small FFN's call."""
    own = linear._parameters
    weight = own.get("weight")
    if weight is None:  # a DataParallel replica keeps plain tensors as attributes
        return linear.weight, linear.bias  # type: ignore[return-value]
    return weight, own.get("bias")
