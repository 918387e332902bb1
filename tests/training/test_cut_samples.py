"""Cuts leave out what was asked for, whatever the sizes of batches and models have in common."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ltepass
from ltepass.kernels.reference import is_small
from ltepass.routed.routed import routers_of
from ltepass.sparsity.cuts import SAMPLE


class Uneven(nn.Module):
    """One FFN whose features, hidden units and tokens differ in size, as behind an RMSNorm's weights."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.exp(0.8 * torch.randn(d_model)))
        self.up, self.down = nn.Linear(d_model, d_ff), nn.Linear(d_ff, d_model)
        with torch.no_grad():
            self.up.weight.mul_(torch.exp(0.8 * torch.randn(d_ff, 1)))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(nn.functional.gelu(self.up(x * self.scale)))
        return out


@pytest.mark.parametrize(("tokens", "d_model"), [(512, 576), (2048, 576), (8192, 576), (2048, 512), (1024, 4096)])
def test_input_cuts_leave_out_what_was_asked(tokens: int, d_model: int) -> None:
    assert_share(tokens, d_model, 64, "input_sparsity")


@pytest.mark.parametrize(("tokens", "d_ff"), [(512, 1536), (2048, 1536), (2048, 512)])
def test_hidden_cuts_leave_out_what_was_asked(tokens: int, d_ff: int) -> None:
    assert_share(tokens, 64, d_ff, "hidden_sparsity")


def assert_share(tokens: int, d_model: int, d_ff: int, setting: str) -> None:
    torch.manual_seed(0)
    batches = [torch.randn(1, tokens, d_model) * torch.exp(0.5 * torch.randn(1, tokens, 1)) for _ in range(2)]
    assert 2 * tokens * max(d_model, d_ff) > 8192
    model: Any = Uneven(d_model, d_ff).eval()
    config = ltepass.LTEConfig(group_size=8, grouping="identity", target_sparsity=0.5)
    ltepass.transform(model, (batches[0],), config)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for _ in range(2):  # the same tokens, the same cut
        getattr(ltepass, f"set_{setting}")(model, 0.3, batches)
    (router,) = routers_of(model)
    left_out = total = 0
    with torch.no_grad():
        for batch in batches:
            seen = batch * model.scale
            values, cut = seen, router.input_cut
            if setting == "hidden_sparsity":
                active = (router_logits(router, seen) > router.threshold).repeat_interleave(8, -1)
                values, cut = nn.functional.gelu(model.up(seen))[active], router.cut
            assert cut is not None
            left_out += int(is_small(values, cut).sum())
            total += values.numel()
    assert total > SAMPLE / 8
    assert left_out / total == pytest.approx(0.3, abs=0.012)
    assert all(torch.equal(v.nan_to_num(), model.state_dict()[k].nan_to_num()) for k, v in before.items())


def router_logits(router: Any, x: Tensor) -> Tensor:
    return nn.functional.linear(x, router.weight, router.bias)
