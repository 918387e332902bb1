"""Hooks around a lowered FFN: what they would see, and what happens to one that is added later."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

import ltepass
from ltepass.errors import LoweredError, LoweringError
from ltepass.routed.routed import router_of
from tests.models import zoo
from tests.models.test_bypassed import linear, steering
from tests.models.zoo import ids, logits, transformed
from tests.typed import lte_state

HOOKS = ("register_forward_hook", "register_forward_pre_hook")


def look(seen: list[float]) -> Callable[..., None]:
    """A hook that keeps the size of what the module was handed, or handed on."""
    return lambda m, args, out=None: seen.append(float((args[0] if out is None else out).abs().sum()))


def bert(act: nn.Module | None = None) -> hf.BertModel:
    """Its linears lie in two modules, which the layer that owns the FFN calls: one hands on what the other takes.

    act: in the first layer, in place of its own.
    """
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 60}
    torch.manual_seed(0)
    model = hf.BertModel(hf.BertConfig(vocab_size=61, **sizes)).eval()
    if act is not None:
        model.get_submodule("encoder.layer.0.intermediate").intermediate_act_fn = act
    ltepass.transform(model, {"input_ids": ids()}, ltepass.LTEConfig(group_size=4))
    ltepass.set_mode(model, "hard")
    return model


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("path", ["intermediate", "output"])
def test_what_holds_a_linear_hands_on_no_zeros_that_a_hook_would_see(path: str, kind: str) -> None:
    seen: list[float] = []
    model = bert()
    getattr(model.get_submodule(f"encoder.layer.0.{path}"), kind)(look(seen))
    logits(model)
    ltepass.lower(model)
    logits(model)
    assert seen[0] > 0
    assert seen[1] == pytest.approx(seen[0])
    assert [f"{path} carries a hook" in note for note in lte_state(model).notes] == [True]
    model = ltepass.lower(bert())
    getattr(model.get_submodule(f"encoder.layer.0.{path}"), kind)(look(seen))
    with pytest.raises(LoweredError, match="carries a hook"):
        logits(model)


class Twice(nn.Module):
    """An activation made of two modules: the inner one runs no more either."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ReLU()

    def forward(self, x: Tensor) -> Any:
        return self.inner(x)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(8, 24), Twice(), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Any:
        return self.down(self.act(self.up(x)))


class Inline(Block):
    def forward(self, x: Tensor, scale: Tensor | None = None) -> Any:
        if scale is not None:
            x = x * scale
        return super().forward(x)


@pytest.mark.parametrize("kind", [Block, Inline, lambda: torch.fx.symbolic_trace(Block())])
def test_a_hook_below_an_activation_that_does_not_run(kind: Callable[[], nn.Module]) -> None:
    for when in ("before", "after"):
        torch.manual_seed(0)
        block, x = kind().eval(), torch.randn(2, 3, 8)
        (path,) = [n for n, m in block.named_modules() if isinstance(m, nn.ReLU)]
        model = block if isinstance(block, torch.fx.GraphModule) else nn.Sequential(block, block.__class__())
        model.eval()
        ltepass.transform(model, x, ltepass.LTEConfig(group_size=4))
        ltepass.set_mode(model, "hard")
        if when == "after":
            ltepass.lower(model)
        block.get_submodule(path).register_forward_hook(lambda m, args, out: out * 2)
        if when == "after":
            with pytest.raises(LoweredError, match="carries a hook"):
                logits(model, x)
            continue
        expected = logits(model, x)
        if isinstance(model, torch.fx.GraphModule):
            with pytest.raises(LoweringError, match="carries a hook"):
                ltepass.lower(model)
        else:
            ltepass.lower(model)
            assert [f"{path} carries a hook" in note for note in lte_state(model).notes] == [True]
        assert torch.allclose(logits(model, x), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "opt", "symbolic_trace"])
def test_a_hook_for_all_modules(name: str, eager: None) -> None:
    """The op would bypass it; a compiled model runs as it is written meanwhile."""
    model, seen = transformed(name), []
    expected = logits(model)

    def every_linear(m: nn.Module, args: Any, out: Any) -> None:
        seen.append(isinstance(m, nn.Linear))

    with contextlib.closing(Removed(register_module_forward_hook(every_linear))):
        logits(model)
        before = sum(seen)
        with pytest.raises(LoweringError, match="for all modules"):
            ltepass.lower(model)
    ltepass.lower(model)
    assert lte_state(model).notes == []
    with contextlib.closing(Removed(register_module_forward_hook(every_linear))), pytest.raises(LoweredError):
        logits(model)
    assert torch.allclose(logits(model), expected, atol=1e-5)
    ltepass.lower(ltepass.unlower(model), scope="model")
    assert torch.allclose(logits(model), expected, atol=1e-5)
    seen.clear()
    with contextlib.closing(Removed(register_module_forward_hook(every_linear))):
        assert torch.allclose(logits(model), expected, atol=1e-5)
    assert sum(seen) == before


class Removed:
    def __init__(self, handle: Any) -> None:
        self.close = handle.remove


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    zoo.fresh_dynamo(monkeypatch, inductor=False)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("llama", HOOKS[0]), ("opt", HOOKS[1])]
    + [pytest.param(*case, marks=pytest.mark.slow) for case in (("llama", HOOKS[1]), ("opt", HOOKS[0]))],
)
def test_a_hook_that_is_added_to_a_compiled_model_runs_and_is_gone_again(name: str, kind: str, eager: None) -> None:
    model = ltepass.lower(transformed(name, layers=1), scope="model")
    expected = [logits(model) for _ in range(3)][-1]  # Dynamo remembers what it has found unchanged
    site = lte_state(model).sites[0]
    for path in (site.up, site.down, site.owner, site.router, "lm_head", ""):
        calls: list[int] = []
        hook = getattr(model.get_submodule(path), kind)(lambda m, args, out=None, calls=calls: calls.append(1))
        assert torch.allclose(logits(model), expected, atol=1e-5)
        logits(model)
        assert len(calls) == 2, path
        hook.remove()
        logits(model)
        assert len(calls) == 2, path


def test_what_a_later_hook_changes_stands_in_the_compiled_models_answer(eager: None) -> None:
    model, twin = ltepass.lower(transformed("llama"), scope="model"), transformed("llama")
    before = logits(model)
    for each in (model, twin):
        steering(each)
    assert torch.allclose(logits(model), logits(twin), atol=1e-5)
    assert not torch.allclose(logits(model), before, atol=1e-2)
    assert torch._dynamo.config.skip_nnmodule_hook_guards, "the process's setting stays"


def test_dynamo_sees_hooks_itself() -> None:
    """scope "model" traces them: they run, and what they change stands in the graph."""
    torch._dynamo.reset()
    model = transformed("llama")
    steering(model)
    seen: list[Any] = []
    linear(model, "gate").register_forward_hook(lambda m, args, out: seen.append(out.shape))
    expected = logits(model)
    seen.clear()
    ltepass.lower(model, scope="model")
    assert torch.allclose(logits(model), expected, atol=1e-5)
    assert len(seen) == 1
    assert router_of(model, lte_state(model).sites[0]).mode == "hard"
    ltepass.unlower(model)
    assert torch.allclose(logits(model), expected, atol=1e-5)
    assert ids().shape == (2, 9)
