"""A call that fails, Ctrl-C included, leaves the model as it was.

What is small is kept: classes, attributes and the containers in them, flags, strides, routers' buffers, random states.
What is big is undone: whoever changes a weight says so *before* the change (`keep`, `undo_by`), and the inverse does
nothing where the change never came. There is one stack of inverses: a call inside a call adds to the outer one's.
"""

from __future__ import annotations

import functools
import random
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar, copy_context
from types import FrameType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ltepass.routed.routed import root_of, routers_of
from ltepass.threads import locks

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])
OBJECTS = ("config", "generation_config", "hf_quantizer", "_lte")  # attributes of a module whose own attributes change

_inverses: ContextVar[list[Callable[[], None]] | None] = ContextVar("ltepass_inverses", default=None)


def verb(call: F) -> F:
    """A public call on a transformed model: found inside wrappers (PEFT, DDP, ...), and as it was where it fails."""

    @functools.wraps(call)
    def whole(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        root = root_of(model, call.__name__.lstrip("_"))

        def work() -> Any:
            answer = call(root, *args, **kwargs)
            return model if answer is root else answer

        return all_or_nothing(root, work)

    return cast(F, whole)


def all_or_nothing(model: nn.Module, work: Callable[[], T]) -> T:
    """Run `work`; where it raises anything, the model is as before. Nothing happens after `work` where it succeeds."""
    learns = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    # Outside of inference mode, whose tensors could never train again. No step of ours comes after the work.
    with locks.of(model), torch.inference_mode(False), torch.set_grad_enabled(learns):
        return _all_or_nothing(model, work)


def _all_or_nothing(model: nn.Module, work: Callable[[], T]) -> T:
    """Run `work`; where it fails, all inverses that it left are run, the last first, and the snapshot is restored."""
    before, inverses, context = Snapshot(model), _inverses.get(), copy_context()
    if inverses is None:
        inverses = []
        context.run(_inverses.set, inverses)
    mark = len(inverses)
    try:
        return context.run(work)
    except BaseException:
        with undisturbed(), ExitStack() as stack:  # which runs the rest where one of them fails
            stack.callback(before.restore)
            for inverse in inverses[mark:]:
                stack.callback(inverse)
            del inverses[mark:]
        raise


def keep(*tensors: Tensor | None) -> None:
    """These are about to be overwritten: an undo gives them their values back. A copy of each, meanwhile."""
    inverses = _inverses.get()
    if inverses is not None:
        inverses.extend(functools.partial(_fill, t, t.detach().clone()) for t in tensors if t is not None)


def undo_by(inverse: Callable[[], None]) -> None:
    """Said before a change: a call that fails runs this, which must do nothing where the change never came."""
    inverses = _inverses.get()
    if inverses is not None:
        inverses.append(inverse)


class Snapshot:
    """All that is small of a model, and what puts it back."""

    def __init__(self, model: nn.Module) -> None:
        """What an undo puts back of a model."""
        self.random = (torch.get_rng_state(), random.getstate())
        self.cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        self.objects = [_Object(thing) for thing in _objects(model)]
        self.flags = [(p, p.requires_grad) for p in model.parameters()]
        self.strides = [(p, p.stride()) for p in model.parameters() if p.layout is torch.strided]
        small = (b for router in routers_of(model) for b in router.buffers() if b.dtype != torch.uint8)
        buffers = [b for b in small if not b.is_meta]  # codes are big: who changes them says so
        self.values = [(b, b.detach().clone()) for b in buffers]

    def restore(self) -> None:
        """After a call that failed: all of it as it was."""
        for thing in self.objects:
            thing.restore()
        for parameter, flag in self.flags:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)
        for parameter, stride in self.strides:
            if parameter.stride() != stride:
                lay_as(parameter, stride)
        for buffer, value in self.values:
            _fill(buffer, value)
        torch.set_rng_state(self.random[0])
        random.setstate(self.random[1])
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)


def _objects(model: nn.Module) -> Iterable[Any]:
    """What a call that fails may have written to: every module, and the objects on it, each once."""
    modules = list(model.modules())
    held = [module.__dict__.get(name) for module in modules for name in OBJECTS]
    held += [router.recorder for router in routers_of(model)]
    return {id(thing): thing for thing in (*modules, *held) if hasattr(thing, "__dict__")}.values()


class _Object:
    """Its class, its attributes, and what the containers among them hold."""

    def __init__(self, thing: Any) -> None:
        """What an undo puts back of one object."""
        self.thing, self.cls = thing, type(thing)
        self.attributes = dict(thing.__dict__)
        containers = [v for v in self.attributes.values() if isinstance(v, (dict, list, set))]
        self.contents = [(v, dict(v) if isinstance(v, dict) else list(v)) for v in containers]
        # fx writes a graph's code into the class that each GraphModule has for itself
        self.forward = vars(self.cls).get("forward") if isinstance(thing, GraphModule) else None

    def restore(self) -> None:
        """After a call that failed: the object as it was."""
        if type(self.thing) is not self.cls:
            self.thing.__class__ = self.cls
        if self.forward is not None:
            self.cls.forward = self.forward
        refill(self.thing.__dict__, self.attributes)
        for container, content in self.contents:
            refill(container, content)


def refill(container: Any, content: Any) -> None:
    """Undo what changed in a container, key by key: an attribute may be watched, and another thread may read it
    meanwhile.
    """
    if isinstance(container, dict):
        for key in [k for k in container if k not in content]:
            del container[key]
        container.update({k: v for k, v in content.items() if k not in container or container[k] is not v})
        same = list(container) == list(content)
    else:
        same = list(map(id, container)) == list(map(id, content))
    if not same:
        container.clear()
        (container.extend if isinstance(container, list) else container.update)(content)


def lay_as(parameter: Tensor, stride: tuple[int, ...]) -> None:
    """The same values, stored with these strides."""
    stored = torch.empty_strided(parameter.shape, stride, dtype=parameter.dtype, device=parameter.device)
    parameter.data = stored.copy_(parameter.data)


def _fill(tensor: Tensor, value: Tensor) -> None:
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        tensor.copy_(value)


@contextmanager
def undisturbed() -> Iterator[None]:
    """A second Ctrl-C is not heard: half an undo would be worse than none. Only the main thread hears any."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)


@contextmanager
def interrupts_wait() -> Iterator[None]:
    """A Ctrl-C inside is heard at the end: for what is short, and would leave something broken behind."""
    if threading.current_thread() is not threading.main_thread():  # which hears none
        yield
        return
    heard: list[tuple[int, FrameType | None]] = []
    before = signal.signal(signal.SIGINT, lambda *call: heard.append(call))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)
        if heard and callable(before):
            before(*heard[0])
