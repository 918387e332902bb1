"""Several threads, and forks: right, or refused by name."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import ltepass
from ltepass.calibration.energy import fit_energies
from ltepass.errors import ConcurrencyError
from ltepass.passes.capture import trace_owner
from ltepass.passes.insert import generated_forwards
from ltepass.routed.routed import routers_of
from ltepass.routed.router import Router
from ltepass.threads import unshared
from tests.models.zoo import build, generate, ids, logits, mlp, transformed
from tests.typed import lte_state, routed

CONFIG = ltepass.LTEConfig(group_size=4, grouping="identity")


@contextmanager
def meanwhile(work: Callable[[], Any]) -> Iterator[list[Any]]:
    """Another thread repeats `work` while the block runs; the answers, or what it raised."""
    answers: list[Any] = []
    going, begun = threading.Event(), threading.Event()
    going.set()

    def repeat() -> None:
        while going.is_set():
            try:
                answers.append(work())
            except Exception as error:
                answers.append(error)
            begun.set()

    thread = threading.Thread(target=repeat)
    thread.start()
    begun.wait(30)
    try:
        yield answers
    finally:
        going.clear()
        thread.join(60)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_another_model_runs_while_one_is_transformed_and_lowered(name: str) -> None:
    other = build("llama")
    expected, call = logits(other), nn.Module.__call__
    with meanwhile(lambda: logits(other)) as answers:
        for _ in range(2):
            model = ltepass.transform(build(name), config=CONFIG)
            ltepass.set_mode(model, "hard")
            ltepass.unlower(ltepass.lower(model))
    assert all(torch.equal(answer, expected) for answer in answers), answers[:1]
    assert nn.Module.__call__ is call


def test_a_compiled_call_is_not_refused_while_an_owner_is_traced() -> None:
    """FX marks the whole process as tracing, and torch.compile refuses to run in one."""
    owner = mlp(build("llama"), 0)
    seen: list[bool] = []

    def traces() -> bool:
        return bool(torch.fx._symbolic_trace.is_fx_symbolic_tracing())

    class Watched(type(owner)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> Any:
            with ThreadPoolExecutor(1) as other:
                seen.append(other.submit(traces).result())
            seen.append(traces())
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    owner.__class__ = Watched
    assert trace_owner.trace_owner(owner, defaults=True) is not None
    assert seen == [False, True] * 2
    assert not traces()


def test_two_threads_transform_lower_and_generate_as_one_does() -> None:
    def work(seed: int) -> torch.Tensor:
        model = ltepass.transform(models[seed], config=CONFIG)
        ltepass.set_mode(model, "hard")
        ltepass.lower(model)
        return generate(model, ids(1, 5), 4)

    models = [build("llama"), build("opt")]
    expected = [work(0), work(1)]
    models = [build("llama"), build("opt")]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(work, (0, 1)))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_what_another_thread_writes_to_stderr_while_one_captures_is_seen(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stderr

    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)

        def forward(self, x: torch.Tensor) -> Any:
            if torch.compiler.is_exporting():
                with ThreadPoolExecutor(1) as other:
                    other.submit(print, "seen", file=sys.stderr).result()
                print("export's chatter", file=sys.stderr)
            return self.down(torch.relu(self.up(x)))

    ltepass.transform(Broken(), torch.randn(2, 8), CONFIG)
    err = capsys.readouterr().err
    assert "seen" in err
    assert "chatter" not in err
    assert sys.stderr is before


def with_tables(model: nn.Module) -> nn.Module:
    for router in routers_of(model):
        router.quantiles.copy_(torch.linspace(-2, 2, len(router.quantiles)))
    return model


@pytest.mark.parametrize("lowered", [False, True])
def test_set_sparsity_beside_forwards_gives_the_old_decision_or_the_new(lowered: bool) -> None:
    model = with_tables(transformed("llama", layers=1))
    if lowered:
        ltepass.lower(model)
    right = []
    for sparsity in (0.2, 0.8):
        ltepass.set_sparsity(model, sparsity)
        right.append(logits(model))
    with meanwhile(lambda: logits(model)) as answers:
        for i in range(60):
            ltepass.set_sparsity(model, (0.2, 0.8)[i % 2])
    assert len(answers) > 1
    assert all(any(torch.equal(answer, one) for one in right) for answer in answers)


@pytest.mark.parametrize("verb", ["calibrate", "measure_sparsity", "lower and unlower"])
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_forward_beside_a_call_that_has_the_model_to_itself_is_right_or_refused(name: str, verb: str) -> None:
    model = with_tables(transformed(name))
    expected = logits(model)
    calls: dict[str, Callable[[], Any]] = {
        "calibrate": lambda: ltepass.calibrate(model, [ids(4, 9)] * 3),
        "measure_sparsity": lambda: ltepass.measure_sparsity(model, [ids(4, 9)] * 6),
        "lower and unlower": lambda: ltepass.unlower(ltepass.lower(model)),
    }
    measured = ltepass.measure_sparsity(model, [ids(4, 9)] * 6)
    with meanwhile(lambda: logits(model)) as answers:
        for _ in range(1 if verb == "calibrate" else 3):
            result = calls[verb]()
    if verb == "measure_sparsity":
        assert result == measured, "tokens of the other thread count for nothing"
    if verb == "calibrate":
        answers = [a for a in answers if isinstance(a, Exception) or torch.equal(a, expected)]
    for answer in answers:
        if isinstance(answer, Exception):
            assert isinstance(answer, ConcurrencyError), repr(answer)
        else:
            torch.testing.assert_close(answer, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(model).isfinite().all(), torch.tensor(True))
    assert all(router.thread is None for router in routers_of(model))


def test_a_forward_of_another_thread_is_refused_with_a_way_out() -> None:
    model = transformed("llama")

    def batches() -> Iterator[torch.Tensor]:
        with ThreadPoolExecutor(1) as other, pytest.raises(ConcurrencyError, match=r"call the model again .* own copy"):
            other.submit(logits, model).result()
        yield ids()

    ltepass.measure_sparsity(model, batches())
    logits(model)


def test_a_forward_that_begins_while_hooks_are_exchanged_is_refused_before_it_meets_them() -> None:
    model = ltepass.lower(transformed("opt"))
    begun, exchanged = threading.Event(), threading.Event()

    def between_hooks(*_: object) -> None:
        begun.set()
        exchanged.wait(30)

    up = next(module for name, module in model.named_modules() if name.endswith("fc1"))
    handle = up.register_forward_hook(between_hooks)
    with ThreadPoolExecutor(1) as other:
        with unshared(routers_of(model)):
            answer = other.submit(logits, model)
            while not (begun.is_set() or answer.done()):
                begun.wait(0.01)
            ltepass.unlower(model)
        exchanged.set()
        with pytest.raises(ConcurrencyError):
            answer.result()
    handle.remove()
    logits(model)


def test_a_second_call_on_the_model_waits() -> None:
    model = transformed("llama")
    order: list[str] = []
    started = threading.Event()

    def batches() -> Iterator[torch.Tensor]:
        started.set()
        yield ids()
        other.join(0.2)
        order.append("first")

    def second() -> None:
        started.wait(30)
        ltepass.set_mode(model, "soft")
        order.append("second")

    other = threading.Thread(target=second)
    other.start()
    ltepass.measure_sparsity(model, batches())
    other.join(30)
    assert order == ["first", "second"]
    assert {router.mode for router in routers_of(model)} == {"soft"}


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_forward_that_a_whole_lowering_falls_into_is_right_or_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the scores of an FFN and its linears, whose forwards and hooks are others afterwards."""
    model = transformed(name)
    expected, forward = logits(model), Router.forward
    work: list[Callable[[], Any]] = []

    def interfere(self: Router, x: torch.Tensor) -> Any:
        scores = forward(self, x)
        if work:
            with ThreadPoolExecutor(1) as other:
                other.submit(work.pop()).result()
        return scores

    monkeypatch.setattr(Router, "forward", interfere)
    for change in (lambda: ltepass.lower(model), lambda: ltepass.unlower(ltepass.lower(model))):
        work.append(change)
        with suppress(ConcurrencyError):
            torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
        assert work == []
        ltepass.unlower(model)
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_threads_generate_on_one_lowered_model(name: str) -> None:
    model = ltepass.lower(transformed(name))

    def tokens(length: int) -> torch.Tensor:
        return generate(model, ids(1, length), 5)

    lengths = [3, 7, 9, 12]
    expected = [tokens(n) for n in lengths]
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(a, b) for a, b in zip(pool.map(tokens, lengths), expected, strict=True))


def test_threads_compile_and_run_two_models(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda gm, inputs, config_patches: gm.forward)
    models = [transformed("llama"), transformed("opt")]
    expected = [logits(model, ids(2, n)) for model in models for n in (9, 5)]
    for model in models:
        ltepass.lower(model, scope="model")
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(logits, [m for m in models for _ in range(2)], [ids(2, n) for n in (9, 5)] * 2))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_classes_are_shared_by_equals_and_go_with_the_last_of_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()  # which keeps what it compiled, and its classes, until then
    made = weakref.WeakValueDictionary[Any, Any]()  # of this test's models alone: another test's may live on
    monkeypatch.setattr(generated_forwards, "_classes", made)
    first, second = transformed(name), transformed(name)
    owners = [model.get_submodule(lte_state(model).sites[0].owner) for model in (first, second)]
    assert type(owners[0]) is type(owners[1])
    classes = {
        weakref.ref(type(model.get_submodule(s.owner))) for model in (first, second) for s in lte_state(model).sites
    }
    ltepass.lower(first)
    del first, second, owners
    gc.collect()
    assert [cls for cls in classes if cls() is not None] == []
    assert len(made) == 0


def test_a_refused_forward_leaves_nothing_in_what_a_pass_sees() -> None:
    """Neither its rows nor its padding: it is refused at its first router, after the hooks before that have run."""
    model: PreTrainedModel = transformed("llama")
    padded = {"input_ids": ids(2, 9), "attention_mask": torch.arange(9).expand(2, 9).gt(3).long()}
    weights = {site.name: torch.ones(site.d_ff) for site in lte_state(model).sites}
    expected = fit_energies(routed(model), [padded] * 2, weights, "dense")
    forward = type(model.model).forward
    done: list[str] = []

    def beside(self: Any, *args: Any, **kwargs: Any) -> Any:
        """In the middle of the forward, after its masks were noted."""
        if not done:
            done.append("begun")
            with ThreadPoolExecutor(1) as other, pytest.raises(ConcurrencyError):
                other.submit(logits, model, ids(3, 5)).result()
            done.append("refused")
        return forward(self, *args, **kwargs)

    model.model.forward = beside.__get__(model.model)
    found = fit_energies(routed(model), [padded] * 2, weights, "dense")
    assert done == ["begun", "refused"]
    for name, fit in expected.items():
        assert torch.equal(found[name].weight, fit.weight)


def test_a_forward_that_another_thread_has_begun_gives_a_pass_no_masks() -> None:
    """It stands between its model's hooks and its first router while the whole pass goes by."""
    model: PreTrainedModel = transformed("llama")
    padded = {"input_ids": ids(2, 9), "attention_mask": torch.arange(9).expand(2, 9).gt(3).long()}
    expected = ltepass.measure_sparsity(model, [padded])
    inside, go_on = threading.Event(), threading.Event()
    embed = type(model.model.embed_tokens).forward

    def waiting(self: Any, *args: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            go_on.wait(30)
        return embed(self, *args)

    model.model.embed_tokens.forward = waiting.__get__(model.model.embed_tokens)
    with ThreadPoolExecutor(1) as other:

        def batches() -> Iterator[Any]:
            running = other.submit(logits, model)
            inside.wait(30)
            yield padded
            go_on.set()
            with pytest.raises(ConcurrencyError):
                running.result()

        assert ltepass.measure_sparsity(model, batches()) == expected
