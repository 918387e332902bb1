"""transform: dense mode is the original, bitwise or to rounding; refused calls leave the model as it was."""

from __future__ import annotations

import copy
import pickle
import random
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import ltepass
from ltepass.errors import (
    AlreadyTransformedError,
    CaptureError,
    ConfigError,
    GroupSizeError,
    LTEError,
    MetaWeightsError,
    NoFFNFoundError,
    NotTransformedError,
)
from ltepass.routed.routed import router_of, routers_of
from ltepass.routed.router import Router
from tests.models.zoo import ALL, HF, build, ids, logits, transformed
from tests.typed import lte_state

ACTIVATIONS = {"llama": "silu", "gpt2": "gelu_tanh", "opt": "relu", "phi3": "silu", "gpt_neox": "gelu"}


def snapshot(model: nn.Module) -> tuple[dict[str, torch.Tensor], list[tuple[str, type]], list[int]]:
    state = {k: v.clone() for k, v in model.state_dict().items()}
    classes = [(n, type(m)) for n, m in model.named_modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    return state, classes, hooks


def assert_untouched(model: nn.Module, before: tuple[Any, ...]) -> None:
    state, classes, hooks = snapshot(model)
    assert classes == before[1]
    assert hooks == before[2]
    assert state.keys() == before[0].keys()
    assert all(torch.equal(state[k], before[0][k]) for k in state)
    assert not hasattr(model, "_lte")


@pytest.mark.parametrize("name", ALL)
def test_identity_grouping_in_dense_mode_is_bitwise_the_original(name: str) -> None:
    original = logits(build(name))
    model = transformed(name, mode="dense")
    assert len(lte_state(model).sites) == 2
    assert torch.equal(logits(model), original)


@pytest.mark.parametrize("name", ALL)
def test_other_groupings_permute_weights_and_keep_the_function(name: str) -> None:
    model, plain = transformed(name, mode="dense", grouping="random"), build(name)
    original, ours = logits(plain), logits(model)
    assert (ours - original).abs().max() <= 1e-5 * original.abs().max()
    dense, state = plain.state_dict(), model.state_dict()
    touched = set()
    for site in lte_state(model).sites:
        permutation = router_of(model, site).permutation
        assert sorted(permutation.tolist()) == list(range(site.d_ff))
        assert permutation.tolist() != list(range(site.d_ff))
        for rows in site.neurons:
            touched.add(rows.param)
            assert torch.equal(
                rows.take(state[rows.param], site.d_ff), rows.take(dense[rows.param], site.d_ff)[permutation]
            )
    assert all(torch.equal(dense[k], state[k]) for k in dense if k not in touched)


@pytest.mark.parametrize("name", HF)
def test_activation_is_identified_and_names_stay(name: str) -> None:
    before = set(build(name).state_dict())
    model = transformed(name)
    assert {s.activation for s in lte_state(model).sites} == {ACTIVATIONS[name]}
    assert {s.kind for s in lte_state(model).sites} == {"inline" if name == "opt" else "aligned"}
    added = set(model.state_dict()) - before
    assert before <= set(model.state_dict())
    assert all("router." in k for k in added)


@pytest.mark.parametrize("name", ALL)
def test_hard_mode_is_dense_times_a_mask(name: str) -> None:
    """Closing every expert of a site must equal a zero down projection; opening all must equal dense."""
    model = transformed(name)
    dense = logits(build(name))
    for router in routers_of(model):
        router.threshold.fill_(-torch.inf)
    assert torch.equal(logits(model), dense)
    for router in routers_of(model):
        router.threshold.fill_(torch.inf)
    closed = build(name)
    for site in lte_state(model).sites:
        nn.init.zeros_(closed.get_parameter(site.down_rows.param))
    assert torch.allclose(logits(model), logits(closed), atol=1e-6)


@pytest.mark.parametrize("name", [n for n in ALL if n != "export"])
def test_deepcopy_and_pickle_give_independent_equal_models(name: str) -> None:
    model = transformed(name)
    expected = logits(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(copied), expected)
        for router in routers_of(copied):
            router.threshold.fill_(torch.inf)
        assert not torch.equal(logits(copied), expected)
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("name", ALL)
def test_remove_gives_everything_back(name: str) -> None:
    model = build(name)
    before, original = snapshot(model), logits(model)
    ltepass.transform(model, None if name in HF else ids(), ltepass.LTEConfig(group_size=4, grouping="random"))
    ltepass.remove(model, undo_grouping=True)
    assert_untouched(model, before)
    assert torch.equal(logits(model), original)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_two_threads_at_once(name: str) -> None:
    model = transformed(name)
    inputs = [ids(2, 9), ids(3, 7)]
    expected = [logits(model, x) for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        wrong.extend(k for k in range(30) if not torch.equal(logits(model, inputs[i]), expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []


def test_training_flag_rng_and_buffers_stay() -> None:
    model = build("own").train()
    torch.manual_seed(11)
    state = torch.get_rng_state()
    ltepass.transform(model, ids(), ltepass.LTEConfig(group_size=4))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.training for m in model.modules())


class Leaky(nn.Module):
    """A forward that remembers in attributes, containers and a buffer, and draws numbers; `breaks` ends the trace."""

    def __init__(self, breaks: bool) -> None:
        super().__init__()
        self.breaks = breaks
        self.last: torch.Tensor | None = None
        self.seen: list[torch.Tensor] = []
        self.cache: dict[str, torch.Tensor] = {}
        self.shapes: set[tuple[int, ...]] = set()
        self.steps: torch.Tensor
        self.register_buffer("steps", torch.zeros(()))
        self.ffn = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 8))

    def forward(self, x: torch.Tensor) -> Any:
        self.last, self.cache["x"], self.steps = x, x, self.steps + 1
        self.seen.append(x)
        self.shapes.add(tuple(x.shape))
        if self.breaks and x.sum().item() > 1e9:  # data-dependent
            return x
        return x + self.ffn(x) + torch.rand_like(x) * random.random()


OLD_EXPORT = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)


@pytest.mark.parametrize(
    "breaks",
    [False, pytest.param(True, marks=pytest.mark.skipif(OLD_EXPORT, reason="torch.export before 2.13 refuses it"))],
)
def test_capture_never_runs_the_model_for_real_and_leaves_nothing_behind(breaks: bool) -> None:
    model, real = Leaky(breaks).train(), []
    hook = model.ffn.register_forward_hook(lambda m, args, out: real.append(type(args[0]) is torch.Tensor))
    before = {k: v for k, v in model.__dict__.items() if k not in ("_modules", "_buffers")}
    containers = [list(model.seen), dict(model.cache), set(model.shapes)]
    steps, rng, python_rng = model.steps, torch.get_rng_state(), random.getstate()
    ltepass.transform(model, torch.randn(2, 3, 8, generator=torch.Generator()), ltepass.LTEConfig(group_size=4))
    assert [s.name for s in lte_state(model).sites] == ["ffn"]
    assert {k: v for k, v in model.__dict__.items() if k in before} == before
    assert [model.seen, model.cache, model.shapes] == containers == [[], {}, set()]
    assert model.steps is steps
    assert torch.equal(torch.get_rng_state(), rng)
    assert random.getstate() == python_rng
    assert list(model.ffn._forward_hooks) == [hook.id]
    assert not any(real), "a hook saw a real tensor: the model was run"


def test_dropout_follows_the_training_flag() -> None:
    model = transformed("own", mode="dense")
    assert torch.equal(logits(model), logits(model))
    assert not torch.equal(logits(model.train()), logits(model))


def test_meta_device_under_identity_grouping() -> None:
    with torch.device("meta"):
        model = build("llama")
    ltepass.transform(model)
    assert all(p.is_meta for p in model.parameters())
    assert [s.n_experts for s in lte_state(model).sites] == [2, 2]


class NoFFN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(4, 6)

    def forward(self, x: torch.Tensor) -> Any:
        return self.b(self.a(x))


Refused = tuple[str, Callable[[], nn.Module], torch.Tensor | None, dict[str, Any], type[LTEError], str]
BAD_INPUTS: Refused = (
    "bad inputs",
    lambda: build("own"),
    torch.randn(2, 3),
    {},
    CaptureError,
    "torch.export could not trace Own",
)
REFUSED: list[Refused] = [
    ("no FFN", NoFFN, torch.randn(2, 6), {}, NoFFNFoundError, "no FFN site found in NoFFN"),
    ("explicit group", lambda: build("llama"), None, {"group_size": 7}, GroupSizeError, r"60.*\[5, 6, 10\]"),
    *([] if OLD_EXPORT else [BAD_INPUTS]),
    ("no inputs", lambda: build("own"), None, {}, CaptureError, "expected example_inputs"),
    ("data needed", lambda: build("llama"), None, {"grouping": "coactivation"}, LTEError, "calibration"),
]


@pytest.mark.parametrize(
    ("make", "example", "config", "error", "text"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED]
)
def test_a_refused_transform_leaves_the_model_untouched(
    make: Callable[[], nn.Module],
    example: torch.Tensor | None,
    config: dict[str, Any],
    error: type[LTEError],
    text: str,
) -> None:
    model = make()
    before = snapshot(model)
    with pytest.raises(error, match=text):
        ltepass.transform(model, example, ltepass.LTEConfig(**config))
    assert_untouched(model, before)


@pytest.mark.parametrize("grouping", ["kmeans", "random"])
def test_grouping_that_needs_weights_is_refused_on_meta(grouping: str) -> None:
    with torch.device("meta"):
        model = build("llama")
    with pytest.raises(MetaWeightsError, match="meta device"):
        ltepass.transform(model, config=ltepass.LTEConfig(grouping=grouping))
    assert not any(routers_of(model))


def test_calibration_on_meta_is_refused() -> None:
    with torch.device("meta"):
        model = build("llama")
    with pytest.raises(MetaWeightsError, match="meta device"):
        ltepass.transform(model, calibration=[ids()])
    assert not any(routers_of(model))


def test_transform_twice_is_an_error_and_changes_nothing() -> None:
    model = transformed("llama", grouping="random")
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(AlreadyTransformedError, match=r"ltepass\.remove"):
        ltepass.transform(model)
    assert all(torch.allclose(v, state[k], rtol=0, atol=0, equal_nan=True) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    "bad",
    [{"target_sparsity": 1.0}, {"target_sparsity": -0.1}, {"group_size": 0}, {"grouping": "magic"}, {"tau": 1.0}],
)
def test_config_is_checked_when_made(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        ltepass.LTEConfig(**bad)


def test_calls_that_need_routers_say_so() -> None:
    for call in (ltepass.lower, ltepass.remove, ltepass.report):
        with pytest.raises(NotTransformedError, match="transform"):
            call(build("llama"))


def test_auto_group_size_is_the_divisor_nearest_32() -> None:
    from ltepass.passes.find.group_size import auto_group_size

    assert [auto_group_size(n) for n in (11008, 1536, 60, 100, 63, 97)] == [32, 32, 30, 25, 21, 97]


def test_a_router_never_leaves_fp32() -> None:
    model = transformed("llama").to(torch.bfloat16)
    routers = list(routers_of(model))
    assert all(isinstance(r, Router) and r.weight.dtype == torch.float32 for r in routers)
    assert model.get_parameter(lte_state(model).sites[0].up_rows.param).dtype == torch.bfloat16
    assert logits(model).dtype == torch.bfloat16


@pytest.mark.parametrize("call", [ltepass.lower, ltepass.transform])
def test_ctrl_c_while_torch_takes_its_patches_back_is_heard_after_them(
    call: Any, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """torch.fx patches nn.Module for every model while it traces; where it was cut off there, none would run."""
    model = build("llama") if call is ltepass.transform else transformed("llama", mode="hard")
    expected, was = logits(model), nn.Module.__getattr__
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell runs us in the background
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    for kind in torch.fx._symbolic_trace._PatchedFn.__subclasses__():
        own = kind.revert

        def interrupted(self: Any, own: Any = own) -> None:
            signal.raise_signal(signal.SIGINT)
            own(self)

        monkeypatch.setattr(kind, "revert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        call(model)
    assert nn.Module.__getattr__ is was
    assert torch.fx._symbolic_trace.CURRENT_PATCHER is None, "the next trace would set its patches once more"
    assert torch.equal(logits(model), expected)
