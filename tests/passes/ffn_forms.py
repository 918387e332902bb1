"""FFNs in every form that the finder has to know, written by hand, and one check that none of them can fool."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import ltepass
from ltepass.config import Mode
from ltepass.routed.routed import router_of, routers_of
from tests.typed import lte_state

D, H = 10, 24  # d_model, d_ff


class Plain(nn.Module):
    """act(up(x)), in a module of its own."""

    def __init__(self, act: Callable[[Tensor], Tensor] = F.relu, bias: bool = True, d: int = D, h: int = H) -> None:
        super().__init__()
        self.act, self.up, self.down = act, nn.Linear(d, h, bias=bias), nn.Linear(h, d, bias=bias)

    def forward(self, x: Tensor) -> Any:
        return self.down(self.act(self.up(x)))


class Gated(nn.Module):
    def __init__(self, act: Callable[[Tensor], Tensor] = F.silu, bias: bool = False, d: int = D, h: int = H) -> None:
        super().__init__()
        self.act, self.w1, self.w3 = act, nn.Linear(d, h, bias=bias), nn.Linear(d, h, bias=bias)
        self.w2 = nn.Linear(h, d, bias=bias)

    def forward(self, x: Tensor) -> Any:
        return self.w2(self.act(self.w1(x)) * self.w3(x))


class FusedHalves(nn.Module):
    """One gate_up linear, gate first (Phi-3) or up first."""

    def __init__(self, gate_first: bool = True, bias: bool = True, d: int = D, h: int = H) -> None:
        super().__init__()
        self.gate_first, self.gate_up, self.down = gate_first, nn.Linear(d, 2 * h, bias=bias), nn.Linear(h, d)

    def forward(self, x: Tensor) -> Any:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up if self.gate_first else gate * F.silu(up))


class Interleaved(nn.Module):
    """Rows gate, up, gate, up, ... with gpt-oss's clamps; no kernel knows the function."""

    def __init__(self, clamp: float | None = None, d: int = D, h: int = H) -> None:
        super().__init__()
        self.clamp, self.gate_up, self.down = clamp, nn.Linear(d, 2 * h), nn.Linear(h, d)

    def forward(self, x: Tensor) -> Any:
        both = self.gate_up(x)
        gate, up = both[..., ::2], both[..., 1::2]
        if self.clamp is not None:
            gate, up = gate.clamp(max=self.clamp), up.clamp(-self.clamp, self.clamp) + 1
        return self.down(F.silu(gate) * up)


class Unbound(nn.Module):
    """The same rows through a view and an unbind."""

    def __init__(self, d: int = D, h: int = H) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Linear(d, 2 * h), nn.Linear(h, d)

    def forward(self, x: Tensor) -> Any:
        gate, up = self.gate_up(x).unflatten(-1, (-1, 2)).unbind(-1)
        return self.down(F.gelu(gate) * up)


class Conv(nn.Module):
    """transformers' Conv1D: weights the other way round."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.c_fc, self.c_proj, self.drop = Conv1D(H, D), Conv1D(D, H), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Any:
        return self.drop(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))


class BiasApart(nn.Linear):
    """Falcon's linear: the bias is added apart."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


class Apart(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = BiasApart(D, H), BiasApart(H, D)

    def forward(self, x: Tensor) -> Any:
        return self.down(F.gelu(self.up(x)))


class OwnersBias(nn.Module):
    """The bias belongs to the owner, not to the linear."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, H, bias=False), nn.Linear(H, D, bias=False)
        self.b1, self.b2 = nn.Parameter(torch.randn(H)), nn.Parameter(torch.randn(D))

    def forward(self, x: Tensor) -> Any:
        return self.down(F.relu(self.up(x) + self.b1)) + self.b2


class Scaled(nn.Module):
    """A learned factor per neuron, and one per token: both commute with a gate."""

    def __init__(self, per_token: bool = False) -> None:
        super().__init__()
        self.up, self.down, self.per_token = nn.Linear(D, H), nn.Linear(H, D), per_token
        self.scale = nn.Parameter(torch.rand(H) + 0.5)

    def forward(self, x: Tensor) -> Any:
        h = F.relu(self.up(x)) * self.scale
        return self.down(h * x.norm(dim=-1, keepdim=True) if self.per_token else h)


class Inline(nn.Module):
    """A layer with attention-like mixing and the FFN in its own forward (OPT, BART, Whisper). Not traceable: a flag."""

    def __init__(self, parallel: bool = False) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(D), nn.Linear(D, D)
        self.fc1, self.fc2, self.parallel = nn.Linear(D, H), nn.Linear(H, D), parallel

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Any:
        n = self.norm(x)
        mixed = self.mix(n.cumsum(1) / n.shape[1])
        if self.parallel:
            return x + mixed + self.fc2(F.gelu(self.fc1(n)))
        x = x + mixed
        return x + self.fc2(F.gelu(self.fc1(self.norm(x))))


class _First(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense, self.act = nn.Linear(D, H), nn.GELU()

    def forward(self, x: Tensor) -> Any:
        return self.act(self.dense(x))


class _Second(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense, self.norm, self.drop = nn.Linear(H, D), nn.LayerNorm(D), nn.Dropout(0.1)

    def forward(self, h: Tensor, x: Tensor) -> Any:
        return self.norm(self.drop(self.dense(h)) + x)


class Split(nn.Module):
    """BERT: the first linear in one module, the second in another."""

    def __init__(self) -> None:
        super().__init__()
        self.intermediate, self.output = _First(), _Second()

    def forward(self, x: Tensor) -> Any:
        return self.output(self.intermediate(x), x)


class Shared(nn.Module):
    """ALBERT: one FFN, three times."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.ffn = nn.LayerNorm(D), Plain(F.gelu)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + self.ffn(self.norm(x))
        return x


class Residual(nn.Module):
    """x + f(norm(x)), with more layers of the same around it."""

    def __init__(self, *ffns: nn.Module) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in ffns)
        self.ffns = nn.ModuleList(ffns)

    def forward(self, x: Tensor) -> Tensor:
        for norm, ffn in zip(self.norms, self.ffns, strict=True):
            x = x + ffn(norm(x))
        return x


def x_of(batch: int = 2, tokens: int = 5) -> Tensor:
    return torch.randn(batch, tokens, D, generator=torch.Generator().manual_seed(7))


def sites_of(model: nn.Module, x: Any = None, **config: Any) -> list[ltepass.routed.sites.FFNSite]:
    ltepass.transform(model, x_of() if x is None else x, ltepass.LTEConfig(**config))
    return list(lte_state(model).sites)


def set_mode(model: nn.Module, mode: Mode) -> None:
    for router in routers_of(model):
        router.mode = mode


def check_exact(model: nn.Module, x: Tensor, group_size: int = 4, lowered: bool | None = None) -> None:
    """Permuted it computes the same; hard mode is the model with the inactive neurons' down columns set to zero, one
    token at a time; lowered it equals hard mode; removed it is bitwise what it was.

    lowered: whether every site is lowered (True), none (False), or not asked (None).
    """
    torch.manual_seed(3)
    original = copy.deepcopy(model)
    expected = model(x)
    sites = sites_of(model, x, group_size=group_size, grouping="random")
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    set_mode(model, "hard")
    masks: dict[str, Tensor] = {}
    handles = [
        router_of(model, s).register_forward_hook(lambda r, a, out, s=s: masks.__setitem__(s.name, out > r.threshold))
        for s in sites
    ]
    hard = model(x)
    for handle in handles:
        handle.remove()
    if len(sites) == 1 and len(hard.shape) == 3 and masks[sites[0].name].shape[:-1] == hard.shape[:-1]:
        _check_against_zeroed_columns(original, model, x, masks[sites[0].name], hard)
    if lowered is not None:
        _check_lowered(model, x, hard, lowered)
    ltepass.remove(model, undo_grouping=True)
    before, after = original.state_dict(), model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert torch.equal(model(x), expected)


def _check_against_zeroed_columns(original: nn.Module, model: nn.Module, x: Tensor, mask: Tensor, hard: Tensor) -> None:
    """For models whose tokens do not see each other after the FFN: an oracle that knows nothing of gates."""
    (site,) = lte_state(model).sites
    permutation = router_of(model, site).permutation
    keep = mask.repeat_interleave(site.group_size, -1)
    for b, t in ((0, 0), (1, 3)):
        copied = copy.deepcopy(original)
        columns = site.down_rows.take(copied.get_parameter(site.down_rows.param).data, site.d_ff)
        active = torch.zeros(site.d_ff)
        active[permutation] = keep[b, t].float()
        columns.mul_(active.view(-1, *[1] * (columns.dim() - 1)))
        torch.testing.assert_close(copied(x)[b, t], hard[b, t], rtol=1e-5, atol=1e-5)


def _check_lowered(model: nn.Module, x: Tensor, hard: Tensor, lowered: bool) -> None:
    if not lowered:
        expected = "no kernel|scales|added|not a plain"
        with torch.no_grad(), __import__("pytest").raises(ltepass.errors.LoweringError, match=expected):
            ltepass.lower(model)
        return
    ltepass.lower(model)
    assert lte_state(model).notes == []
    with torch.no_grad():
        torch.testing.assert_close(model(x), hard, rtol=1e-5, atol=1e-5)
    ltepass.unlower(model)
    assert torch.equal(model(x), hard)
