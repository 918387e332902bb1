"""A module that takes an activation's place after transform: the op would go on with the first one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ltepass
from ltepass.errors import LoweredError
from tests.models.test_later_hooks import bert
from tests.models.zoo import logits, transformed
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
