"""A module that takes an activation's place after transform: the op would go on with the first one."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import ltepass
from ltepass.errors import LoweredError
from tests.models.test_later_hooks import bert
from tests.models.zoo import ids, logits, transformed
from tests.typed import lte_state


def model_of(name: str) -> nn.Module:
    return bert() if name == "bert" else transformed(name, mode="hard")


def replace(model: nn.Module) -> None:
    """The activation of the first FFN, by one that no model here has."""
    names = {"SiLUActivation", "ReLU", "GELUActivation"}
    path = next(path for path, module in model.named_modules() if type(module).__name__ in names)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, nn.Sigmoid())


NAMES = ["llama", "opt", "bert", "own", "symbolic_trace"]


@pytest.mark.parametrize("name", NAMES)
def test_before_lowering_its_site_stays_exact(name: str) -> None:
    model = model_of(name)
    first = logits(model)
    replace(model)
    expected = logits(model)
    assert not torch.allclose(expected, first, atol=1e-4)
    ltepass.lower(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    assert len([note for note in lte_state(model).notes if "kept masked-dense: its " in note]) == 1


@pytest.mark.parametrize("name", NAMES)
def test_after_lowering_the_next_forward_raises(name: str) -> None:
    model = ltepass.lower(model_of(name))
    replace(model)
    with pytest.raises(LoweredError, match="a Sigmoid has taken the place of a"):
        logits(model)
    ltepass.lower(ltepass.unlower(model))
    logits(model)


class Scaled(nn.Module):
    """ReLU by settings, which counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.floor, self.factor = 0, 0, 1.0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x.clamp(min=self.floor) * self.factor


class Block(nn.Module):
    """An FFN whose forward is regenerated."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(24, 60), act, nn.Linear(60, 24)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.act(self.up(x)))
        return out


def lowered(kind: str, act: nn.Module) -> tuple[nn.Module, Tensor]:
    """A model whose first FFN calls this activation, and an input."""
    if kind == "inline":
        return ltepass.lower(bert(act)), ids()
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(Block(act)).eval()
    if kind == "graph":
        model = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(24, 60), act, nn.Linear(60, 24)).eval())
    x = torch.randn(3, 24)
    ltepass.transform(model, (x,), ltepass.LTEConfig(group_size=4))
    ltepass.set_mode(model, "hard")
    return ltepass.lower(model), x


SETTINGS = [
    (nn.GELU, "approximate", "tanh"),
    (hf.activations.GELUActivation, "act", torch.sigmoid),
    (Scaled, "factor", 2.0),
]


# torch.fx.symbolic_trace writes what a module of a user's own computes into the graph: there is nothing to be changed
@pytest.mark.parametrize(
    ("kind", "act", "name", "value"),
    [(kind, *rest) for kind in ("regenerated", "inline") for rest in SETTINGS] + [("graph", *SETTINGS[0])],
)
def test_a_setting_changed_in_place_after_lowering_raises(
    kind: str, act: type[nn.Module], name: str, value: object
) -> None:
    module = act()
    before = getattr(module, name)
    model, x = lowered(kind, module)
    expected = logits(model, x)
    setattr(module, name, value)
    with pytest.raises(LoweredError, match=f"the setting '{name}' of a {act.__name__} is no longer"):
        logits(model, x)
    setattr(module, name, before)
    assert torch.equal(logits(model, x), expected)


def test_a_whole_number_is_a_setting_where_the_module_does_not_run() -> None:
    act = Scaled()
    model, x = lowered("regenerated", act)
    act.floor = -1
    with pytest.raises(LoweredError, match="the setting 'floor' of a Scaled is no longer 0"):
        logits(model, x)


def test_an_activation_that_runs_on_zeros_may_count_its_calls() -> None:
    act = Scaled()
    model, x = lowered("inline", act)
    before = act.calls
    for _ in range(3):
        logits(model, x)
    assert act.calls == before + 3


@pytest.mark.parametrize("kind", ["regenerated", "inline", "graph"])
def test_a_copy_and_a_pickle_know_the_settings_too(kind: str) -> None:
    model, x = lowered(kind, nn.GELU())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(logits(copied, x), logits(model, x), rtol=0, atol=0)
        act = next(m for m in copied.modules() if isinstance(m, nn.GELU))
        act.approximate = "tanh"
        with pytest.raises(LoweredError, match="the setting 'approximate' of a GELU"):
            logits(copied, x)
