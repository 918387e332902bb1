"""A public call looks its model's routers up once, and hands them down."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ltepass
from ltepass.calibration.sensitivity import loss_sensitivity
from ltepass.errors import LoweredError, NotTransformedError
from ltepass.measure.sparsity import measure_union
from ltepass.routed import routed as module
from ltepass.routed.routed import Routed, routers_of, state_of
from ltepass.routed.sites import FFNSite
from tests.training.learning_cases import calibrated, tokens

ROOT = Path(__file__).resolve().parents[2]
LOOK_UPS = {"router_of", "root_of", "state_of"}
BOUNDARY = {  # where a model comes in that may have no routers, or is not yet known to have some
    "ltepass/routed/routed.py",
    "ltepass/routed/undo.py",
    "ltepass/transform_and_lower.py",
    "ltepass/saving/plain_modules.py",
    "ltepass/saving/model_card.py",
    "ltepass/saving/quantizer.py",
    "ltepass/serving/lowered_server.py",
    "ltepass/commands/evaluate.py",
    "ltepass/commands/inspect.py",
    "ltepass/training/trainer.py",
}
BATCHES = [tokens(4), tokens(4, seed=2)]
CALLS: dict[str, Callable[[Any], Any]] = {
    "begin_stage": lambda m: ltepass.begin_stage(m, "soft"),
    "calibrate": lambda m: ltepass.calibrate(m, BATCHES, grouping="output_aware", inputs="hard"),
    "loss_sensitivity": lambda m: loss_sensitivity(m, BATCHES),
    "lower": ltepass.lower,
    "measure_sparsity": lambda m: ltepass.measure_sparsity(m, BATCHES),
    "measure_union": lambda m: measure_union(m, BATCHES),
    "prune": lambda m: ltepass.prune(m, BATCHES, sparsity=0.4),
    "remove": lambda m: ltepass.remove(m, undo_grouping=True),
    "report": ltepass.report,
    "set_hidden_sparsity": lambda m: ltepass.set_hidden_sparsity(m, 0.3, BATCHES),
    "set_sparsity": lambda m: ltepass.set_sparsity(m, 0.3),
    "settle": lambda m: ltepass.settle(m, BATCHES, 0.5),
    "warm_start": lambda m: ltepass.warm_start(m, tokens(4)),
}


@pytest.mark.parametrize("name", [name for name in CALLS if name != "prune"])  # which makes the routers anew
def test_a_call_looks_each_router_up_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = calibrated(n=8)
    ltepass.set_mode(model, "hard")
    found: list[str] = []
    router_of = module.router_of

    def counted(root: nn.Module, site: FFNSite) -> Any:
        found.append(site.name)
        return router_of(root, site)

    monkeypatch.setattr(module, "router_of", counted)
    names = [site.name for site in model._lte.sites]
    CALLS[name](model)
    assert found == names


def test_nothing_behind_a_public_call_looks_up_by_model() -> None:
    for file in [*(ROOT / "ltepass").rglob("*.py"), *(ROOT / "passes").rglob("*.py")]:
        called = {
            node.func.id
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        if str(file.relative_to(ROOT)) not in BOUNDARY:
            assert not called & LOOK_UPS, f"{file}: take the Routed that the public call made"


def test_it_is_of_the_model_inside_and_refuses_what_is_none() -> None:
    model = calibrated(n=8)
    outer = nn.Sequential(model)
    routed = Routed.of(outer, "this test")
    assert routed.model is model
    assert routed.state is state_of(model)
    assert [router for _, router in routed] == list(routers_of(model)) == routed.all_routers()
    assert all(routed.router(site) is router and routed.copies(site) == [router] for site, router in routed)
    with pytest.raises(NotTransformedError, match="this test expects a transformed model"):
        Routed.of(nn.Linear(2, 2), "this test")
    ltepass.set_mode(model, "hard")
    ltepass.lower(model)
    Routed.of(outer, "this test")
    with pytest.raises(LoweredError, match="this test expects it as trained"):
        Routed.trained(outer, "this test")


def test_an_adapters_router_decides_and_the_others_are_its_copies() -> None:
    from peft import LoraConfig, get_peft_model

    model = calibrated(n=8)
    first = list(routers_of(model))
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["router"]))
    routed = Routed.of(adapted, "this test")
    for old, (site, router) in zip(first, routed, strict=True):
        assert router is not old
        assert {id(r) for r in routed.copies(site)} == {id(old), id(router)}
    with adapted.disable_adapter():
        assert routed.router(routed.sites[0]) is not first[0], "as it was when the call began"
        assert Routed.of(adapted, "this test").routers == first


def test_a_model_that_lost_a_layer_since_still_changes_its_mode() -> None:
    model = calibrated(n=8)
    model.model.layers = model.model.layers[:1]
    ltepass.set_mode(model, "hard")
    assert [router.mode for router in routers_of(model)] == ["hard"]
    assert torch.isfinite(model(tokens(1)).logits).all()


def cut_off(model: Any) -> None:
    model.model.layers = model.model.layers[:1]


def wrapped(model: Any) -> None:
    model.model.layers[0].mlp = nn.Sequential(model.model.layers[0].mlp)


def bypassed(model: Any) -> None:
    model.model.layers[1].mlp = nn.Identity()


@pytest.mark.parametrize("taken_out", [cut_off, wrapped, bypassed])
@pytest.mark.parametrize("lowered", [False, True])
def test_a_site_that_was_taken_out_since_is_named_and_nothing_changes(
    lowered: bool, taken_out: Callable[[Any], None]
) -> None:
    model = calibrated(n=8)
    ltepass.set_mode(model, "hard")
    calls = {"unlower": ltepass.unlower} if lowered else CALLS
    if lowered:
        ltepass.lower(model)
    taken_out(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]
    for name, call in calls.items():
        with pytest.raises(NotTransformedError, match=r"layers\.\d\.mlp\.router is there no more"):
            call(model)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items()), name
        assert [type(module) for module in model.modules()] == classes, name
