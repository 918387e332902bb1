"""Decode speed: dense, lowered and dense-without-FFNs take turns, token by token, in one process.

The third side gives the cap of this very run: T_ffn = T_dense - T(every FFN replaced by identity), and a token that
reads only the active share p and the routers' share r of the FFN bytes cannot take less than
T_dense - (1 - p - r) * T_ffn.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor, nn


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
