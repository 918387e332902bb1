"""How the ops of this folder stand at the dispatcher: the first call on a CPU, autograd, vmap over x, compilers."""

# mypy: disable-error-code="no-untyped-call"
# (torch leaves unpack_dual and Function.apply untyped)
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch._functorch.utils import enable_single_level_autograd_function
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.autograd import forward_ad
from torch.compiler import is_compiling

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


Args = tuple[Any, ...]


def refuse_tangents(name: str, args: Args, instead: str) -> None:
    """Without this a dual tensor goes through with a zero tangent, silently."""
    for t in args:
        if isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None:
            raise NotImplementedError(
                f"{name} met a forward-mode AD tangent and has no formula for it; use reverse mode, or {instead}"
            )


def no_gradient(op: torch._ops.OpOverload, instead: str) -> type[torch.autograd.Function]:
    """Of an op without a gradient: the op, and an error that names it where a backward pass comes to it."""

    class NoGradient(torch.autograd.Function):
        generate_vmap_rule = False

        @staticmethod
        def forward(*args: object) -> object:
            with torch._C._AutoDispatchBelowAutograd():
                return op(*args)

        @staticmethod
        def setup_context(ctx: object, inputs: Args, output: object) -> None:
            pass

        @staticmethod
        def backward(ctx: object, *grads: Tensor) -> tuple[Tensor | None, ...]:
            raise NotImplementedError(f"{op.name()} has no gradient; expected {instead} where something is trained")

    return NoGradient


def rule(
    op: torch._ops.OpOverload,
    function: type[torch.autograd.Function],
    instead: str,
    taken: Callable[[Any], object] = lambda outputs: outputs,
) -> Callable[..., object]:
    """The kernel of `op` at the Autograd key (with_keyset): `function` where a gradient is asked for, else the op.

    instead: what to do about forward-mode AD. taken: what the op returns of the function's outputs.
    """

    def call(keyset: torch._C.DispatchKeySet, *args: Any) -> object:
        if forward_ad._current_level >= 0:
            refuse_tangents(op.name(), args, instead)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            # The C++ apply: torch.func's own wrapper of it would dispatch a second time, from inside this kernel.
            with enable_single_level_autograd_function():
                return taken(super(torch.autograd.Function, function).apply(*args))  # type: ignore[misc]
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    return call


def asks_for_gradients() -> bool:
    """Whether autograd, reverse or forward, may have to see what is called now."""
    return torch.is_grad_enabled() or forward_ad._current_level >= 0


def seen_by_others(x: object) -> bool:
    """Whether gradients, a compiler, a tracer or a dispatch mode may look on: they are to see the public op."""
    return asks_for_gradients() or is_compiling() or type(x) is not Tensor or bool(_len_torch_dispatch_stack())


def without_a_frame(name: str) -> Callable[..., Tensor]:
    """An op of ours as a lowered module calls it: where nothing can ask for a gradient, the Python frame of its
    autograd rule is passed by. Compilers, tracers and dispatch modes see the public op.
    """
    # Looked up once: reading weights pushes code out of the caches, and each step of a call then waits for memory.
    public, no_grad = getattr(torch.ops.ltepass, name).default, getattr(torch.ops.ltepass, f"_{name}_no_grad").default

    def call(*args: Tensor | None) -> Tensor:
        return public(*args) if seen_by_others(args[0]) else no_grad(*args)  # type: ignore[no-any-return]

    return call


OP = "ltepass::routed_ffn"


def show_launches(library: torch.library.Library) -> None:
    """Lets compilers see the GPU kernels inside `ltepass::routed_ffn`; on a CPU the op stays one opaque call.

    The rule runs where AOTAutograd functionalizes, as `torch.library.triton_op` does. It must not be an entry of
    inductor's decomposition table: those run after functionalization, where a launch is a mutation that nothing seems
    to use, and dead code elimination drops all three without a word. Neither triton nor a GPU is imported here.
    """
    torch.library.register_torch_dispatch(OP, FunctionalTensorMode, decompose, lib=library)


def decompose(
    mode: FunctionalTensorMode,
    op: torch._ops.OpOverload,
    types: tuple[type, ...],
    args: Args,
    kwargs: dict[str, object],
) -> object:
    """The op as kernel launches that a graph can hold, where x is on a GPU and the graph is being compiled."""
    from torch.export._trace import custom_triton_ops_decomposition_disabled

    known = (FakeTensor, FunctionalTensor, torch.Tensor, torch.nn.Parameter)
    if not all(issubclass(t, known) for t in types):
        return NotImplemented
    # An exported program keeps the op: kernels would make it good for one kind of device only.
    exporting = custom_triton_ops_decomposition_disabled()
    cuts_inputs = len(args) > 12 and args[12] is not None  # which no GPU kernel does
    if args[0].device.type != "cuda" or exporting or cuts_inputs:
        return mode.__torch_dispatch__(op, types, args, kwargs)
    from ltepass.kernels.gpu.launch import routed_ffn_traceable

    with mode:
        return routed_ffn_traceable(*args, **kwargs)
