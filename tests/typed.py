"""What tests read of a model, with its type: to a type checker an attribute of a module is a tensor or a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor, nn

from ltepass.routed.routed import Routed
from ltepass.routed.sites import LTEState

T = TypeVar("T")


def routed(model: nn.Module) -> Routed:
    """What a public call makes of its model."""
    return Routed.of(model, "this test")


def lte_state(model: nn.Module) -> LTEState:
    """The state that transform left on this very module."""
    return routed(model).state


def present(value: T | None) -> T:
    """A value that may be None elsewhere and is not here."""
    assert value is not None
    return value


def grad(parameter: Tensor | None) -> Tensor:
    """The gradient that a backward pass has left."""
    return present(present(parameter).grad)


def prefixed(name: str) -> Callable[[str], str]:
    """For the `msg` of torch.testing.assert_close: which of many values it was."""
    return lambda message: f"{name}: {message}"
