"""Which FFNs are gated, and what differs from one to the next, as a user names them."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import ltepass
from ltepass.errors import ConfigError, GroupSizeError
from ltepass.routed.routed import routers_of
from ltepass.routed.sites import FFNSite
from tests.models import zoo

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
IDS = torch.arange(24).reshape(2, 12)
MLP = "model.layers.{}.mlp"


class Two(nn.Module):
    """One owner of two FFNs."""

    def __init__(self) -> None:
        super().__init__()
        self.up0, self.down0 = nn.Linear(6, 24), nn.Linear(24, 6)
        self.up1, self.down1 = nn.Linear(6, 24), nn.Linear(24, 6)

    def forward(self, x: Tensor) -> Any:
        x = x + self.down0(torch.relu(self.up0(x)))
        return x + self.down1(torch.relu(self.up1(x)))


def llama() -> hf.PreTrainedModel:
    torch.manual_seed(0)
    return zoo.llama(3).eval()


def t5() -> hf.PreTrainedModel:
    return zoo.t5().eval()


def graph() -> Any:
    return torch.fx.symbolic_trace(nn.Sequential(Two(), Two()).eval())


def names(model: nn.Module) -> list[str]:
    return [site.name for site in ltepass.report(model).sites]


def left_out(model: nn.Module) -> dict[str, str]:
    return {r.module: r.reason for r in ltepass.report(model).refusals if r.check == "left out"}


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        ({"only": MLP.format(1)}, [1]),
        ({"only": "model.layers.*.mlp", "skip": [MLP.format(0)]}, [1, 2]),
        ({"skip": lambda site: site.name.endswith("2.mlp")}, [0, 1]),
        ({"only": (MLP.format(2), "*.0.*")}, [0, 2]),
        ({"only": lambda site: "1" in site.owner, "skip": MLP.format(0)}, [1]),
        ({}, [0, 1, 2]),
    ],
)
def test_what_is_left_out_stays_dense_and_is_reported(arguments: dict[str, Any], kept: list[int]) -> None:
    model, dense = llama(), llama()
    ltepass.transform(model, config=ltepass.LTEConfig(group_size=12, grouping="random"), **arguments)
    assert names(model) == [MLP.format(i) for i in kept]
    assert set(left_out(model)) == {MLP.format(i) for i in range(3) if i not in kept}
    assert torch.allclose(model(IDS).logits, dense(IDS).logits, atol=1e-5)
    ltepass.set_mode(model, "hard")
    for i in range(3):
        mlp = model.model.layers[i].mlp
        assert any(routers_of(mlp)) == (i in kept)
        if i not in kept:
            assert torch.equal(mlp.up_proj.weight, dense.model.layers[i].mlp.up_proj.weight), "no neuron moved"
            assert type(mlp) is type(dense.model.layers[i].mlp)


@pytest.mark.parametrize(
    ("make", "inputs", "only", "kept"),
    [
        (Two, X, "#1", ["#1"]),
        (lambda: nn.Sequential(Two(), Two()), X, "0", ["0#0", "0#1"]),
        (lambda: nn.Sequential(Two(), Two()), X, ["0#1", "1#0"], ["0#1", "1#0"]),
        (graph, X, lambda site: "down0" in site.down, None),
        (t5, {"input_ids": IDS, "decoder_input_ids": IDS}, "decoder.*", ["decoder.block.0.layer.2.DenseReluDense"]),
    ],
    ids=["several of the root", "all of an owner", "one of each", "graph", "decoder alone"],
)
def test_one_site_of_several(make: Any, inputs: Any, only: Any, kept: list[str] | None) -> None:
    torch.manual_seed(0)
    model = make().eval()
    calls = inputs if isinstance(inputs, dict) else {"x": inputs}
    run = lambda: model(**calls) if isinstance(inputs, dict) else model(inputs)  # noqa: E731
    before = run()
    if only == "#1":
        only = lambda site: "down1" in site.down  # noqa: E731  # a root's own sites have no path
    ltepass.transform(model, inputs, ltepass.LTEConfig(group_size=12 if isinstance(inputs, dict) else 4), only=only)
    found = names(model)
    assert len(found) == len(kept or (0, 0))
    if kept is not None and kept != ["#1"]:
        assert found == kept
    value = lambda out: out if isinstance(out, Tensor) else out.logits  # noqa: E731
    torch.testing.assert_close(value(run()), value(before))
    ltepass.set_mode(model, "hard")
    for router in routers_of(model):
        router.threshold.fill_(torch.inf)
    hard = value(run())
    assert not torch.allclose(hard, value(before)), "the gate acts"
    ltepass.lower(model)
    torch.testing.assert_close(value(run()), hard)
    ltepass.remove(ltepass.unlower(model))
    torch.testing.assert_close(value(run()), value(before))


def test_sizes_differ_by_site_and_are_saved(tmp_path: Path) -> None:
    model = llama()
    sizes: dict[str, dict[str, int | str]] = {
        MLP.format(0): {"group_size": 12},
        "model.layers.[12].mlp": {"group_size": "auto"},
    }
    ltepass.transform(
        model, config=ltepass.LTEConfig(group_size=10), calibration=[IDS], per_site=sizes, skip=MLP.format(2)
    )
    ltepass.set_sparsity(model, 0.5)
    ltepass.set_mode(model, "hard")
    assert [s.group_size for s in ltepass.report(model).sites] == [12, 30]
    expected = model(IDS).logits
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(IDS).logits, expected)
    assert [s.group_size for s in ltepass.report(again).sites] == [12, 30]
    assert left_out(again) == left_out(model) == {MLP.format(2): "skip names it"}
    torch.testing.assert_close(ltepass.lower(again)(IDS).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"only": "model.layers.7.mlp"}, "only names 'model.layers.7.mlp', which no FFN site has"),
        ({"skip": ["model.layers.0.mlp", "lm_head"]}, "skip names 'lm_head'"),
        ({"skip": "*"}, "leave out all 3 FFN sites"),
        ({"only": lambda site: False}, "leave out all 3 FFN sites"),
        ({"only": [3]}, "only holds 3"),
        ({"skip": 3}, "skip holds 3"),
        ({"skip": lambda site: None}, "skip answers None for model.layers.0.mlp"),
        ({"per_site": ["*"]}, r"per_site is \['\*'\]"),
        ({"per_site": {"*": 3}}, r"per_site holds '\*': 3"),
        ({"per_site": {"nothing": {}}}, "per_site holds 'nothing': {}"),
        ({"per_site": {"*0.mlp": {"group_size": 12}}, "skip": "*0.mlp"}, "per_site names '\\*0.mlp'"),
        ({"per_site": {"*": {"tau": 0.3}}}, "'tau'; expected group_size"),
        ({"per_site": {"*": {"group_size": 0}}}, "group_size is 0"),
        ({"per_site": {"*": {"group_size": True}}}, "group_size is True"),
        ({"per_site": {"nothing": {"group_size": 12}}}, "per_site names 'nothing'"),
        ({"per_site": {"*0.mlp": {"group_size": 12}, "*": {"group_size": 10}}}, "12 by '\\*0.mlp' and 10 by '\\*'"),
    ],
)
def test_what_names_nothing_is_refused_before_anything_changes(arguments: dict[str, Any], message: str) -> None:
    model = llama()
    before = {**model.state_dict()}, model(IDS).logits, type(model.model.layers[0].mlp)
    with pytest.raises(ConfigError, match=message):
        ltepass.transform(model, **arguments)
    assert model.state_dict().keys() == before[0].keys()
    assert torch.equal(model(IDS).logits, before[1])
    assert type(model.model.layers[0].mlp) is before[2]


def test_a_size_that_does_not_divide_names_its_site() -> None:
    with pytest.raises(GroupSizeError, match=r"group_size 7 does not divide d_ff at model.layers.1.mlp \(60\)"):
        ltepass.transform(llama(), per_site={MLP.format(1): {"group_size": 7}})


def test_a_function_is_given_sites() -> None:
    seen: list[FFNSite] = []

    def every(site: FFNSite) -> bool:
        seen.append(site)
        return True

    ltepass.transform(llama(), only=every)
    assert [site.d_ff for site in seen] == [60, 60, 60]
    assert all(isinstance(site, FFNSite) for site in seen)


class FFN(nn.Module):
    def __init__(self, up: nn.Linear, down: nn.Linear) -> None:
        super().__init__()
        self.up, self.down = up, down

    def forward(self, x: Tensor) -> Any:
        return x + self.down(torch.relu(self.up(x)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"only": "0"}, "leave out 1 and keep 0, which shares its weights"),
        ({"skip": lambda site: site.name == "0"}, "leave out 0 and keep 1, which shares its weights"),
        ({"per_site": {"1": {"group_size": 8}}}, "groups of 4 at 0 and of 8 at 1, which shares its weights"),
        ({"per_site": {"[01]": {"group_size": 8}}, "skip": "2"}, ""),
    ],
    ids=["only", "skip", "per_site", "both"],
)
def test_sites_that_share_their_weights_are_chosen_and_sized_together(arguments: Any, message: str) -> None:
    up, down = nn.Linear(6, 24), nn.Linear(24, 6)
    model = nn.Sequential(FFN(up, down), FFN(up, down), FFN(nn.Linear(6, 24), nn.Linear(24, 6))).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = ltepass.LTEConfig(group_size=4, grouping="random")
    if not message:
        ltepass.transform(model, X, config, **arguments)
        assert [site.group_size for site in ltepass.report(model).sites] == [8, 8]
        return
    with pytest.raises(ConfigError, match=message):
        ltepass.transform(model, X, config, **arguments)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


PAIR = {"input_ids": IDS, "decoder_input_ids": IDS}
SHAPES: dict[
    str, tuple[Any, Any, str, str, int]
] = {  # model, inputs, what is left out, what has groups of its own size
    "several of an owner": (lambda: nn.Sequential(Two(), Two()).eval(), X, "1#0", "0#1", 8),
    "graph": (graph, X, "2", "1", 8),
    "decoder": (llama, {"input_ids": IDS}, MLP.format(2), MLP.format(0), 20),
    "encoder-decoder": (t5, PAIR, "none", "encoder.*", 20),
}


def values(model: Any, inputs: Any) -> Tensor:
    out = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return out if isinstance(out, Tensor) else out.logits


@pytest.mark.parametrize(  # budget "model" needs a model that returns logits
    ("shape", "budget"), [*((shape, "layer") for shape in SHAPES), ("decoder", "model"), ("encoder-decoder", "model")]
)
def test_sizes_and_what_is_left_out_hold_through_all_calls(shape: str, budget: Any, tmp_path: Path) -> None:
    make, inputs, skipped, sized, size = SHAPES[shape]
    torch.manual_seed(0)
    model = make()
    fresh = make()
    skip = None if skipped == "none" else skipped
    config = ltepass.LTEConfig(group_size=4, budget=budget)
    batches = [inputs] if isinstance(inputs, dict) else [{"input": inputs}]
    ltepass.transform(model, inputs, config, batches, skip=skip, per_site={sized: {"group_size": size}})
    sites = ltepass.report(model).sites
    expected = {s.name: size if fnmatchcase(s.name, sized) else 4 for s in sites}
    assert {s.name: s.group_size for s in sites} == expected
    assert set(expected.values()) == {4, size}
    shares = ltepass.settle(model, batches, 0.5)
    assert shares.keys() == expected.keys()
    assert abs(sum(shares.values()) / len(shares) - 0.5) < 0.1
    ltepass.save(model, tmp_path)
    again = ltepass.load(fresh, tmp_path)
    assert torch.equal(values(again, inputs), values(model, inputs))
    assert {s.name: s.group_size for s in ltepass.report(again).sites} == expected
    assert ltepass.report(again).refusals == ltepass.report(model).refusals


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "arguments", [{"skip": "*"}, {"only": "none"}, {"per_site": {"none": {"group_size": 2}}}, {"skip": lambda s: 1}]
)
def test_a_refused_choice_leaves_every_kind_of_model_as_it_was(shape: str, arguments: dict[str, Any]) -> None:
    make, inputs, *_ = SHAPES[shape]
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    forwards, expected = [type(module) for module in model.modules()], values(model, inputs)
    with pytest.raises(ConfigError):
        ltepass.transform(model, inputs, ltepass.LTEConfig(group_size=4, grouping="random"), **arguments)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [type(module) for module in model.modules()] == forwards
    assert torch.equal(values(model, inputs), expected)
