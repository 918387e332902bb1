"""A call that fails at any step of its own, or is interrupted there, leaves the model as it was and can be made again.

Every line of ltepass that a clean call runs is a step; one is drawn, and an exception raised there.
"""

from __future__ import annotations

import copy
import linecache
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType, FunctionType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.convert_frame import compile_lock
from torch.fx import Graph

import ltepass
from ltepass.calibration.refit_down import warm_start
from ltepass.errors import ConfigError
from ltepass.passes.capture.decoder_step import capture_step
from ltepass.threads import locks
from ltepass.training.settings import LTESettings
from ltepass.training.stages import Stage, begin_stage, settle, stage_options
from tests.models.zoo import build, ids
from tests.properties.trees import examples

HERE = str(Path(ltepass.__file__).parent)
PARTS = (HERE, *(str(p.resolve()) for p in Path(HERE).iterdir() if p.is_symlink()), "<ltepass")
ONLY_READS = (  # most lines
    "Snapshot.__init__",
    "_Object.__init__",
    "_objects",
    "root_of",
    "state_of",
    "routers_of",
    "all_or_nothing",
)
LOCKS = ("with lock", "with self.table")  # no interruption is heard between a block's end and the release of its lock
Verb = Callable[[nn.Module], Any]


class Steps:
    """Counts the lines of ltepass that run, and raises at the one asked for."""

    def __init__(self, fail_at: int | None = None, error: BaseException | None = None) -> None:
        self.count, self.fail_at, self.error = 0, fail_at, error
        self.where: tuple[str, int] | None = None

    def __enter__(self) -> Steps:
        self.before = sys.gettrace()
        sys.settrace(self._on_call)
        return self

    def __exit__(self, *_: Any) -> None:
        sys.settrace(self.before)

    def _on_call(self, frame: FrameType, event: str, arg: Any) -> Any:
        ours = frame.f_code.co_filename.startswith(PARTS) and not frame.f_code.co_qualname.startswith(ONLY_READS)
        return self._on_line if ours else None

    def _on_line(self, frame: FrameType, event: str, arg: Any) -> Any:
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip()
        if event == "line" and not line.startswith(LOCKS):
            self.count += 1
            if self.count == self.fail_at and self.error is not None:
                self.where = (frame.f_code.co_filename, frame.f_lineno)
                raise self.error
        return self._on_line


def shallow(value: Any) -> Any:
    """Containers by the identities in them, all else by its own."""
    if isinstance(value, dict):
        return [(key, id(v)) for key, v in value.items()]
    return [id(v) for v in value] if isinstance(value, (list, set)) else id(value)


def content(value: Any) -> Any:
    """A copy to compare with; of a graph, which compares by identity (in `shallow`), its nodes as text."""
    return str(value) if isinstance(value, Graph) else copy.deepcopy(value)


def image(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that a call could change; tensors as copies."""
    modules = dict(model.named_modules())
    held = {f"{n}.{k}": m.__dict__.get(k) for n, m in modules.items() for k in ("config", "generation_config", "_lte")}
    objects = {**modules, **{name: v for name, v in held.items() if v is not None}}
    parameters = dict(model.named_parameters())
    return {
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "strides": {name: p.stride() for name, p in parameters.items()},
        "identities": {name: id(p) for name, p in parameters.items()},
        "flags": {name: p.requires_grad for name, p in parameters.items()},
        "classes": {name: type(v) for name, v in objects.items()},
        "attributes": {name: {k: shallow(a) for k, a in vars(v).items()} for name, v in objects.items()},
        "code": (getattr(model, "code", None), type(model).forward),
        "state": {k: content(v) for k, v in vars(model._lte).items()} if hasattr(model, "_lte") else None,
        "random": torch.get_rng_state(),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for key, kept in before.items():
        now = after[key]
        if isinstance(kept, dict):
            assert kept.keys() == now.keys(), key
            for name, value in kept.items():
                if isinstance(value, Tensor):
                    assert torch.equal(value.nan_to_num(), now[name].nan_to_num()), (key, name)
                else:
                    assert value == now[name], (key, name)
        else:
            assert torch.equal(kept, now) if isinstance(kept, Tensor) else kept == now, key


class Block(nn.Module):
    """The smallest model with an FFN of each kind: one in a module of its own, one in the root's forward."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(61, 8), nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))
        self.up, self.gate, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        x = self.embed(input_ids)
        x = x + self.mlp(self.norm(x))
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Flat(nn.Module):
    """For symbolic tracing."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(61, 8), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, input_ids: Tensor, use_cache: bool | None = None) -> Any:
        x = self.embed(input_ids)
        return x + self.down(torch.relu(self.up(x)))


class Planted(BaseException):
    """No Exception: tracing takes any of those for "cannot be traced"."""


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out = model(ids())
    logits: Tensor = getattr(out, "logits", out)
    return logits


def is_owned(lock: Any) -> bool:
    """By this thread."""
    return bool(lock._is_owned())


def dense(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "block":
        return Block().eval()
    return torch.fx.symbolic_trace(Flat().eval()) if name == "graph" else build(name, layers=1)


def transform(model: nn.Module, **config: Any) -> nn.Module:
    own = isinstance(model, (Block, torch.fx.GraphModule))
    settings = ltepass.LTEConfig(**{"group_size": 4, "grouping": "kmeans", **config})
    return ltepass.transform(model, ids() if own else None, settings, calibration=[ids(3), ids(2)])


def begun(stage: Stage, **settings: Any) -> Verb:
    """A stage's options up to where training begins."""

    def run(model: nn.Module) -> None:
        context = stage_options(model, LTESettings(**settings), stage)
        context.__enter__()
        OPEN.append(context)

    return run


OPEN: list[Any] = []
BATCHES = [ids(3), ids(2)]
VERBS: dict[str, Verb] = {
    "calibrate": lambda m: ltepass.calibrate(m, BATCHES, grouping="coactivation", inputs="hard"),
    "set_mode": lambda m: ltepass.set_mode(m, "soft"),
    "set_sparsity": lambda m: ltepass.set_sparsity(m, 0.3),
    "set_hidden_sparsity": lambda m: ltepass.set_hidden_sparsity(m, 0.4, BATCHES),
    "set_input_sparsity": lambda m: ltepass.set_input_sparsity(m, 0.4, BATCHES),
    "lower": ltepass.lower,
    "unlower": ltepass.unlower,
    "remove": lambda m: ltepass.remove(m, undo_grouping=True),
    "remove, groups stay": ltepass.remove,
    "lower, linears alone": lambda m: ltepass.lower(m, ffn=False),
    "lower, the whole model": lambda m: ltepass.lower(m, scope="model"),
    "lower, to int8": lambda m: ltepass.lower(m, linears="int8"),
    "prune": lambda m: ltepass.prune(m, BATCHES, sparsity=0.4),
    "prune, zeros": lambda m: ltepass.prune(m, method="magnitude", sparsity=0.5, permanent=True),
    "measure_sparsity": lambda m: ltepass.measure_sparsity(m, BATCHES),
    "measure_union": lambda m: ltepass.measure_union(m, BATCHES),
    "draft": lambda m: ltepass.draft(m, 0.5),
    "save": lambda m: ltepass.save(m, saved(m)),
    "load": lambda m: ltepass.load(m, saved(m)),
    "perplexity": lambda m: ltepass.perplexity(m, ids(2)),
    "export, its capture": lambda m: capture_step(m, 8),
    "report": ltepass.report,
    "begin_stage": lambda m: begin_stage(m, "soft", trainable="routers"),
    "settle": lambda m: settle(m, BATCHES, 0.7, budget="model"),
    "stage options, lora": begun("soft", trainable="lora", lora_rank=2),
    "stage options, through the op": begun("hard", through_op=True),
    "warm_start": lambda m: warm_start(m, BATCHES[0]),
}


LANGUAGE_MODELS = ("perplexity", "export, its capture")
CHANGE_NO_MODEL = {"contrastive_loss", "exported_loop", "label_mask", "take_auxiliary"}  # of it, test_recorder.py
ELSEWHERE = {"quantize"}  # its weights are no plain tensors: tests/models/test_quantize.py
FOLDER = Path(tempfile.mkdtemp(prefix="ltepass-"))
CASES = [
    (v, n)
    for v in ["transform", *VERBS]
    for n in ("block", "graph", "llama")
    if n == "llama" or v not in LANGUAGE_MODELS
]


def saved(model: nn.Module) -> Path:
    return FOLDER / type(model).__name__


def test_every_public_call_is_tried() -> None:
    calls = {name for name in ltepass.__all__ if isinstance(getattr(ltepass, name), FunctionType)}
    calls -= CHANGE_NO_MODEL | ELSEWHERE
    assert calls == {verb.split(",")[0] for verb in ("transform", *VERBS)} - {"stage options"}


@pytest.mark.parametrize("verb", ["transform", *(v for v in VERBS if "stage options" not in v and "capture" not in v)])
def test_what_is_no_module_is_named(verb: str) -> None:
    folder: Any = "lte-model"
    with pytest.raises(ConfigError, match=r"the model is 'lte-model', a str; expected an nn\.Module"):
        VERBS.get(verb, transform)(folder)


def prepared(name: str, verb: str) -> nn.Module:
    model = dense(name)
    if verb.startswith("transform"):
        return model
    transform(model)
    if verb == "load":
        ltepass.save(model, saved(model))
        return dense(name)
    ltepass.set_mode(model, "hard")
    return ltepass.lower(model) if verb == "unlower" else model


@pytest.mark.parametrize(("verb", "name"), CASES)
def test_a_call_that_fails_at_any_step_changes_nothing(verb: str, name: str) -> None:
    run = VERBS.get(verb, transform)
    run(prepared(name, verb))  # caches are warm now: the same steps from here on
    clean = prepared(name, verb)
    with Steps() as steps:
        run(clean)
    model = prepared(name, verb)
    before = image(model)

    last = steps.count - ("stage options" in verb)  # whose last step is the first of what comes then

    @examples(10 if name == "llama" or verb == "transform" else 40)
    @given(at=st.integers(1, last), interrupted=st.booleans())
    def fails_at(at: int, interrupted: bool) -> None:
        nonlocal model, before
        planted = Steps(at, KeyboardInterrupt() if interrupted else Planted())
        try:
            with planted:
                run(model)
        except (KeyboardInterrupt, Planted):
            pass
        else:  # fewer steps than the clean run: a class that it made is still alive
            assert planted.where is None
            model = prepared(name, verb)
            before = image(model)
        assert not is_owned(locks.tracing)
        assert not is_owned(compile_lock), "a thread of a later test would wait for ever"
        assert_same(before, image(model))

    fails_at()
    run(model)
    assert_same({"values": clean.state_dict()}, {"values": model.state_dict()})
    assert torch.equal(output(model), output(clean))
    while OPEN:
        OPEN.pop().__exit__(None, None, None)
