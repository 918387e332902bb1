"""A router that knows the FFN itself, in 4 bits: it tells single neurons apart, which no linear does.

It holds codes of gate and up (plain FFNs: of up) and the size that each neuron writes with, and scores an expert by
what it would add to the output: |act(g~) u~| size, an int8 x against 4-bit weights. `kernels/proxy_reference.py`
defines the scores bit by bit; kernels decide by the same bits, so that no token's choice depends on where it is made.

Codes are constants: `transform` makes them, `calibrate` anew, and `settle` at the end of a training stage from what the
weights have become. What learns is a scale per expert and the layer's bias, which stands for a trained threshold.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from ltepass.config import LTEConfig
from ltepass.errors import ConfigError
from ltepass.kernels import proxy_codes, proxy_reference
from ltepass.kernels.proxy import proxy_scores
from ltepass.kernels.proxy_codes import Codes
from ltepass.kernels.reference import ACTIVATIONS
from ltepass.kernels.weight_formats import BLOCK, HALF
from ltepass.routed.router import Router
from ltepass.routed.sites import FFNSite, read_rows
from ltepass.routed.undo import keep

CONSTANTS = proxy_reference.Proxy._fields


class ProxyRouter(Router):
    """Scores experts by an int4 copy of what computes them. k is 2 with a gate (gate, up), else 1 (up).

    weight: [n_experts] fp32, 1 before training; bias: [] fp32.
    codes: [k, d_ff, 16 blocks] uint8, two a byte; multipliers: [k, d_ff, blocks] uint8, or None with scales by rows.
    scales: [k, d_ff] fp32; biases: [k, d_ff] fp32, of the linears, or None where none has one.
    sizes: [d_ff] fp32: |down_j|, in units in which calibrated logits have the spread that a sigmoid wants.
    Everything else is as `Router` has it.
    """

    codes: Tensor
    multipliers: Tensor | None
    scales: Tensor
    biases: Tensor | None
    sizes: Tensor
    bias: nn.Parameter

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        group_size: int,
        *,
        activation: str,
        gated: bool,
        biased: bool,
        blocks: bool = True,
        tau: float = 0.5,
        cut: bool = False,
        input_cut: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        self.activation, self.shape = activation, (1 + gated, d_ff)
        self.blocks, self.biased = proxy_codes.blocks_of(d_model) if blocks else 0, biased
        super().__init__(d_model, d_ff, group_size, tau=tau, cut=cut, input_cut=input_cut, device=device)

    def _add_tensors(self, bias: bool, device: torch.device | str | None) -> None:
        """What scores neurons: a weight and a bias that learn, and the constants."""
        assert bias, "LTEConfig asks for one"

        def fp32(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=device)

        def codes(width: int) -> Tensor:
            return torch.empty(*self.shape, width, dtype=torch.uint8, device=device)

        self.weight = nn.Parameter(fp32(self.n_experts))
        self.bias = nn.Parameter(fp32())
        self.register_buffer("codes", codes(HALF * proxy_codes.blocks_of(self.d_model)))
        self.register_buffer("multipliers", codes(self.blocks) if self.blocks else None)
        self.register_buffer("scales", fp32(*self.shape))
        self.register_buffer("biases", fp32(*self.shape) if self.biased else None)
        self.register_buffer("sizes", fp32(self.d_ff))

    def _start(self, generator: torch.Generator) -> None:
        """A proxy of a neuron that is known to be 0, until `encode` and calibration tell more."""
        self.weight.fill_(1.0)
        self.bias.zero_()
        self.codes.fill_(proxy_codes.ZERO * 17)
        self.sizes.fill_(1.0)
        for constant in (self.multipliers, self.scales, self.biases):
            if constant is not None:
                constant.zero_()

    def logits(self, x: Tensor) -> Tensor:
        return proxy_scores(x, *self.operands(), self.activation)  # type: ignore[no-any-return]

    def operands(self) -> tuple[Tensor | None, ...]:
        """What `ltepass::routed_proxy_ffn` takes of it."""
        return (*(getattr(self, name) for name in CONSTANTS), self.weight, self.bias)

    def reorder(self, order: Tensor) -> None:
        """As every router's order of neurons, that of the codes, scales, biases and sizes."""
        super().reorder(order)
        for name in CONSTANTS:
            constant = getattr(self, name)
            if constant is not None:
                keep(constant)
                constant.copy_(_of_neurons(constant, order))

    def of_experts(self, experts: Tensor) -> dict[str, Tensor]:
        """As of every router, and the constants of the neurons that are left."""
        neurons, own = self.neurons_of(experts), super().of_experts(experts)
        return own | {name: _of_neurons(own[name], neurons) for name in CONSTANTS if name in own}

    def extra_repr(self) -> str:
        scales = f"blocks of {BLOCK}" if self.blocks else "rows"
        return f"{super().extra_repr()}, activation={self.activation!r}, scales={scales}"


def _of_neurons(constant: Tensor, neurons: Tensor) -> Tensor:
    """A constant's entries of these neurons, in this order."""
    along = constant.dim() - 1 if constant.dim() < 3 else 1
    return constant.index_select(along, neurons.to(constant.device))


Kind = TypeVar("Kind", bound=ProxyRouter)


def require_known(sites: list[FFNSite]) -> None:
    """Raises ConfigError for a site whose hidden units no proxy computes."""
    unknown = next((site for site in sites if site.activation not in ACTIVATIONS), None)
    if unknown is not None:
        raise ConfigError(
            f'{unknown.name} computes {unknown.activation}; router "proxy" expects one of {", ".join(ACTIVATIONS)}; '
            f'pass router="linear", or skip={unknown.name!r}'
        )


def proxy_of(site: FFNSite, config: LTEConfig, device: torch.device | str | None, kind: type[Kind]) -> Kind:
    """A proxy router of this kind for a site."""
    return kind(
        site.d_model,
        site.d_ff,
        site.group_size,
        activation=site.activation,
        gated=site.gate_rows is not None,
        biased=site.up_bias is not None or site.gate_bias is not None,
        blocks=config.proxy_scales == "blocks",
        tau=config.tau,
        cut=config.hidden_sparsity > 0,
        input_cut=config.input_sparsity > 0,
        device=device,
    )


@torch.no_grad()
def encode(model: nn.Module, site: FFNSite, router: ProxyRouter, codes: Codes | None = None) -> bool:
    """Fill a proxy router from the weights as they are. False, and nothing done, where they cannot be read.

    codes: of gate and up; None rounds them.
    """
    weights = read_weights(model, site)
    if weights is None:
        return False
    codes = codes or proxy_codes.quantise(weights, blocks=bool(router.blocks))
    added = [read_rows(model, site, bias) for bias in ((site.gate_bias,) if site.gate_rows else ()) + (site.up_bias,)]
    none = weights.new_zeros(site.d_ff)
    biases = torch.stack([none if bias is None else bias.detach().float() for bias in added])
    for name, value in {**codes._asdict(), "biases": biases}.items():
        constant = getattr(router, name)
        if constant is not None:
            assert value is not None
            keep(constant)
            constant.copy_(value)
    return True


def read_weights(model: nn.Module, site: FFNSite) -> Tensor | None:
    """What a proxy is made of: fp32 [k, d_ff, d_model] of gate and up, or None where they are not to be read."""
    found = [read_rows(model, site, rows) for rows in (site.gate_rows, site.up_rows) if rows]
    if any(weight is None or weight.shape != (site.d_ff, site.d_model) for weight in found):
        return None
    return torch.stack([weight.detach().float() for weight in found if weight is not None])


@torch.no_grad()
def start_proxy(model: nn.Module, site: FFNSite) -> None:
    """A site's fresh proxies: codes of the weights, and sizes as the columns of down have them."""
    for router in (m for m in model.get_submodule(site.router).modules() if isinstance(m, ProxyRouter)):
        encode(model, site, router)
        router.sizes.copy_(site.down_rows.of(model, site.d_ff).float().norm(dim=1))
