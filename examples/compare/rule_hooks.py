"""Putting rules on a model: hooks on the FFNs' linears of a transformed model in dense mode."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

import ltepass
from examples.compare.rules import Rule, Seen
from ltepass.routed.batches import run_batches
from ltepass.routed.routed import Routed
from ltepass.routed.sites import FFNSite

Samples = list[tuple[Tensor, Tensor, Tensor]]  # x, gate product and h of each site, [n, ...] bf16


def collect(model: nn.Module, batches: Iterable[Tensor], room: int = 4096) -> Samples:
    """Up to `room` tokens of each site of a transformed model in dense mode."""
    ltepass.set_mode(model, "dense")
    taps = [_Tap(model, site, room) for site in Routed.of(model, "samples").sites]
    try:
        run_batches(model, batches)
    finally:
        for tap in taps:
            tap.close()
    return [tap.samples() for tap in taps]


class Ruled:
    """A model under one rule per site. `rules` also hang on the model, so that a Trainer trains what they train."""

    def __init__(self, model: nn.Module, kind: type[Rule], sparsity: float) -> None:
        ltepass.set_mode(model, "dense")
        self.model, self.sites = model, Routed.of(model, "rules").sites
        device = next(model.parameters()).device
        self.rules = [kind(model, site, sparsity).to(device) for site in self.sites]
        model.add_module("compared_rules", nn.ModuleList(self.rules))
        self.handles: list[Any] = []

    def calibrate(self, samples: Samples) -> None:
        """Each rule gets samples of its own site on the dense model."""
        with torch.no_grad():
            for rule, (x, gate, h) in zip(self.rules, samples, strict=True):
                rule.calibrate(self.model, x.float(), gate.float(), h.float())

    def __enter__(self) -> Ruled:
        for rule, site in zip(self.rules, self.sites, strict=True):
            self.handles += _hook(self.model, site, rule)
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def take_off(self) -> None:
        """The model is as it was, but for weights that were trained."""
        delattr(self.model, "compared_rules")

    def reset(self) -> None:
        for rule in self.rules:
            rule.inactive.clear()

    def extra_loss(self) -> Tensor | None:
        extras = [rule.extra for rule in self.rules if rule.extra is not None]
        return torch.stack(extras).mean() if extras else None

    def measured(self) -> tuple[float, float]:
        """(FFN sparsity, share of the FFN's weight bytes read), means over sites and the forwards since reset."""
        shares = [float(torch.stack(rule.inactive).mean()) if rule.inactive else 0.0 for rule in self.rules]
        read = [rule.bytes_share(share) for rule, share in zip(self.rules, shares, strict=True)]
        return sum(shares) / len(shares), sum(read) / len(read)


def _hook(model: nn.Module, site: FFNSite, rule: Rule) -> list[Any]:
    kept: dict[str, Tensor] = {}

    def before_up(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        kept["x"] = args[0]
        kept["seen"] = rule.inputs(args[0])
        return (kept["seen"], *args[1:])

    def before_gate(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return before_up(module, args) if "x" not in kept else (kept["seen"], *args[1:])

    def after_gate(module: nn.Module, args: Any, out: Tensor) -> None:
        kept["gate"] = out

    def before_down(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen = Seen(kept["x"], kept.get("gate", args[0]), args[0])
        kept.clear()
        return (rule.apply(seen), *args[1:])

    # The gate and the up linear are called in an order of the model's own.
    up, down = model.get_submodule(site.up), model.get_submodule(site.down)
    handles = [up.register_forward_pre_hook(before_gate), down.register_forward_pre_hook(before_down)]
    if site.gate and site.gate != site.up:
        gate = model.get_submodule(site.gate)
        handles += [gate.register_forward_pre_hook(before_gate), gate.register_forward_hook(after_gate)]
    return handles


class _Tap:
    """Samples of x, gate product and h at one site."""

    def __init__(self, model: nn.Module, site: FFNSite, room: int) -> None:
        self.rows: dict[str, list[Tensor]] = {"x": [], "gate": [], "h": []}
        self.room = room
        up, down = model.get_submodule(site.up), model.get_submodule(site.down)
        self.handles = [
            up.register_forward_pre_hook(lambda m, args: self._keep("x", args[0])),
            down.register_forward_pre_hook(lambda m, args: self._keep("h", args[0])),
        ]
        if site.gate and site.gate != site.up:
            gate = model.get_submodule(site.gate)
            self.handles.append(gate.register_forward_hook(lambda m, args, out: self._keep("gate", out)))

    def _keep(self, name: str, value: Tensor) -> None:
        left = self.room - sum(len(r) for r in self.rows[name])
        if left > 0:
            self.rows[name].append(value.detach().flatten(0, -2)[:left].to(torch.bfloat16, copy=True))

    def samples(self) -> tuple[Tensor, Tensor, Tensor]:
        x, gate, h = (torch.cat(r) if r else None for r in self.rows.values())
        assert x is not None
        assert h is not None
        return x, h if gate is None else gate, h

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()
