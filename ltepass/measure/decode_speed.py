"""Decode speed of a saved model against itself with every neuron active, and the cap of that very run."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal, TypedDict

from torch import Tensor, nn

from ltepass.api import remove
from ltepass.errors import ConfigError
from ltepass.measure.decoding import time_generate
from ltepass.measure.quality import perplexity, sparsity_of_tail
from ltepass.measure.records import Environment, ModelRecord
from ltepass.measure.timing import Timing, gemm_rate, stream_bandwidth
from ltepass.passes.lower.lower_modules import lower, unlower
from ltepass.routed.routed import Routed
from ltepass.routed.sites import FFNSite
from ltepass.sparsity.thresholds import set_sparsity

if TYPE_CHECKING:
    from transformers import PreTrainedModel

How = Literal["eager", "compiled"]
PROMPT_TOKENS = 64


def bench_model(
    model: PreTrainedModel,
    ids: Tensor,
    blocks: Tensor,
    *,
    name: str,
    how: How = "eager",
    sparsities: Sequence[float | None] = (None,),
    rounds: int = 4,
) -> list[ModelRecord]:
    """One record a sparsity: dense, lowered and dense-without-FFNs take turns in `generate`, all eager or all compiled.

    model: transformed, in hard mode, with aligned sites only; it is lowered meanwhile, and left with the last
    thresholds. ids: [T] int64, of which the first 64 are the prompt and the rest is decoded `rounds` times.
    blocks: [n, T'] int64 for the perplexity. sparsities: set by the knob `set_sparsity`; None leaves the thresholds as
    they were saved. Dense is a copy with the routers removed. Raises NotTransformedError; ConfigError where
    too few tokens or an inline site leave no number.
    """
    routed = Routed.of(model, "bench_model")
    if len(ids) < PROMPT_TOKENS + 8:
        raise ConfigError(f"{len(ids)} tokens were given; expected at least {PROMPT_TOKENS + 8}; pass a longer text")
    inline = [site.name for site in routed.sites if site.kind != "aligned"]
    if inline:
        raise ConfigError(
            f"site {inline[0]} is inline: no module of its own can be taken out, so there is no cap to measure; time "
            "the op itself instead: ltepass bench op"
        )
    dense = remove(copy.deepcopy(model))
    sides = {"dense": dense, "lowered": model, "bare": without_ffns(dense, routed.sites)}
    dense_perplexity = perplexity(dense, blocks)
    if how == "compiled":
        for side in (sides["dense"], sides["bare"]):
            side.compile()
            side.generation_config.cache_implementation = "static"
    environment = Environment.here(
        f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S}", bandwidth=stream_bandwidth(), flops=gemm_rate()
    )
    settings = [_set(model, routed, sparsity, ids, blocks) for sparsity in sparsities]
    lower(model, scope="ffn" if how == "eager" else "model")
    records = []
    for sparsity, setting in zip(sparsities, settings, strict=True):
        for router, threshold in zip(routed.all_routers(), setting.thresholds, strict=True):
            router.threshold.copy_(threshold)
        times = time_generate(sides, ids[:PROMPT_TOKENS], ids[PROMPT_TOKENS:], rounds=rounds)
        out = summary(times, setting.active, router_share(model, routed.sites))
        timing = {side: Timing.of([1e3 * t for t in values]) for side, values in times.items()}
        records.append(
            ModelRecord(
                **vars(environment),
                model=name,
                how=how,
                dtype=str(model.dtype).removeprefix("torch."),
                group_size=routed.sites[0].group_size or 0,
                active=setting.active,
                router=out["router_share"],
                sparsity=float(routed.config["target_sparsity"]) if sparsity is None else sparsity,
                perplexity=setting.perplexity,
                perplexity_dense=dense_perplexity,
                tokens=out["tokens_timed"],
                dense_ms=timing["dense"].median,
                dense_p20_ms=timing["dense"].p20,
                dense_p80_ms=timing["dense"].p80,
                lowered_ms=timing["lowered"].median,
                lowered_p20_ms=timing["lowered"].p20,
                lowered_p80_ms=timing["lowered"].p80,
                without_ffns_ms=timing["bare"].median,
                speedup=out["speedup"],
                cap=out["cap"],
                share_of_cap=out["share_of_cap"],
            )
        )
    unlower(model)
    return records


@dataclass(frozen=True)
class _Setting:
    """What the knob made of the model. active: share of neurons that the decoded tokens use."""

    thresholds: list[Tensor]
    active: float
    perplexity: float


def _set(model: PreTrainedModel, routed: Routed, sparsity: float | None, ids: Tensor, blocks: Tensor) -> _Setting:
    if sparsity is not None:
        set_sparsity(model, sparsity)
    thresholds = [router.threshold.clone() for router in routed.all_routers()]
    return _Setting(thresholds, 1 - sparsity_of_tail(model, ids, PROMPT_TOKENS), perplexity(model, blocks))


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
    cap: float
    share_of_cap: float
    active_share: float
    router_share: float
    ffn_share_of_time: float
    tokens_timed: int


def summary(times: Mapping[str, Sequence[float]], active: float, router: float) -> Summary:
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


def _spread(seconds: Sequence[float]) -> Spread:
    slow, middle, fast = sorted(1 / q for q in statistics.quantiles(seconds, n=4))
    return {"median": middle, "low": slow, "high": fast}
