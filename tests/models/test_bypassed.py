"""What runs with a linear's call and would not with the op: kept masked-dense, or an error where it came afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import ltepass
from ltepass.errors import LoweredError, LoweringError, ShardedError
from tests.models.zoo import GRAPHS, CountOp, logits, transformed
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
