"""Times a whole token: LLaMA-2-7B's shapes, random weights, static cache of 512, compiled, CUDA graphs on both sides.

The same model runs three ways: FFNs dense, FFNs removed (which gives the most that sparsity could save), and FFNs
through `ltepass::routed_ffn`, whose routers' biases fix the share of active experts: one compilation for all shares.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 -- the name everybody uses

from examples.gpu import results
from examples.gpu.clock import Timing, copy_bandwidth, graphed
from examples.gpu.results import Row
from ltepass.kernels import routed_ffn as _op  # noqa: F401 -- registers what the FFNs call


@dataclass(frozen=True, kw_only=True)
class Sizes:
    layers: int = 32
    d_model: int = 4096
    d_ff: int = 11008
    heads: int = 32
    vocabulary: int = 32000
    cache: int = 512
    group_size: int = 32
    dtype: torch.dtype = torch.bfloat16


class Layer(nn.Module):
    qkv: Tensor
    out: Tensor
    up: Tensor
    gate: Tensor
    down: Tensor
    norms: Tensor
    keys: Tensor
    values: Tensor
    router: Tensor
    router_bias: Tensor
    threshold: Tensor

    def __init__(self, s: Sizes, device: str) -> None:
        super().__init__()
        d, self.heads, self.n_experts = s.d_model, s.heads, s.d_ff // s.group_size
        shapes = {"qkv": (3 * d, d), "out": (d, d), "up": (s.d_ff, d), "gate": (s.d_ff, d), "down": (d, s.d_ff)}
        for name, shape in shapes.items():
            weight = torch.empty(shape, dtype=s.dtype, device=device).normal_(std=shape[1] ** -0.5)
            self.register_buffer(name, weight)
        self.register_buffer("norms", torch.ones(2, d, dtype=s.dtype, device=device))
        for name in ("keys", "values"):  # two buffers: a compiler writes into a part of one by copying the whole
            cache = torch.empty(1, s.heads, s.cache, d // s.heads, dtype=s.dtype, device=device)
            self.register_buffer(name, cache.normal_())
        router = torch.empty(self.n_experts, d, device=device).normal_(std=d**-0.5)
        self.register_buffer("router", router)
        self.register_buffer("router_bias", torch.zeros(self.n_experts, device=device))
        self.register_buffer("threshold", torch.zeros((), device=device))

    def draw(self, active: float) -> None:
        """Exactly this share of experts, at random, whatever x is: the router's products cannot outweigh its bias."""
        chosen = torch.randperm(self.n_experts, device=self.router.device) < round(active * self.n_experts)
        self.router_bias.copy_(torch.where(chosen, 1e4, -1e4))

    def forward(self, x: Tensor, position: Tensor, rotation: Tensor, ffn: str) -> Tensor:
        d = x.shape[-1]
        q, k, v = F.linear(F.rms_norm(x, (d,), self.norms[0]), self.qkv).view(3, 1, self.heads, 1, -1)
        q, k = rotate(q, rotation), rotate(k, rotation)
        self.keys.index_copy_(2, position, k)
        self.values.index_copy_(2, position, v)
        mixed = F.scaled_dot_product_attention(q, self.keys, self.values)
        x = x + F.linear(mixed.view(1, d), self.out)
        if ffn == "removed":
            return x
        y = F.rms_norm(x, (d,), self.norms[1])
        if ffn == "dense":
            return x + F.linear(F.silu(F.linear(y, self.gate)) * F.linear(y, self.up), self.down)
        router = (self.router, self.router_bias, self.threshold)
        weights = (self.up, None, self.gate, None, self.down, None)
        return x + torch.ops.ltepass.routed_ffn(y, *router, *weights, "silu")  # type: ignore[no-any-return]


def rotate(t: Tensor, rotation: Tensor) -> Tensor:
    """Rotary embedding of the one position; rotation: [2, 1, head size], cosines and sines."""
    first, second = t.chunk(2, -1)
    return t * rotation[0] + torch.cat((-second, first), -1) * rotation[1]


class Decoder(nn.Module):
    """The last position of a full cache: 512 keys are read, as in the target."""

    embedding: Tensor
    rotation: Tensor
    position: Tensor

    def __init__(self, s: Sizes, device: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(s, device) for _ in range(s.layers))
        embedding = torch.empty(2, s.vocabulary, s.d_model, dtype=s.dtype, device=device).normal_(std=0.02)
        self.register_buffer("embedding", embedding)
        half = s.d_model // s.heads // 2
        angles = (s.cache - 1) * 10000.0 ** (-torch.arange(half, device=device) / half)
        both = torch.stack((angles.cos(), angles.sin())).repeat(1, 2).unsqueeze(1)
        self.register_buffer("rotation", both.to(s.dtype))
        self.register_buffer("position", torch.tensor([s.cache - 1], device=device))

    def forward(self, token: Tensor, ffn: str) -> Tensor:
        x = self.embedding[0][token]
        for layer in self.layers:
            x = layer(x, self.position, self.rotation, ffn)
        return F.linear(F.rms_norm(x, (x.shape[-1],)), self.embedding[1]).argmax(-1)


def time_of(model: Decoder, ffn: str, token: Tensor) -> Timing | None:
    run = model if token.device.type == "cpu" else torch.compile(model, fullgraph=True)
    with torch.no_grad():
        return graphed([partial(run, token, ffn)], repeats=2)


def row_of(rows: list[Row], implementation: str, active: int = 100) -> Row:
    return next(r for r in rows if r.implementation == implementation and r.active_percent == active)


def measure(model: Decoder, s: Sizes, rows: list[Row], about: dict[str, str], out: Path) -> bool:
    """Writes what it measured so far; whether nothing failed."""
    token = torch.zeros(1, dtype=torch.long, device=model.position.device)
    found: list[Row] = []

    def keep(row: Row, timing: Timing, dense: float, note: str = "") -> None:
        found.append(
            row.filled(timing.microseconds, None, dense / timing.microseconds, timing.spread, note=note, **about)
        )
        results.write(out, found)
        print(results.table(found[-1:]).splitlines()[-1], flush=True)

    times = {name: time_of(model, name, token) for name in ("dense", "removed")}
    if times["dense"] and times["removed"]:
        keep(row_of(rows, "dense compiled"), times["dense"], times["dense"].microseconds)
        keep(row_of(rows, "FFNs removed"), times["removed"], times["dense"].microseconds)

    def routed(active: int) -> None:
        for layer in model.modules():
            if isinstance(layer, Layer):
                layer.draw(active / 100)
        timing = time_of(model, "routed", token)
        if timing and times["dense"] and times["removed"]:
            dense = times["dense"].microseconds
            read = active / 100 + 4 / (
                3 * s.group_size * s.dtype.itemsize
            )  # the fp32 router's share of the FFN's bytes
            cap = dense / (dense - (1 - read) * (dense - times["removed"].microseconds))
            keep(row_of(rows, "routed", active), timing, dense, f"cap {cap:.2f}x")

    return all([results.attempt(partial(routed, active), f"routed, {active} % active") for active in results.ACTIVE])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="CSV to write")
    parser.add_argument("--software", default="")
    options = parser.parse_args(argv)
    gpu = torch.cuda.is_available()
    small = Sizes(layers=2, d_model=64, d_ff=96, heads=4, vocabulary=50, cache=8, dtype=torch.float32)
    sizes = Sizes() if gpu else small
    torch.manual_seed(0)
    model = Decoder(sizes, "cuda" if gpu else "cpu").eval()
    bandwidth = copy_bandwidth(1.0)
    print(
        f"copy bandwidth {bandwidth / 1e12:.3f} TB/s" if bandwidth else "no GPU: a dry run of small sizes", flush=True
    )
    rows = [r for r in results.expected() if r.table.startswith("whole token")]
    name = torch.cuda.get_device_name() if gpu else ""
    return int(not measure(model, sizes, rows, {"device": name, "software": options.software}, options.out))


if __name__ == "__main__":
    sys.exit(main())
