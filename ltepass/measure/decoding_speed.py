"""The time of each token of sides that take turns in one process, fed given tokens, and a summary of it."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import TypedDict

import torch
from torch import Tensor, nn

from ltepass.routed.sites import FFNSite


@torch.no_grad()
def time_decoding(
    sides: Mapping[str, nn.Module], prompt: Tensor, tokens: Tensor, warmup: int = 8
) -> dict[str, list[float]]:
    """Seconds for each token of tokens [N], by side; each side keeps its own KV cache over prompt [P].

    The tokens are given, not sampled, so that every side does the same work; the order of the sides rotates, so that
    no side always runs after the same neighbour. The first `warmup` tokens are not returned.
    """
    caches = {name: model(input_ids=prompt[None], use_cache=True).past_key_values for name, model in sides.items()}
    times: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for i, token in enumerate(tokens):
        for name in (*names[i % len(names) :], *names[: i % len(names)]):
            _wait(prompt.device)
            start = time.perf_counter()
            out = sides[name](input_ids=token.view(1, 1), past_key_values=caches[name], use_cache=True)
            out.logits.argmax(-1).item()  # a user needs the token, and reading it waits for the device
            times[name].append(time.perf_counter() - start)
            caches[name] = out.past_key_values
    return {name: values[warmup:] for name, values in times.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def without_ffns(dense: nn.Module, sites: Sequence[FFNSite]) -> nn.Module:
    """A copy that shares every weight, each FFN replaced by identity. Sites must be aligned (`owner` is the FFN)."""
    assert all(site.kind == "aligned" for site in sites), "an inline FFN has no module of its own to replace"
    shared = {id(tensor): tensor for tensor in (*dense.parameters(), *dense.buffers())}
    bare = copy.deepcopy(dense, shared)
    for site in sites:
        bare.set_submodule(site.owner, nn.Identity())
    return bare


class Spread(TypedDict):
    """Quartiles."""

    median: float
    low: float
    high: float


class Summary(TypedDict):
    """By side: tokens_per_s, ms_per_token. The shares are active neurons, router bytes, and the FFNs' of dense time."""

    tokens_per_s: dict[str, Spread]
    ms_per_token: dict[str, float]
    speedup: float
    active_share: float
    router_share: float
    ffn_share_of_time: float
    tokens_timed: int


def summary(times: Mapping[str, Sequence[float]], active: float, router: float) -> Summary:
    """Medians and quartiles of tokens/s, and the speed-up. times: sides dense, lowered, bare."""
    median = {name: statistics.median(values) for name, values in times.items()}
    return {
        "tokens_per_s": {name: _spread(values) for name, values in times.items()},
        "ms_per_token": {name: 1000 * value for name, value in median.items()},
        "speedup": median["dense"] / median["lowered"],
        "active_share": active,
        "router_share": router,
        "ffn_share_of_time": 1 - median["bare"] / median["dense"],
        "tokens_timed": len(times["dense"]),
    }


def _spread(seconds: Sequence[float]) -> Spread:
    slow, middle, fast = sorted(1 / q for q in statistics.quantiles(seconds, n=4))
    return {"median": middle, "low": slow, "high": fast}
