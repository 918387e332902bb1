"""An FFN that is called several times in a forward: all calls count, and it is refitted once."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AlbertConfig, AlbertForMaskedLM

import ltepass
from ltepass.calibration.refit_down import warm_start
from ltepass.calibration.sensitivity import loss_sensitivity
from ltepass.routed.modes import mode_of
from ltepass.routed.routed import routers_of
from ltepass.routed.token_masks import telling_tokens
from ltepass.training.auxiliary_loss import clear_auxiliary, inactive_shares, take_auxiliary
from ltepass.training.stages import begin_stage
from tests.models.zoo import made_once
from tests.typed import grad, present, routed

LOOPS = 3


class FFN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 48), nn.Linear(48, 16)

    def forward(self, x: Tensor) -> Any:
        return self.down(nn.functional.gelu(self.up(x)))


class Loop(nn.Module):
    """The first FFN LOOPS times, or copies of it in turn; then another once."""

    def __init__(self, copies: bool = False, checkpointing: bool = False) -> None:
        super().__init__()
        self.embed, self.norm, self.checkpointing = nn.Embedding(61, 16), nn.LayerNorm(16), checkpointing
        first = FFN()
        self.first = nn.ModuleList(copy.deepcopy(first) for _ in range(LOOPS)) if copies else first
        self.last, self.head = FFN(), nn.Linear(16, 61)

    def forward(self, input_ids: Tensor, use_cache: bool = False, attention_mask: Tensor | None = None) -> Any:
        x = self.embed(input_ids)
        for i in range(LOOPS):
            ffn = self.first[i] if isinstance(self.first, nn.ModuleList) else self.first
            x = x + (checkpoint(self._ffn, ffn, x, use_reentrant=False) if self.checkpointing else self._ffn(ffn, x))
        return Output(self.head(x + self.last(self.norm(x))))

    def _ffn(self, ffn: nn.Module, x: Tensor) -> Any:
        return ffn(self.norm(x))


class Output:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


@made_once
def model(*, copies: bool = False, checkpointing: bool = False) -> Any:
    torch.manual_seed(0)
    built, ids = Loop(copies, checkpointing).eval(), tokens(4)
    ltepass.transform(built, (ids,), ltepass.LTEConfig(group_size=4, grouping="identity"))
    first = next(routers_of(built))
    start = first.weight.detach().clone()
    for router in routers_of(built):
        with torch.no_grad():
            router.weight.copy_(start * 10.0)
    return built


def tokens(seed: int, n: int = 8) -> Tensor:
    return torch.randint(0, 61, (n, 32), generator=torch.Generator().manual_seed(seed))


def auxiliary(built: Any, ids: Tensor, **inputs: Any) -> Any:
    built(ids, **inputs)
    return take_auxiliary(built, None)


def test_every_call_counts_in_the_auxiliary_loss() -> None:
    """Copies that are called once each: a shared FFN's value is the mean of theirs, and so is its gradient."""
    shared, apart = model(), model(copies=True)
    found = []
    for built in (shared, apart):
        begin_stage(built, "soft")
        built(tokens(1))
        found.append([present(call.losses) for router in routers_of(built) for call in router.recorder.calls])
    one = take_auxiliary(shared, None)
    for i, value in enumerate((one.efficiency, one.separability)):
        sums = torch.stack([losses[i].sum() for losses in found[1]])
        torch.testing.assert_close(value, (sums[:LOOPS].mean() + sums[LOOPS]) / 2)
    assert int(one.tokens) == int(take_auxiliary(apart, None).tokens) == 8 * 32
    gradients = []
    for losses, built in zip(found, (shared, apart), strict=True):
        torch.stack([efficiency.sum() for efficiency, *_ in losses[:LOOPS]]).sum().backward()
        firsts = list(routers_of(built))[: LOOPS if built is apart else 1]
        gradients.append(torch.stack([grad(router.weight) for router in firsts]).sum(0))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("copies", [False, True])
def test_checkpointing_counts_no_call_twice(copies: bool) -> None:
    """The backward pass runs layers again, before the losses of the next batch are kept: two steps of accumulation."""
    found = []
    for checkpointing in (False, True):
        built = model(copies=copies, checkpointing=checkpointing)
        begin_stage(built, "soft")
        with telling_tokens(routed(built), keep=True):
            values = []
            for seed in (1, 2):
                aux = auxiliary(built, tokens(seed))
                values.append(torch.stack([aux.efficiency, aux.separability, aux.sparsity, aux.tokens]).detach())
                (aux.efficiency + aux.separability).backward()
        assert not any(router.recorder.calls for router in routers_of(built))
        found.append((torch.stack(values), [p.grad for p in built.parameters() if p.grad is not None]))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_held_sparsity_is_of_all_calls(checkpointing: bool) -> None:
    built = model(checkpointing=checkpointing)
    begin_stage(built, "hard")
    for router in routers_of(built):
        router.recorder.count_inactive = True
    with telling_tokens(routed(built), keep=True):
        for seed in (1, 2):
            clear_auxiliary(routed(built))
            loss = built(tokens(seed)).logits.square().mean()
            shares = inactive_shares(routed(built))
            loss.backward()
            measured = ltepass.measure_sparsity(built, [tokens(seed)])
            torch.testing.assert_close(shares, torch.tensor(list(measured.values())), rtol=1e-5, atol=1e-5)


def test_the_losss_sensitivity_is_of_all_calls() -> None:
    apart = loss_sensitivity(model(copies=True), [tokens(1)])
    shared = loss_sensitivity(model(), [tokens(1)])
    costs = [s.log_cost for s in apart.values()]
    assert shared["first"].log_cost == pytest.approx(sum(costs[:LOOPS]) / LOOPS, rel=1e-4)
    neurons = torch.stack([s.neurons for s in apart.values()][:LOOPS]).mean(0)
    torch.testing.assert_close(shared["first"].neurons, neurons, rtol=1e-3, atol=1e-5)


def test_a_refit_is_done_once_on_the_tokens_of_all_calls() -> None:
    """By fp64 normal equations, over the hidden units that all calls give before it."""
    built, ids, seen = model(), tokens(3), []
    ltepass.calibrate(built, [tokens(4)])
    built._lte.config["budget"] = "model"  # thresholds stay: the calls before the fit are those after it
    down = built.first.down
    units: dict[str, list[Tensor]] = {"dense": [], "hard": []}
    hook = down.register_forward_pre_hook(
        lambda _, args: units["hard"].append(args[0].detach().flatten(0, -2).double())
    )
    router = next(routers_of(built))
    router.observer = lambda h: units["dense"].append(h.detach().flatten(0, -2).double())
    with torch.no_grad(), mode_of(routed(built), "hard"):
        built(ids)
    hook.remove()
    router.observer = None
    old = down.weight.detach().double().T.clone()
    errors = warm_start(built, ids, penalty=0.2, on_site=lambda n, error: seen.append(n))
    assert seen == [1, 2]
    assert list(errors) == ["first", "last"]
    h, g = (torch.cat(units[mode]) for mode in ("dense", "hard"))
    assert len(h) == LOOPS * 8 * 32
    gram = g.T @ g
    penalty = 0.2 * gram.diagonal() + 1e-3 * gram.diagonal().mean() + 1e-12
    change = torch.linalg.solve(gram + penalty.diag(), g.T @ ((h - g) @ old))
    torch.testing.assert_close(down.weight.detach().double(), (old + change).T, rtol=1e-3, atol=1e-4)
    missing = (h - g) @ old
    error = (missing - g @ change).square().sum() / (h @ old).square().sum()
    assert errors["first"] == pytest.approx(float(error), rel=1e-3)


def test_thresholds_of_a_shared_ffn_meet_the_target_over_all_calls() -> None:
    built, ids = model(), tokens(3)
    ltepass.calibrate(built, [tokens(4)])
    warm_start(built, ids)
    for share in ltepass.measure_sparsity(built, [ids]).values():
        assert share == pytest.approx(0.5, abs=0.05)  # the calls before the fit saw other inputs than those after it


def test_albert_trains_calibrates_and_is_refitted() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "embedding_size": 16, "hidden_size": 16, "num_attention_heads": 2}
    config = AlbertConfig(**sizes, intermediate_size=48, num_hidden_layers=3, max_position_embeddings=40)
    albert = AlbertForMaskedLM(config).eval()
    ltepass.transform(albert, config=ltepass.LTEConfig(group_size=4), calibration=[tokens(1)])
    (router,) = routers_of(albert)
    begin_stage(albert, "soft")
    albert(tokens(2))
    assert len(router.recorder.calls) == 3
    assert int(take_auxiliary(albert, None).tokens) == 8 * 32
    assert len(warm_start(albert, {"input_ids": tokens(2)})) == 1
