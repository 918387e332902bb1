"""Copies, pickles, exports and layouts: nothing of one instance, one forward or one mode of torch sticks to another."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn

import ltepass
from ltepass.config import ROUTERS, RouterKind
from ltepass.routed.routed import routers_of
from tests.models import zoo
from tests.models.zoo import ALL, build, ids, layers, logits, mlp, transformed
from tests.typed import lte_state

COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    zoo.fresh_dynamo(monkeypatch, inductor=False)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", ["llama", "opt", "own"])
def test_a_copy_after_a_soft_forward_with_gradients(name: str, how: str, router: RouterKind) -> None:
    model = transformed(name, mode="soft", router=router)
    for made in routers_of(model):
        made.recorder.count_inactive = True
    model(ids())
    assert all(router.recorder.calls[-1].losses for router in routers_of(model))
    twin = COPIES[how](model)
    assert all(router.recorder.calls == [] for router in routers_of(twin))
    assert torch.equal(logits(twin), logits(model))
    assert all(router.recorder.calls for router in routers_of(model)), "the original keeps its own"


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", ["llama", "own"])  # an owner below the root, and the root itself
def test_a_copy_of_a_compiled_model_runs_its_own_weights(name: str, how: str, router: RouterKind, eager: None) -> None:
    model = transformed(name, router=router)
    expected, strides = logits(model), {n: p.stride() for n, p in model.named_parameters()}
    ltepass.lower(model, scope="model")
    logits(model)
    twin = COPIES[how](model)
    assert twin._lte.lowered is None
    assert twin._compiled_call_impl is None
    assert 'scope="model"' in ltepass.report(twin).notes[-1]
    torch.testing.assert_close(logits(twin), expected)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.5)
    assert not torch.allclose(logits(twin), expected)
    torch.testing.assert_close(logits(model), expected)
    changed = logits(twin)
    torch.testing.assert_close(logits(ltepass.lower(twin, scope="model")), changed)
    ltepass.unlower(twin)
    assert {n: p.stride() for n, p in twin.named_parameters()} == strides
    assert lte_state(model).lowered == "model"


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_copy_of_a_block_that_was_compiled_runs_its_own_weights(name: str) -> None:
    model = transformed(name)
    owner = model.get_submodule(lte_state(model).sites[0].owner)
    owner.compile(backend=lambda gm, inputs: gm.forward)
    twin = copy.deepcopy(model)
    assert twin.get_submodule(lte_state(model).sites[0].owner)._compiled_call_impl is None
    with torch.no_grad():
        twin.get_parameter(f"{lte_state(model).sites[0].down}.weight").zero_()
    assert not torch.equal(logits(twin), logits(model))


def test_a_lowered_copy_is_lowered_and_its_own() -> None:
    model = ltepass.lower(transformed("llama"))
    twin = copy.deepcopy(model)
    expected = logits(model)
    with torch.no_grad():
        mlp(twin, 0).get_parameter("down_proj.weight").zero_()
    assert not torch.equal(logits(twin), expected)
    assert torch.equal(logits(model), expected)
    assert {p.stride() for p in ltepass.unlower(twin).parameters()} == {p.stride() for p in build("llama").parameters()}


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("scope", ["ffn", "model"])
def test_a_model_that_was_changed_in_inference_mode_still_trains(
    name: str, scope: Literal["ffn", "model"], eager: None
) -> None:
    model = build(name)
    with torch.inference_mode():
        ltepass.transform(model, config=ltepass.LTEConfig(group_size=4, grouping="coactivation"), calibration=[ids()])
        ltepass.calibrate(model, [ids()], grouping="kmeans")
        ltepass.set_sparsity(model, 0.5)
        ltepass.set_hidden_sparsity(model, 0.2, [ids()])
        ltepass.set_input_sparsity(model, 0.2, [ids()])
        ltepass.set_mode(model, "hard")
        ltepass.lower(model, scope=scope)
        model(ids())
        ltepass.unlower(model)
        assert torch.is_inference_mode_enabled()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert [n for n, t in tensors.items() if t.is_inference()] == []
    ltepass.set_mode(model, "soft")
    model.train()
    model(ids())[0].float().square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


class _Strange(nn.Module):
    """Weights that lie in every way: by column, in every other row of something bigger, and under a second name."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 8))
        self.b = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 8))
        up, down = self.a.get_parameter("0.weight"), self.a.get_parameter("2.weight")
        up.data, down.data = up.data.t().contiguous().t(), torch.randn(16, 24)[::2]
        self.again = self.a

    def forward(self, x: torch.Tensor) -> Any:
        x = x + self.a(x)
        return x + self.b(x)


def test_unlower_gives_back_the_strides_and_the_parameters_that_were() -> None:
    model, x = _Strange().eval(), torch.randn(2, 3, 8)
    ltepass.transform(model, x, ltepass.LTEConfig(group_size=4, grouping="identity"))
    ltepass.set_mode(model, "hard")
    expected = logits(model, x)
    before = {n: (p, p.stride(), p.detach().clone()) for n, p in model.named_parameters(remove_duplicate=False)}
    assert before["a.2.weight"][1] == (48, 1)
    ltepass.lower(model)
    assert model.get_parameter("a.2.weight").stride() == (1, 8)
    ltepass.unlower(model)
    for n, p in model.named_parameters(remove_duplicate=False):
        was, stride, value = before[n]
        assert p is was, n
        assert p.stride() == stride, n
        assert torch.equal(p, value), n
    assert torch.equal(logits(model, x), expected)


def test_unlower_leaves_a_weight_that_was_replaced_meanwhile_as_it_lies() -> None:
    model = transformed("llama")
    state = {k: v.clone() for k, v in model.state_dict().items()}
    ltepass.lower(model)
    model.load_state_dict(state, assign=True)
    ltepass.unlower(model)
    assert all(p.is_contiguous() for p in model.parameters())
    assert lte_state(model).strides == {}


def test_an_exported_program_loads_after_import_ltepass_alone(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 8)
    model = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 8)).eval()
    ltepass.transform(model, x, ltepass.LTEConfig(group_size=4))
    ltepass.set_mode(model, "hard")
    programs = {"hard": torch.export.export(model, (x,)), "lowered": torch.export.export(ltepass.lower(model), (x,))}
    for name, program in programs.items():
        torch.export.save(program, tmp_path / f"{name}.pt2")
    torch.save((x, logits(model, x)), tmp_path / "expected")
    code = (
        "import sys, torch, ltepass\n"
        "x, y = torch.load('expected')\n"
        f"for name in {list(programs)}:\n"
        "    torch.testing.assert_close(torch.export.load(name + '.pt2').module()(x), y)\n"
        "print('as saved')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["as", "saved"], done.stderr[-2000:]


@pytest.mark.parametrize("name", ALL)
def test_every_style_is_copied_while_lowered(name: str) -> None:
    model = ltepass.lower(transformed(name))
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


TRACED = ("symbolic_trace", "export")


@pytest.mark.parametrize("lowered", [False, True])
@pytest.mark.parametrize("name", TRACED)
def test_a_deep_copy_of_a_graph_is_transformed_and_its_own(name: str, lowered: bool) -> None:
    model = transformed(name)
    expected = logits(model)
    if lowered:
        ltepass.lower(model)
    for twin in (copy.deepcopy(model), copy.deepcopy(copy.deepcopy(model))):
        assert twin._lte is not model._lte
        assert ltepass.report(twin).lowered == ("ffn" if lowered else None)
        ltepass.unlower(twin)
        assert torch.equal(logits(twin), expected)
        ltepass.set_mode(twin, "dense")
        assert not torch.allclose(logits(twin), expected, atol=1e-4)
        ltepass.set_mode(twin, "hard")
        assert torch.allclose(logits(ltepass.lower(twin)), expected, atol=1e-5)
        ltepass.remove(ltepass.unlower(twin), undo_grouping=True)
        assert not any(routers_of(twin))
        assert "_lte" not in copy.deepcopy(twin).__dict__
    assert ltepass.report(model).lowered == ("ffn" if lowered else None)
    assert torch.allclose(logits(model), expected, atol=1e-5)


@pytest.mark.parametrize("name", TRACED)
def test_what_torch_keeps_for_a_user_stays_when_the_state_goes(name: str) -> None:
    model = build(name)
    assert isinstance(model, torch.fx.GraphModule)
    model.meta["_user_preserved_attributes"] = {"theirs": 7}
    before = {**model.meta}
    ltepass.transform(model, ids(), ltepass.LTEConfig(group_size=4, grouping="identity"))
    assert copy.deepcopy(model).theirs == 7
    assert ltepass.remove(model).meta == before
    with pytest.raises(ltepass.errors.NotTransformedError):
        ltepass.remove(model)


def test_a_pickled_graph_is_transformed() -> None:
    for lowered in (False, True):
        model = transformed("symbolic_trace")
        expected = logits(model)
        twin = pickle.loads(pickle.dumps(ltepass.lower(model) if lowered else model))
        assert torch.allclose(logits(twin), expected, atol=1e-5)
        assert torch.equal(logits(ltepass.unlower(twin)), expected)
        ltepass.set_mode(twin, "soft")


@pytest.mark.parametrize("name", TRACED)
def test_a_shallow_copy_of_a_graph_is_refused_by_name(name: str) -> None:
    model = transformed(name)
    twin, expected = copy.copy(model), logits(model)
    for verb in (ltepass.lower, ltepass.unlower, ltepass.remove, ltepass.report):
        with pytest.raises(ltepass.errors.NotTransformedError, match=r"copy\.deepcopy"):
            verb(twin)
    assert torch.equal(logits(twin), expected)
    assert torch.equal(logits(model), expected)


def test_a_part_of_a_transformed_model_is_refused_by_name() -> None:
    model = transformed("llama")
    with pytest.raises(ltepass.errors.NotTransformedError, match="no part of it"):
        ltepass.set_mode(layers(model), "dense")
