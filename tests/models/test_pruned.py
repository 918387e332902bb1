"""torch.nn.utils.prune on a linear of a lowered FFN."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import ltepass
from ltepass.errors import LoweredError
from tests.models.test_bypassed import linear
from tests.models.zoo import logits, transformed
from tests.typed import lte_state

METHODS: dict[str, Callable[[nn.Linear], object]] = {
    "random_unstructured": lambda m: prune.random_unstructured(m, "weight", 0.5),
    "l1_unstructured": lambda m: prune.l1_unstructured(m, "weight", 0.5),
    "ln_structured": lambda m: prune.ln_structured(m, "weight", 0.5, n=2, dim=0),
    "random_structured": lambda m: prune.random_structured(m, "weight", 0.5, dim=1),
    "custom_from_mask": lambda m: prune.custom_from_mask(m, "weight", torch.ones_like(m.weight)),
    "identity": lambda m: prune.identity(m, "weight"),
}


CASES = [("llama", "up", method) for method in METHODS]
CASES += [(name, part, "custom_from_mask") for name in ("llama", "opt") for part in ("gate", "down")]
CASES += [("symbolic_trace", "up", "custom_from_mask")]


@pytest.mark.parametrize(("name", "part", "method"), [case for case in CASES if case[:2] != ("opt", "gate")])
def test_the_next_forward_says_what_to_do(name: str, part: str, method: str) -> None:
    model = ltepass.lower(transformed(name))
    METHODS[method](linear(model, part))
    with pytest.raises(LoweredError, match=r"added after ltepass\.lower; call ltepass\.unlower\(model\) before"):
        logits(model)
    ltepass.lower(ltepass.unlower(model))
    assert any("kept masked-dense: " in note for note in lte_state(model).notes)
    again = logits(model)
    torch.testing.assert_close(again, logits(ltepass.unlower(model)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_what_torch_cannot_prune_stays_as_it_is(name: str) -> None:
    """It views the weight as one row, and lowering has stored down's neuron after neuron."""
    model = ltepass.lower(transformed(name))
    expected, down = logits(model), linear(model, "down")
    for prunes in (
        lambda: prune.l1_unstructured(down, "weight", 0.5),
        lambda: prune.random_unstructured(down, "weight", 0.5),
        lambda: prune.global_unstructured([(down, "weight")], prune.L1Unstructured, amount=0.5),
    ):
        with pytest.raises(RuntimeError, match="view size"):
            prunes()
        assert torch.equal(logits(model), expected)
    prune.l1_unstructured(linear(ltepass.unlower(model), "down"), "weight", 0.5)
    again = logits(ltepass.lower(model))
    torch.testing.assert_close(again, logits(ltepass.unlower(model)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("part", ["up", "gate", "down"])
def test_pruning_that_is_made_permanent_is_a_weight_like_any(part: str) -> None:
    model, twin = ltepass.lower(transformed("llama")), transformed("llama")
    mask = (torch.arange(24 * 60) % 3 > 0).reshape(linear(model, part).weight.shape)
    for each in (model, twin):
        prune.custom_from_mask(linear(each, part), "weight", mask)
        prune.remove(linear(each, part), "weight")
    torch.testing.assert_close(logits(model), logits(twin), rtol=1e-4, atol=1e-5)
