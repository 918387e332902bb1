"""Decode speed: dense, lowered and dense-without-FFNs take turns, token by token, in one process.

The third side gives the cap of this very run: T_ffn = T_dense - T(every FFN replaced by identity), and a token that
reads only the active share p and the routers' share r of the FFN bytes cannot take less than
T_dense - (1 - p - r) * T_ffn.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ltepass.routed.sites import FFNSite


def without_ffns(dense: nn.Module, sites: Sequence[FFNSite]) -> nn.Module:
    """A copy that shares every weight, each FFN replaced by identity. Sites must be aligned (`owner` is the FFN)."""
    assert all(site.kind == "aligned" for site in sites), "an inline FFN has no module of its own to replace"
    shared = {id(tensor): tensor for tensor in (*dense.parameters(), *dense.buffers())}
    bare = copy.deepcopy(dense, shared)
    for site in sites:
        bare.set_submodule(site.owner, nn.Identity())
    return bare


def router_share(model: nn.Module, sites: Sequence[FFNSite]) -> float:
    """r: bytes of all routers over bytes of all FFN weights."""
    parameters = dict(model.named_parameters())
    ffn = {rows.param: parameters[rows.param] for site in sites for rows in site.neurons}
    routers = [p for site in sites for p in model.get_submodule(site.router).parameters()]
    return sum(p.nbytes for p in routers) / sum(p.nbytes for p in ffn.values())


@torch.no_grad()
def time_decoding(sides: Mapping[str, Any], prompt: Tensor, tokens: Tensor, warmup: int = 8) -> dict[str, list[float]]:
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


def summary(times: Mapping[str, Sequence[float]], active: float, router: float) -> dict[str, Any]:
    """Medians and quartiles of tokens/s, the speed-up, and its share of the cap. times: sides dense, lowered, bare."""
    median = {name: statistics.median(values) for name, values in times.items()}
    ffn = median["dense"] - median["bare"]
    cap = median["dense"] / (median["dense"] - (1 - active - router) * ffn)
    speedup = median["dense"] / median["lowered"]
    return {
        "tokens_per_s": {name: _spread(values) for name, values in times.items()},
        "ms_per_token": {name: 1000 * value for name, value in median.items()},
        "speedup": speedup,
        "cap": cap,
        "share_of_cap": speedup / cap,
        "active_share": active,
        "router_share": router,
        "ffn_share_of_time": ffn / median["dense"],
        "tokens_timed": len(times["dense"]),
    }


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    slow, middle, fast = sorted(1 / q for q in statistics.quantiles(seconds, n=4))
    return {"median": middle, "low": slow, "high": fast}
