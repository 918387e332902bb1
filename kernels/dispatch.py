"""How the ops of this folder stand at the dispatcher: the first call on a CPU, and vmap over their first argument."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ltepass.kernels.cpu import loading


def any_device(op: torch._ops.OpOverload, definition: Callable[..., object]) -> Callable[..., object]:
    """The kernel of `op` for any device: its definition. The first call on a CPU loads the C++ kernel."""

    def call(x: torch.Tensor, *others: object) -> object:
        # A successful load has registered the C++ kernel under a key that outranks this one: call again.
        if x.device.type == "cpu" and loading.load():
            return op(x, *others)
        return definition(x, *others)

    return call


def vmap_over_x(op: torch._ops.OpOverload, batched: Callable[..., object] = lambda y: (y, 0)) -> Callable[..., object]:
    """The vmap rule of an op that maps x [..., d] alone: batches stand first. batched: its results and their places."""

    def rule(info: object, in_dims: tuple[int | None, ...], x: torch.Tensor, *others: object) -> object:
        if in_dims[0] is None or any(place is not None for place in in_dims[1:]):
            raise NotImplementedError(
                f"vmap over the weights or the router of {op.name()}; expected only x to be batched, "
                "every other in_dim None"
            )
        return batched(op(x.movedim(in_dims[0], 0), *others))

    return rule
