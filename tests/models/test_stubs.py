"""A lowered inline site computes its activation on one token of zeros, on all of them only where code asks for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import ltepass
from ltepass.routed.routed import routers_of
from tests.models.zoo import CountOp, ids, logits, transformed
from tests.typed import lte_state


class LargestWithin(TorchDispatchMode):
    """The largest tensor with this last dim that any operation makes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.numel = width, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dim() and out.shape[-1] == self.width:
            self.numel = max(self.numel, out.numel())
        return out


def test_no_hidden_unit_of_the_prompt_is_computed() -> None:
    model = transformed("opt")
    expected = logits(model, ids(2, 30))
    ltepass.lower(model)
    with LargestWithin(lte_state(model).sites[0].d_ff) as made:
        assert torch.allclose(logits(model, ids(2, 30)), expected, atol=1e-5)
    assert made.numel <= lte_state(model).sites[0].d_ff


class Inline(nn.Module):
    """An FFN in a forward that does more; `middle` lies between the linears."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down, self.other = (
            nn.LayerNorm(8),
            nn.Linear(8, 24),
            nn.Linear(24, 8),
            nn.Linear(8, 8),
        )

    def middle(self, h: Tensor, x: Tensor) -> Tensor:
        return torch.relu(h)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Any:
        x = x + self.other(self.norm(x))
        return x + self.down(self.middle(self.up(self.norm(x)), x))


class SizesOfTheInput(Inline):
    def middle(self, h: Tensor, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        return torch.relu(h.view(batch * length, 4, 6)).view(batch, length, 24)


class OwnSizes(Inline):
    def middle(self, h: Tensor, x: Tensor) -> Tensor:
        return torch.relu(h.view(h.shape[0] * h.shape[1], 4, 6)).view(h.shape)


class UsedLater(Inline):
    def forward(self, x: Tensor, skip: Tensor | None = None) -> Any:
        h = self.up(self.norm(x))
        y = self.down(torch.relu(h)).reshape(-1, 8)
        return x + y.view(h.shape[0], h.shape[1], 8)


class Branches(Inline):
    def middle(self, h: Tensor, x: Tensor) -> Tensor:
        return torch.relu(h) if h.dtype == x.dtype else h


@pytest.mark.parametrize(
    ("cls", "one_token"),
    [(Inline, True), (OwnSizes, True), (SizesOfTheInput, False), (UsedLater, False), (Branches, False)],
)
def test_code_that_takes_sizes_from_elsewhere_gets_zeros_of_the_whole_shape(cls: type[Inline], one_token: bool) -> None:
    model, x = cls().eval(), torch.randn(2, 5, 8)
    ltepass.transform(model, (x,), ltepass.LTEConfig(group_size=4, grouping="random"))
    ltepass.set_mode(model, "hard")
    assert [s.kind for s in lte_state(model).sites] == ["inline"]
    with torch.no_grad():
        expected = model(x)
        ltepass.lower(model)
        with CountOp() as count:
            assert torch.allclose(model(x), expected, atol=1e-6)
        assert count.calls == 1
        assert vars(model.up)["forward"].one_token == one_token
        assert torch.allclose(model(x[:, :1]), ltepass.unlower(model)(x[:, :1]), atol=1e-6)
    assert len(list(routers_of(model))) == 1
