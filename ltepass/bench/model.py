"""Decode speed of a saved model against itself with every neuron active, and the cap of that very run."""

from __future__ import annotations

import copy
from typing import Any

import torch

import ltepass
from ltepass.demo import speed
from ltepass.errors import ConfigError
from ltepass.evaluation import sparsity_of_tail
from ltepass.sites import require_state


def bench_model(model: Any, ids: torch.Tensor, *, prompt_tokens: int = 64) -> dict[str, Any]:
    """Dense, lowered and dense-without-FFNs take turns, token by token, in eager; see `ltepass.demo.speed.summary`.

    model: transformed, in hard mode, with aligned sites only; it is lowered afterwards. ids: [T] int64 on its device;
    the tokens after the first `prompt_tokens` are timed, the first 8 of them as warm-up. Dense is a copy with the
    routers removed. Raises NotTransformedError; ConfigError where too few tokens or an inline site leave no number.
    """
    sites = require_state(model, "bench_model").sites
    if len(ids) < prompt_tokens + 16:
        raise ConfigError(f"{len(ids)} tokens were given; expected at least {prompt_tokens + 16}; pass a longer text")
    inline = [site.name for site in sites if site.kind != "aligned"]
    if inline:
        raise ConfigError(
            f"site {inline[0]} is inline: no module of its own can be taken out, so there is no cap to measure; time "
            "the op itself instead"
        )
    active = 1 - sparsity_of_tail(model, ids, prompt_tokens)
    share = speed.router_share(model, sites)
    dense = ltepass.remove(copy.deepcopy(model))
    ltepass.lower(model, scope="ffn")
    sides = {"dense": dense, "lowered": model, "bare": speed.without_ffns(dense, sites)}
    return speed.summary(speed.time_decoding(sides, ids[:prompt_tokens], ids[prompt_tokens:]), active, share)
