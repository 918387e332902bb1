"""What every example does with its model: dense training, then routers at each sparsity, trained as long as the dense
model goes on, lowered and compared.

The dense model that rows are set beside has gone on for as many steps as routed ones take after their start.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import ltepass
from examples.gallery.rows import Row
from ltepass.config import RouterKind
from ltepass.routed.proxy_router import ProxyRouter
from ltepass.routed.routed import Routed
from ltepass.routed.router import Router
from ltepass.routed.samples import record_logits

Inputs = Mapping[str, Tensor]  # of a model
LAMBDA = 1e-4  # weight of the separability loss; the controller finds that of the efficiency loss
TOLERANCE = 1e-4  # of lowered to hard eager, over the largest output: other orders of the same fp32 sums
ROUNDING = 1e-6  # of a score, over the largest one


@dataclass(frozen=True, kw_only=True)
class Task:
    """What an example brings. batches: what routers are fitted to; held_out: what thresholds are placed on."""

    model: nn.Module  # untrained
    loss: Callable[[nn.Module, int], Tensor]  # of the batch of a step
    score: Callable[[nn.Module], float]
    batches: Sequence[Inputs]
    held_out: Sequence[Inputs]
    facts: Mapping[str, Any]  # of every row: example, data, model, metric, seed, machine, versions


@dataclass(frozen=True, kw_only=True)
class Options:
    """Steps of dense training, of the soft stage (linear routers alone) and of the hard stage; which seeds."""

    dense: int
    soft: int
    hard: int
    rate: float = 1e-3
    batch: int = 64
    group_size: int = 8  # of linear routers
    targets: tuple[float, ...] = (0.5, 0.8)
    routers: tuple[RouterKind, ...] = ("linear", "proxy")
    seeds: tuple[int, ...] = (0, 1, 2)


def train(model: nn.Module, task: Task, steps: range, rate: float, target: float | None = None) -> None:
    """AdamW, with a rate that falls to zero. target: of the soft stage, which has the two auxiliary losses."""
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, rate, weight_decay=0.01)
    controller = ltepass.SparsityController(target=target) if target is not None else None
    model.train()
    for step in steps:
        done = (step - steps.start) / len(steps)
        optimizer.param_groups[0]["lr"] = rate * (1 - done)
        loss = task.loss(model, step)
        if controller is not None:
            auxiliary = ltepass.take_auxiliary(model, None)  # sums over tokens
            loss = loss + (controller.eta * auxiliary.efficiency + LAMBDA * auxiliary.separability) / auxiliary.tokens
            controller.update(float(auxiliary.sparsity / auxiliary.tokens), done)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
    model.eval()


def compare(task: Task, options: Options) -> Iterator[Row]:
    """A row for the dense model, and two for each router and sparsity: calibrated alone, and trained."""
    dense, start = copy.deepcopy(task.model), time.perf_counter()
    train(dense, task, range(options.dense), options.rate)
    further = copy.deepcopy(dense)
    train(further, task, later(options, options.soft + options.hard), options.rate / 2)
    yield row(task, side="dense", value=task.score(further), seconds=time.perf_counter() - start)
    for router in options.routers:
        for target in options.targets:
            yield from routed(copy.deepcopy(dense), task, options, router, target)


def routed(model: nn.Module, task: Task, options: Options, router: RouterKind, target: float) -> Iterator[Row]:
    """The two rows of one router at one sparsity. model: dense; it is changed."""
    start = time.perf_counter()
    size = options.group_size if router == "linear" else 1
    config = ltepass.LTEConfig(router=router, group_size=size, target_sparsity=target)
    ltepass.transform(model, task.batches[0], config)
    ltepass.calibrate(model, task.batches, inputs="hard")
    shares = ltepass.settle(model, task.held_out, target)
    yield scored(model, task, router, "calibrated", target, shares, start)
    start, soft = time.perf_counter(), options.soft if router == "linear" else 0
    if soft:  # a proxy's scores have nothing to learn
        ltepass.begin_stage(model, "soft")
        train(model, task, later(options, soft), options.rate / 2, target)
        ltepass.settle(model, task.held_out, target)
    ltepass.begin_stage(model, "hard")
    train(model, task, later(options, options.soft + options.hard - soft, soft), options.rate / 2)
    shares = ltepass.settle(model, task.held_out, target)
    yield scored(model, task, router, "trained", target, shares, start)


def later(options: Options, steps: int, after: int = 0) -> range:
    """Steps that follow dense training: what comes in a step depends on its number alone."""
    return range(options.dense + after, options.dense + after + steps)


def scored(
    model: nn.Module, task: Task, side: str, stage: str, target: float, shares: dict[str, float], start: float
) -> Row:
    """The row of a model in hard mode, which is lowered for a moment and compared, and then scored as it was."""
    model.eval()
    equal, lowered = lowered_equal(model, task.held_out[0])
    return row(
        task,
        side=side,
        stage=stage,
        target=target,
        value=task.score(model),
        sparsity=sum(shares.values()) / len(shares),
        equal=equal,
        sites=len(shares),
        lowered=lowered,
        seconds=time.perf_counter() - start,
    )


@torch.no_grad()
def lowered_equal(model: nn.Module, inputs: Inputs) -> tuple[float, int]:
    """Share of inputs to which lowered answers as hard eager does, and how many sites were lowered.

    On what it gets in eager each lowered FFN has to answer as it does there (AssertionError), but for tokens with a
    score within rounding of its threshold, at most two and one in a hundred without repetitions: a threshold is placed
    between two scores. A whole model's answer need not be eager's: rounding in one FFN may bring a score of the next
    over its threshold.
    """
    calls: list[tuple[str, Any, Any, Tensor]] = []
    routed = Routed.of(model, "lowered_equal")
    owners = {site.owner: model.get_submodule(site.owner) for site in routed.sites}

    def see(name: str, owner: nn.Module, *call: Any) -> None:
        calls.append((name, call[0], call[1], first(call[2])))

    hooks = [owner.register_forward_hook(partial(see, name), with_kwargs=True) for name, owner in owners.items()]
    with record_logits(routed, flat=False) as logits:
        expected = model(**inputs)[0]
    for hook in hooks:
        hook.remove()
    report = ltepass.report(ltepass.lower(model))
    for name, args, kwargs, answer in calls:
        near = torch.stack([at_threshold(logits[s.name].pop(0), r) for s, r in routed if s.owner == name]).any(0)
        apart = (first(owners[name](*args, **kwargs)) - answer).abs().flatten(0, -2)[~near]
        kinds = len(answer.flatten(0, -2)[near].round(decimals=4).unique(dim=0))  # one may be there many times
        assert kinds <= 2 + len(near) // 100, f"{kinds} of {len(near)} tokens have a score at its threshold"
        gap = apart.max() / answer.abs().max()
        assert gap <= TOLERANCE, f"a lowered {type(owners[name]).__name__} is {gap:.1e} from hard eager; see TOLERANCE"
    found = model(**inputs)[0]
    ltepass.unlower(model)
    kept = sum(any(site.name in note for note in report.notes) for site in report.sites)
    apart = (found - expected).abs().flatten(1).amax(1)
    return (apart <= TOLERANCE * expected.abs().max()).float().mean().item(), len(report.sites) - kept


def at_threshold(logits: Tensor, router: Router) -> Tensor:
    """Which tokens [n] have a score that rounding may bring over its threshold; a proxy's scores are the same bits."""
    apart = (logits - router.threshold).abs().flatten(0, -2).amin(1)
    return (apart <= ROUNDING * logits.abs().max()) & (not isinstance(router, ProxyRouter))


def first(answer: Tensor | tuple[Tensor, ...]) -> Tensor:
    return answer if isinstance(answer, Tensor) else answer[0]


def row(task: Task, *, side: str, value: float, seconds: float, **more: Any) -> Row:
    return Row(side=side, value=value, seconds=seconds, **{"stage": "trained", "target": 0.0, **more}, **task.facts)
