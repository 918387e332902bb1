"""Scope "model": the whole model compiled with the `lte` backend, in place.

The compiled call belongs to one instance: torch leaves it out of copies and pickles, which run eagerly, on their own
weights, and say that they are not lowered (`LTEState.__getstate__`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch.compiler import is_compiling
from torch.nn.modules.module import _has_any_global_hook

from ltepass.passes.capture.replaced_forwards import watches
from ltepass.routed.sites import LTEState

CACHES = "_prepare_cache_for_generation"  # the method of transformers that makes a cache for one `generate`


def compile_model(model: nn.Module, state: LTEState | None, *, ffn: bool) -> None:
    """state: of a transformed model, for notes. ffn: whether FFNs are lowered, and not only other linears."""
    import torch._dynamo

    from ltepass.passes.lower.compile_backend import lte

    def note(router: str, reason: str) -> None:
        """After a graph break Dynamo's paths begin at the part that it traced: a path that ends so is taken."""
        if state is None:
            return
        names = [s.name for s in state.sites if s.router == router]
        names = names or [s.name for s in state.sites if s.router.endswith(f".{router}")]
        line = f"{names[0] if len(names) == 1 else router}: kept masked-dense: {reason}"
        state.notes += [] if line in state.notes else [line]

    # Sizes are symbols from the start: else a few prompts of other lengths and batches reach Dynamo's recompile limit,
    # and the model silently runs eager.
    compiler: Any = torch._dynamo.optimize(backend=partial(lte, kept=note, ffn=ffn), dynamic=True)
    compiler.callback = _with_our_settings(compiler.callback)
    model._compiled_call_impl = _SeenFirst(model, compiler(model._call_impl))
    if hasattr(model, CACHES):
        model.__dict__[CACHES] = _StaticCaches(model)


def is_compiled(model: nn.Module) -> bool:
    """Whether `compile_model` did it, and nobody else."""
    return isinstance(model._compiled_call_impl, _SeenFirst)


def uncompile_model(model: nn.Module) -> None:
    model._compiled_call_impl = None
    model.__dict__.pop(CACHES, None)


class _SeenFirst:
    """The compiled call, after a look at what Dynamo does not guard: replaced forwards, and hooks for all modules."""

    def __init__(self, model: nn.Module, compiled: Callable[..., object]) -> None:
        self.model, self.compiled = model, compiled
        self.looks = [(module, hook) for module, _, hook in watches(model)]

    def __call__(self, *args: object, **kwargs: object) -> object:
        if not is_compiling():
            for module, hook in self.looks:
                hook.check(module)
            if _has_any_global_hook():
                return self.model._call_impl(*args, **kwargs)  # masked-dense, which is exact, and every hook runs
        return self.compiled(*args, **kwargs)


def _with_our_settings(trace: Callable[..., object]) -> Callable[..., object]:
    """Dynamo's callback of a compiled model, which traces what no compiled code fits, with two settings of the process.

    They are changed under the lock that Dynamo traces under: no other trace sees them.
    specialize_float: dynamic=True is meant for sizes. It makes symbols of floats too, and every norm's eps and every
    attention's scale then becomes a tensor at each call: 0.8 ms a token of SmolLM2's 45, and a quarter more to compile.
    skip_nnmodule_hook_guards: else a hook that somebody adds later is silently left out. 0.15 ms a token of 30 layers.
    """
    from torch._dynamo import config
    from torch._dynamo.convert_frame import compile_lock

    settings = {"specialize_float": True, "skip_nnmodule_hook_guards": False}

    def callback(*args: object, **kwargs: object) -> object:
        with compile_lock, config.patch(settings):
            return trace(*args, **kwargs)

    # Dynamo compares backends by this chain of attributes; a function that carries it is how torch wraps callbacks.
    callback._torchdynamo_orig_backend = trace._torchdynamo_orig_backend  # type: ignore[attr-defined]
    return callback


class _StaticCaches:
    """`generate` gets a cache of fixed size, whose steps share one graph, where nobody asked for another.

    Stands on the instance and not in its generation config, which is the user's and is saved. Assisted generation rolls
    its cache back, which a static one cannot.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, config: Any, inputs: dict[str, object], mode: object, *args: object, **kwargs: object) -> object:
        given = config.cache_implementation is not None or inputs.get("past_key_values") is not None
        assisted = str(getattr(mode, "value", mode)) == "assisted_generation"
        if self.model._compiled_call_impl is not None and not given and not assisted:
            config.cache_implementation = "static"  # of the copy that `generate` made for this call
        return getattr(type(self.model), CACHES)(self.model, config, inputs, mode, *args, **kwargs)
