"""The torch.compile backend "lte": gate regions become `ltepass::routed_ffn`, inductor compiles the rest.

Found through the entry point group `torch_dynamo_backends`, so user code needs no import:
`torch.compile(model, backend="lte")`. Other linears become `ltepass::linear`. Graphs that train go to inductor as they
are.

Scope "model" compiles a whole model with it in place. That compiled call belongs to one instance: torch leaves it out
of copies and pickles, which run eagerly, on their own weights, and say that they are not lowered
(`LTEState.__getstate__`).
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn import Parameter
from torch.utils.weak import WeakIdKeyDictionary

from ltepass.kernels import dispatch, routed_ffn  # noqa: F401 -- routed_ffn registers the op that the pass emits
from ltepass.kernels.gpu import which_path
from ltepass.passes.graph.node_kinds import is_gate, is_tiers
from ltepass.passes.graph.pipeline import GraphJob, Pass, run_passes
from ltepass.passes.lower.lower_linears import LowerLinears
from ltepass.passes.lower.lower_routed_ffn import LowerRoutedFFN, holds_ffn, router_path
from ltepass.passes.lower.lower_tiers import LowerTiers
from ltepass.routed import gate as _gate  # noqa: F401  # registers ltepass::gate, whose name graphs carry

if TYPE_CHECKING:
    from torch._inductor.utils import InputType
from functools import partial

from torch import nn
from torch.compiler import is_compiling
from torch.nn.modules.module import _has_any_global_hook

from ltepass.passes.capture.guard_replaced_forwards import watches
from ltepass.routed.sites import LTEState

log = logging.getLogger("ltepass")


BACKEND: tuple[Pass[GraphJob], ...] = (LowerRoutedFFN(), LowerTiers(), LowerLinears())

_warned: MutableMapping[Parameter, str] = (
    WeakIdKeyDictionary()
)  # the first weight of each graph that a warning was about, while it lives


def lte(
    gm: GraphModule,
    example_inputs: Sequence[InputType],
    *,
    mode: str | None = None,
    options: dict[str, object] | None = None,
    kept: Callable[[str, str], None] | None = None,
    ffn: bool = True,
) -> Callable[..., object]:
    """Dynamo's backend signature. mode, options: as torch.compile has them for inductor.

    kept: is told the path of the router and the reason for each gate that stays masked-dense. ffn: False lowers
    linears alone, of a dense model too.
    """
    from torch._inductor.compile_fx import compile_fx

    gates = [n for n in gm.graph.nodes if is_gate(n) or is_tiers(n)]
    job, trains = GraphJob(gm), _trains(example_inputs)
    if gates and trains:
        job.notes = {router_path(n): "the graph is traced with gradients" for n in gates}
        _warn_of_gradients(gates, example_inputs)
    elif ffn and not gates and not _holds_op(gm) and holds_ffn(gm):
        _warn_of_no_gate(example_inputs)
    if not trains:
        run_passes([p for p in BACKEND if ffn or p.name == "lower_linears"], job)
    if kept is not None:
        for path, reason in job.notes.items():
            kept(path, reason)
    lines = "".join(f"; {path}: {reason}" for path, reason in job.notes.items())
    log.info("lte backend: %d gates, %d lowered%s", len(gates), job.lowered, lines)
    with which_path.assume_density(_density(example_inputs)):
        compiled: Any = compile_fx(gm, example_inputs, config_patches=_patches(mode, options))
    on_cpu = all(t.device.type == "cpu" for t in example_inputs if isinstance(t, Tensor))
    return _below_autograd(compiled) if (job.lowered or job.linears) and on_cpu else compiled


def _below_autograd(compiled: Callable[..., object]) -> Callable[..., object]:
    """Calls ops without the Python frame of the op's autograd rule where nothing can ask for a gradient; see
    `ltepass.kernels.routed_ffn.routed_ffn`. Legal: the graph was compiled as one that does not train, and Dynamo guards
    on that. On a GPU inductor sees the kernels themselves, and there is no such frame.
    """

    @functools.wraps(compiled)
    def call(*args: object) -> object:
        if dispatch.asks_for_gradients():
            return compiled(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return compiled(*args)

    return call


def _warn_of_gradients(gates: Iterable[Node], example_inputs: Sequence[InputType]) -> None:
    hard = [router_path(n) for n in gates if is_tiers(n) or n.args[3] is False]
    if hard:
        _warn_once(
            example_inputs,
            f"torch.compile(backend='lte') got {len(hard)} hard gates (first: {hard[0]}) in a graph that is traced "
            "with gradients, and lowered none: they stay masked-dense, which is exact and no faster; for inference "
            "call the model under torch.no_grad() or torch.inference_mode(), or freeze it with "
            "model.requires_grad_(False)",
        )


def _warn_of_no_gate(example_inputs: Sequence[InputType]) -> None:
    _warn_once(
        example_inputs,
        "torch.compile(backend='lte') got a graph with an FFN and no gate; expected a model that ltepass.transform "
        'changed, in hard mode (ltepass.set_mode(model, "hard")); nothing of it is sparse',
    )


def _warn_once(example_inputs: Sequence[InputType], text: str) -> None:
    """Once for each model: its graphs for other sizes have the same weights."""
    weight = next((t for t in example_inputs if isinstance(t, Parameter)), None)
    if weight is not None and _warned.get(weight) == text:
        return
    if weight is not None:
        _warned[weight] = text
    warnings.warn(text, stacklevel=3)


def _density(example_inputs: Sequence[InputType]) -> float | None:
    """Mean over the graph's routers that know theirs, which their thresholds carry; None where none does."""
    carried = [getattr(t, "density", None) for t in example_inputs if isinstance(t, Tensor)]
    known = [density for density in carried if density is not None]
    return sum(known) / len(known) if known else None


def _trains(example_inputs: Sequence[InputType]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in example_inputs)


def _holds_op(gm: GraphModule) -> bool:
    ops = torch.ops.ltepass
    ours = (ops.routed_ffn.default, ops.routed_proxy_ffn.default, ops.tiered_ffn.default)
    return any(n.target in ours for n in gm.graph.nodes)


def _patches(mode: str | None, options: dict[str, object] | None) -> dict[str, object]:
    """Inductor's settings: those of torch.compile's mode, and the options on top."""
    from torch._inductor import list_mode_options

    chosen = list_mode_options(mode) if mode and mode != "default" else {}
    return {**chosen, **(options or {})}


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
        self.warned = False

    def __call__(self, *args: object, **kwargs: object) -> object:
        if not is_compiling():
            for module, hook in self.looks:
                hook.check(module)
            if _has_any_global_hook():
                return self.model._call_impl(*args, **kwargs)  # masked-dense, which is exact, and every hook runs
            if type(kwargs.get("cache")).__name__ == "PagedAttentionCache":
                self._warn_of_paging()
                return self.model._call_impl(*args, **kwargs)
            _pack(kwargs.get("past_key_values"))
        return self.compiled(*args, **kwargs)

    def _warn_of_paging(self) -> None:
        if not self.warned:
            warnings.warn(
                'continuous batching of a model lowered with scope "model" got a paged cache, which breaks the graph '
                "in every layer; nothing is compiled, and FFNs stay masked-dense, which is exact and no faster; "
                'lower(model) with scope "ffn" is sparse there',
                stacklevel=3,
            )
        self.warned = True


def _pack(cache: object) -> None:
    """Keys and values that assisted generation rolled back, which are views then: graphs are made for strides too."""
    for layer in getattr(cache, "layers", ()):
        for name in ("keys", "values"):
            held = getattr(layer, name, None)
            if isinstance(held, Tensor) and not held.is_contiguous():
                setattr(layer, name, held.contiguous())


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
    its cache back, which a static one cannot; so does what an assistant generates.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, config: Any, inputs: dict[str, object], mode: object, *args: object, **kwargs: object) -> object:
        given = config.cache_implementation is not None or inputs.get("past_key_values") is not None
        assisted = str(getattr(mode, "value", mode)) == "assisted_generation" or config.is_assistant
        if self.model._compiled_call_impl is not None and not given and not assisted:
            config.cache_implementation = "static"  # of the copy that `generate` made for this call
        return getattr(type(self.model), CACHES)(self.model, config, inputs, mode, *args, **kwargs)
