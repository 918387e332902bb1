"""A function that takes an activation's place: an attribute of its FFN's own, and no module."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, relu, silu
from transformers.activations import ACT2FN

import ltepass
from ltepass.errors import LoweredError
from tests.models.zoo import build, llama, logits, made_once, mlp
from tests.typed import lte_state


class Aligned(nn.Module):
    """An FFN whose forward is regenerated."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.act = nn.Linear(8, 24), nn.Linear(24, 8), gelu

    def forward(self, x: Tensor) -> Any:
        return self.down(self.act(self.up(x)))


class Inline(Aligned):
    """Gated by hooks; its forward can be traced at its defaults."""

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Any:
        return super().forward(x if scale is None else x * scale)


class Unreadable(Aligned):
    """Gated by hooks around a forward that no trace reads."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x if x.shape[-1] == 8 else -x)


class Worded(Aligned):
    """Looks its activation up by a name."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.word = nn.Identity(), "gelu"

    def forward(self, x: Tensor) -> Any:
        return self.down(ACT2FN[self.word](self.up(x)))


class Module(Aligned):
    """Holds a module, and its settings say which activation that is."""

    def __init__(self) -> None:
        super().__init__()
        del self.act
        self.act = nn.GELU()


KINDS = [Aligned, Inline, Unreadable, Worded, Module]


def model_of(kind: Callable[[], nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(kind(), kind()).eval()
    ltepass.transform(model, INPUT, ltepass.LTEConfig(group_size=4))
    ltepass.set_mode(model, "hard")
    return model


INPUT = torch.linspace(-2.0, 2.0, 48).reshape(2, 3, 8)


def replace(model: nn.Module) -> None:
    """The first FFN's activation."""
    block: Any = model.get_submodule("0")
    if isinstance(block, Worded):
        block.word = "relu"
    else:
        block.act = nn.GELU("tanh") if isinstance(block, Module) else relu


@pytest.mark.parametrize("kind", [k for k in KINDS if k is not Module])
def test_before_lowering_its_site_stays_exact(kind: type[Aligned]) -> None:
    model = model_of(kind)
    first = logits(model, INPUT)
    replace(model)
    expected = logits(model, INPUT)
    assert not torch.allclose(expected, first, atol=1e-4)
    ltepass.lower(model)
    torch.testing.assert_close(logits(model, INPUT), expected, rtol=1e-4, atol=1e-5)
    assert [note[:22] for note in lte_state(model).notes] == ["0: kept masked-dense: "]


@pytest.mark.parametrize("kind", KINDS)
def test_after_lowering_the_next_forward_raises(kind: type[Aligned]) -> None:
    model: Any = ltepass.lower(model_of(kind))
    assert lte_state(model).notes == []
    expected = logits(model, INPUT)
    replace(model)
    with pytest.raises(LoweredError, match=r"has taken the place of .* call ltepass\.unlower"):
        logits(model, INPUT)
    assert logits(ltepass.unlower(model), INPUT).shape == expected.shape


@pytest.mark.parametrize("kind", KINDS)
def test_copies_hold_what_was_there(kind: type[Aligned]) -> None:
    model: Any = ltepass.lower(model_of(kind))
    expected = logits(model, INPUT)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    again = torch.load(saved, weights_only=False)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), again, copy.copy(model)):
        assert torch.equal(logits(twin, INPUT), expected)
    twin = copy.deepcopy(model)
    replace(twin)
    with pytest.raises(LoweredError, match="has taken the place of"):
        logits(twin, INPUT)
    assert torch.equal(logits(model, INPUT), expected)


@pytest.mark.parametrize("kind", [Aligned, Module])
def test_a_replica_of_data_parallel_is_no_replacement(kind: type[Aligned]) -> None:
    """Other modules, and the model's own plans."""
    model: Any = ltepass.lower(model_of(kind))
    expected = logits(model, INPUT)
    block: Any = model.get_submodule("0")
    if kind is Module:
        block.act = block.act._replicate_for_data_parallel()
    assert torch.equal(logits(model, INPUT), expected)


@pytest.mark.parametrize("kind", [k for k in KINDS if k is not Unreadable])
def test_a_compiler_that_traces_a_lowered_model(kind: type[Aligned]) -> None:
    model: Any = ltepass.lower(model_of(kind))
    expected = logits(model, INPUT)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(logits(compiled, INPUT), expected)
    replace(model)
    with pytest.raises(LoweredError, match="has taken the place of"):
        logits(compiled, INPUT)


@pytest.mark.parametrize("new", [relu, torch.tanh, ACT2FN["relu"], nn.ReLU()], ids=("relu", "tanh", "ACT2FN", "ReLU"))
def test_any_kind_in_the_place_of_any(new: Callable[[Tensor], Tensor]) -> None:
    """A model of transformers whose activation is a function, or was a module."""
    for old in ("function", "module"):
        model = build("llama")
        if old == "function":
            for each in model.modules():
                if hasattr(each, "act_fn"):
                    del each.act_fn
                    vars(each)["act_fn"] = silu
        ltepass.transform(model, None, ltepass.LTEConfig(group_size=4))
        ltepass.set_mode(model, "hard")
        lowered = ltepass.lower(model)
        logits(lowered)
        first: Any = mlp(lowered, 0)
        del first.act_fn
        first.act_fn = new
        with pytest.raises(LoweredError, match="has taken the place of"):
            logits(lowered)


def test_what_an_op_does_not_pass_by_may_change() -> None:
    """A layer's other functions are none of the FFN's business."""
    model: Any = ltepass.lower(llama_in_hard_mode())
    expected = logits(model)
    for layer in model.model.layers:
        layer.note = layer.mlp.note = print
    assert torch.equal(logits(model), expected)


@made_once
def llama_in_hard_mode() -> nn.Module:
    model = ltepass.transform(llama().eval(), None, ltepass.LTEConfig(group_size=4))
    ltepass.set_mode(model, "hard")
    return model
