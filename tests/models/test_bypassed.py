"""What runs with a linear's call and would not with the op: kept masked-dense, or an error where it came afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, parametrize, prune

import ltepass
from ltepass.errors import LoweredError, LoweringError, ShardedError
from ltepass.routed.sites import router_of
from tests.models.zoo import GRAPHS, CountOp, ids, logits, transformed
from tests.typed import lte_state


class Scaled(torch.Tensor):
    """A weight that is made when it is used, as quantisation libraries do it."""

    @staticmethod
    def __new__(cls, halves: Tensor) -> Scaled:
        return torch.Tensor._make_wrapper_subclass(cls, halves.shape, dtype=halves.dtype, device=halves.device)

    def __init__(self, halves: Tensor) -> None:
        self.halves = halves

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # as torch calls it
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        unwrap = torch.utils._pytree.tree_map_only(cls, lambda t: t.halves * 2, (args, kwargs or {}))
        if func is torch.ops.aten.detach.default:
            return cls(args[0].halves)
        return func(*unwrap[0], **unwrap[1])


def linear(model: nn.Module, part: str = "up") -> nn.Linear:
    site = lte_state(model).sites[0]
    found = model.get_submodule(getattr(site, part))
    assert isinstance(found, nn.Linear)
    return found


def steering(model: nn.Module) -> None:
    linear(model, "down").register_forward_hook(lambda m, args, out: out + 1.0)


def capture_with_kwargs(model: nn.Module) -> None:
    linear(model).register_forward_hook(lambda m, args, kwargs, out: out * 1.5, with_kwargs=True)


def before_down(model: nn.Module) -> None:
    linear(model, "down").register_forward_pre_hook(lambda m, args: (args[0] + 0.1,))


def before_up(model: nn.Module) -> None:
    linear(model).register_forward_pre_hook(lambda m, args: (args[0] * 0.5,), prepend=True)


def backward(model: nn.Module) -> None:
    linear(model).register_full_backward_hook(lambda m, gi, go: None)


def on_the_activation(model: nn.Module) -> None:
    owner = model.get_submodule(lte_state(model).sites[0].owner)
    act = next(m for n, m in owner.named_modules() if n.split(".")[-1] in ("act_fn", "activation_fn", "act"))
    act.register_forward_hook(lambda m, args, out: out * 2)


def on_the_router(model: nn.Module) -> None:
    model.get_submodule(lte_state(model).sites[0].router).register_forward_hook(lambda m, args, out: None)


def parametrized(model: nn.Module) -> None:
    parametrizations.weight_norm(linear(model))
    assert parametrize.is_parametrized(linear(model))


def pruned(model: nn.Module) -> None:
    prune.l1_unstructured(linear(model), "weight", 0.5)


def patched(model: nn.Module) -> None:
    module = linear(model)
    vars(module)["forward"] = lambda x: nn.functional.linear(x * 2, module.weight, module.bias)


def subclassed_weight(model: nn.Module) -> None:
    module = linear(model)
    module.weight = nn.Parameter(Scaled(module.weight.detach() / 3), requires_grad=False)


CHANGES: dict[str, Callable[[nn.Module], None]] = {
    f.__name__: f
    for f in (
        *(steering, capture_with_kwargs, before_down, before_up, backward, on_the_activation, on_the_router),
        *(parametrized, pruned, patched, subclassed_weight),
    )
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_before_lowering_it_is_a_note_and_the_site_stays_exact(name: str, change: str) -> None:
    model = transformed(name)
    with contextlib.suppress(NotImplementedError):
        CHANGES[change](model)
    expected = logits(model)
    ltepass.lower(model)
    (note,) = ltepass.report(model).notes
    assert note.startswith(f"{lte_state(model).sites[0].name}: kept masked-dense: ")
    with CountOp() as count:
        assert torch.allclose(logits(model), expected, atol=1e-5)
    assert count.calls == 1


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_after_lowering_the_next_forward_raises(name: str, change: str) -> None:
    model = ltepass.lower(transformed(name))
    CHANGES[change](model)
    with pytest.raises(LoweredError, match="unlower"):
        logits(model)


@pytest.mark.parametrize("name", [n for n in GRAPHS if n != "own"])
def test_a_hook_on_a_linear_that_a_graph_calls(name: str) -> None:
    model = transformed(name)
    assert isinstance(model, torch.fx.GraphModule)
    called = [
        s for s in lte_state(model).sites if s.up in {str(n.target) for n in model.graph.nodes if n.op == "call_module"}
    ]
    if not called:
        pytest.skip("this dialect's graphs hold the products themselves")
    hook = model.get_submodule(called[0].down).register_forward_hook(lambda m, args, out: out + 1.0)
    expected = logits(model)
    ltepass.lower(model)
    assert any("carries a hook" in note for note in lte_state(model).notes)
    assert torch.allclose(logits(model), expected, atol=1e-5)
    ltepass.unlower(model)
    hook.remove()
    ltepass.lower(model)
    assert lte_state(model).notes == []
    model.get_submodule(called[0].down).register_forward_hook(lambda m, args, out: out + 1.0)
    with pytest.raises(LoweredError, match="unlower"):
        logits(model)


def test_hooks_that_are_taken_away_again_leave_nothing() -> None:
    model = ltepass.lower(transformed("llama"))
    expected = logits(model)
    hook = linear(model).register_forward_hook(lambda m, args, out: None)
    with pytest.raises(LoweredError):
        logits(model)
    hook.remove()
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_share_of_the_hidden_units_is_refused_by_name(name: str) -> None:
    """As tensor parallelism hands them: a half of the rows of up and gate, of the columns of down."""
    model = transformed(name)
    site = lte_state(model).sites[0]
    for rows in {r for r in site.neurons}:
        module, _, attribute = rows.param.rpartition(".")
        whole = model.get_parameter(rows.param)
        half = whole.detach().narrow(rows.dim, 0, site.d_ff // 2).clone()
        setattr(model.get_submodule(module), attribute, nn.Parameter(half))
    with pytest.raises(ShardedError, match="tp_plan"):
        logits(model)
    ltepass.lower(model)
    assert any("split over devices" in note for note in lte_state(model).notes)


def test_nothing_at_all_to_lower_names_the_hook() -> None:
    model = transformed("llama")
    for site in lte_state(model).sites:
        model.get_submodule(site.down).register_forward_hook(lambda m, args, out: out)
    with pytest.raises(LoweringError, match="carries a hook"):
        ltepass.lower(model)


HOOKS = ("register_forward_hook", "register_forward_pre_hook")


def look(seen: list[float]) -> Callable[..., None]:
    """A hook that keeps the size of what the module was handed, or handed on."""
    return lambda m, args, out=None: seen.append(float((args[0] if out is None else out).abs().sum()))


def bert() -> hf.BertModel:
    """Its linears lie in two modules, which the layer that owns the FFN calls: one hands on what the other takes."""
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 60}
    torch.manual_seed(0)
    model = hf.BertModel(hf.BertConfig(vocab_size=61, **sizes)).eval()
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
    """Dynamo traces and our backend lowers; inductor, which would take a minute, hands the graph on."""
    torch._dynamo.reset()
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda gm, inputs, config_patches: gm.forward)


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_hook_that_is_added_to_a_compiled_model_runs_and_is_gone_again(name: str, kind: str, eager: None) -> None:
    model = ltepass.lower(transformed(name), scope="model")
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
