"""A linear of an FFN whose weight is computed at each call is refused under its own name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import ltepass
from ltepass.errors import NoFFNFoundError
from tests.models.zoo import Own, build, ids, layers, logits
from tests.typed import lte_state


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Any:
        return weight * 2


KINDS: dict[str, Callable[[nn.Module], object]] = {
    "weight_norm": parametrizations.weight_norm,
    "weight_norm by hooks": torch.nn.utils.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "pruning": lambda linear: prune.l1_unstructured(linear, "weight", 0.5),
    "of the user's own": lambda linear: parametrize.register_parametrization(linear, "weight", Twice()),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "path"),
    [("llama", f"mlp.{part}_proj") for part in ("up", "gate", "down")] + [("opt", "fc1"), ("opt", "fc2")],
)
def test_it_is_refused_by_name_and_the_others_are_gated(name: str, path: str, kind: str) -> None:
    model = build(name)
    KINDS[kind](layers(model)[0].get_submodule(path))
    expected = logits(model)
    ltepass.transform(model, None, ltepass.LTEConfig(group_size=4))
    (refusal,) = lte_state(model).refusals
    assert refusal.module.endswith(f"layers.0.{path}")
    assert refusal.check == "weight"
    assert "is no parameter" in refusal.reason
    assert [site.name.split(".")[-1 if name == "opt" else -2] for site in lte_state(model).sites] == ["1"]
    assert torch.equal(logits(model), expected)


def test_where_nothing_else_is_found_the_error_names_them() -> None:
    model = Own().eval()
    for linear in (model.w1, model.block[3]):
        assert isinstance(linear, nn.Linear)
        parametrizations.weight_norm(linear)
    with pytest.raises(NoFFNFoundError) as error:
        ltepass.transform(model, ids(), ltepass.LTEConfig(group_size=4))
    for name in ("w1", "block.3"):
        assert f"\n  {name}: weight: its weight is no parameter: _weight_norm computes it" in str(error.value)


def test_what_it_asks_for_helps() -> None:
    model = build("llama")
    linear = layers(model)[0].get_submodule("mlp.up_proj")
    parametrizations.weight_norm(linear)
    parametrize.remove_parametrizations(linear, "weight")
    ltepass.transform(model, None, ltepass.LTEConfig(group_size=4))
    assert lte_state(model).refusals == []


def test_a_linear_of_attention_is_no_ffns() -> None:
    model = build("llama")
    attention = layers(model)[0].get_submodule("self_attn")
    for name in ("q_proj", "v_proj", "o_proj"):
        parametrizations.weight_norm(attention.get_submodule(name))
    ltepass.transform(model, None, ltepass.LTEConfig(group_size=4))
    assert lte_state(model).refusals == []
    assert len(lte_state(model).sites) == 2
