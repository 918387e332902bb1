"""What transform built is tried on random tokens: a gate that does not act is an error, and the try leaves nothing."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import nn

import ltepass
from ltepass.errors import CheckpointError, GateError
from ltepass.passes.insert import insert_routers as inserting
from ltepass.passes.insert.try_gated_copy import check_gated
from ltepass.routed.routed import router_of, routers_of
from ltepass.routed.router import Router
from tests.models.zoo import build, ids, logits, transformed
from tests.typed import lte_state


def state(model: nn.Module) -> tuple[Any, ...]:
    hooks = [list(m._forward_pre_hooks.values()) for m in model.modules()]
    return [type(m) for m in model.modules()], hooks, {k: v.clone() for k, v in model.state_dict().items()}


def assert_refused(model: nn.Module, match: str) -> None:
    classes, hooks, tensors = state(model)
    with pytest.raises(GateError, match=match):
        ltepass.transform(model, config=ltepass.LTEConfig(group_size=4, grouping="random"))
    now = state(model)
    assert (now[0], now[1]) == (classes, hooks)
    assert all(torch.equal(now[2][k], tensors[k]) for k in tensors | now[2])
    assert not any(routers_of(model))


def test_a_gate_that_is_not_called_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inserting, "insert_gates", lambda graph, sites, *, tiered: None)
    assert_refused(build("llama"), "not called")


def test_a_gate_whose_output_does_not_reach_down_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    before = inserting._insert_gate

    def beside(graph: Any, inputs: Any, down: Any, h: Any, router: str, tiered: bool) -> None:
        before(graph, inputs, down, h, router, tiered)
        gated = next(n for n in down.all_input_nodes)
        with graph.inserting_after(gated):  # called, and thrown away but for nothing times it
            kept = graph.call_function(torch.add, (h, gated), {"alpha": 0.0})
        down.replace_input_with(gated, kept)

    monkeypatch.setattr(inserting, "_insert_gate", beside)
    assert_refused(build("llama"), "closed gate")


def test_an_owner_that_computes_something_else_in_dense_mode_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    before = inserting.insert_gates

    def doubled(graph: Any, sites: Any, *, tiered: bool) -> None:
        before(graph, sites, tiered=tiered)
        (end,) = [n for n in graph.nodes if n.op == "output"]
        with graph.inserting_before(end):
            end.args = (graph.call_function(torch.mul, (end.args[0], 1.01)),)

    monkeypatch.setattr(inserting, "insert_gates", doubled)
    assert_refused(build("llama"), "something else")


class Remembering(nn.Module):
    """Keeps calls in containers and a buffer, and draws numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(8, 24), nn.Linear(24, 8), nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(3)
        self.seen: list[Any] = []

    def forward(self, x: torch.Tensor) -> Any:
        self.seen.append(x)
        return self.norm(self.down(self.drop(torch.relu(self.up(x)))))


class Block(nn.Module):
    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self.mlp = owner

    def forward(self, x: torch.Tensor) -> Any:
        return x + self.mlp(x)


def test_the_try_leaves_nothing_behind() -> None:
    model, seen = Block(Remembering()).train(), []
    for module in model.modules():
        module.register_forward_hook(lambda m, args, out: seen.append(out))
        module.register_forward_pre_hook(lambda m, args: seen.append(args))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    numbers = torch.get_rng_state(), random.getstate()
    ltepass.transform(model, torch.zeros(2, 3, 8), ltepass.LTEConfig(group_size=4, grouping="identity"))
    seen.clear()
    check_gated(model, lte_state(model).sites)
    assert not seen
    assert not model.mlp.seen
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    assert torch.equal(torch.get_rng_state(), numbers[0])
    assert random.getstate() == numbers[1]
    assert all(m.training for m in model.modules())
    assert all(p.grad is None and not p.grad_fn for p in model.parameters())
    assert router_of(model, lte_state(model).sites[0]).mode == "dense"


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "gpt_neox", "own"])
def test_every_owner_of_one_input_is_tried(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = transformed(name)
    expected = logits(model)
    gates = []
    forward = Router.forward

    def counted(self: Router, x: torch.Tensor) -> torch.Tensor | None:
        gates.append(x.shape)
        return forward(self, x)

    monkeypatch.setattr(Router, "forward", counted)
    untried = check_gated(model, lte_state(model).sites)
    assert len(gates) == 2 * (len(lte_state(model).sites) - sum("model" in line or "Own" in line for line in untried))
    assert torch.equal(logits(model), expected)


def test_owners_on_meta_are_named() -> None:
    with torch.device("meta"):
        model = build("llama")
    ltepass.transform(model)
    (line,) = ltepass.report(model).untried
    assert "model.layers.0.mlp, model.layers.1.mlp" in line
    assert "meta" in line
    assert "meta" in str(ltepass.report(model))
    assert ltepass.report(transformed("opt")).untried == []  # its layers take one tensor, and options


def test_an_owner_of_several_inputs_is_named() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)

        def forward(self, x: torch.Tensor, residual: torch.Tensor) -> Any:
            return residual + self.down(torch.relu(self.up(x)))

    class Outer(Block):
        def forward(self, x: torch.Tensor) -> Any:
            return self.mlp(torch.tanh(x), x)

    model = Outer(Two()).eval()
    ltepass.transform(model, (torch.randn(2, 3, 8),), ltepass.LTEConfig(group_size=4))
    (line,) = ltepass.report(model).untried
    assert line.startswith("mlp: ")
    assert "one tensor alone" in line


def test_a_loaded_checkpoint_is_tried(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM, PreTrainedModel

    model: PreTrainedModel = transformed("llama")
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(inserting, "insert_gates", lambda graph, sites, *, tiered: None)
    with pytest.raises(CheckpointError, match="not called"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    monkeypatch.undo()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), ids()), logits(model))
