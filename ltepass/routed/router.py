"""The trainable router of one FFN site, whose decision the gate (`gate.py`) applies.

Paper section 4.2: score G = sigmoid(x W_g).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ltepass.config import Mode
from ltepass.routed.gate import gate as gate  # what was pickled earlier names them here
from ltepass.routed.gate import seen_inputs as seen_inputs
from ltepass.routed.quantile_table import N_QUANTILES
from ltepass.routed.recorded_calls import Recorder
from ltepass.threads import require_own

if TYPE_CHECKING:
    from ltepass.routed.coded_ffn import CodedFFN

_RECORDED = ("kept", "rows", "count_inactive", "share_neighbours")  # a router's own attributes, once


def logit(tau: float) -> float:
    return math.log(tau / (1.0 - tau))


class Router(nn.Module):
    """Scores `n_experts` groups of neurons from the FFN's input. Always fp32, whatever the model's dtype.

    weight: [n_experts, d_model]; bias: [n_experts] or None; an expert is active where logit > threshold.
    threshold: [] fp32 buffer, logit(tau) unless `set_sparsity` moved it.
    quantiles: [101] fp32 buffer, quantiles[s] is the threshold that leaves s % of the calibration experts inactive;
        NaN before calibration.
    cut: [] fp32 buffer, or None (the paper) where `set_hidden_sparsity` made none: in hard mode, hidden units of a size
        up to it are left out of the down projection, also those of active experts; negative: none are.
    input_cut: the same for entries of x and the up and gate projections (`set_input_sparsity`); the router sees all.
    permutation: [d_ff] int64 buffer; hidden unit i of the grouped FFN was unit permutation[i] of the original.
    """

    weight: Tensor
    threshold: Tensor
    quantiles: Tensor
    permutation: Tensor
    cut: Tensor | None
    input_cut: Tensor | None
    tiered = False  # whether its FFN's inactive neurons keep low bits (tiered_router.py)
    coded: CodedFFN | None = None  # what a lowered site reads in the place of its weights, where it reads codes
    watched = False  # whether the gate tells that it was applied: a forward around it is guarded

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        group_size: int,
        *,
        bias: bool = True,
        tau: float = 0.5,
        cut: bool = False,
        input_cut: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        assert d_ff % group_size == 0, (d_ff, group_size)
        self.d_model, self.d_ff, self.group_size, self.tau = d_model, d_ff, group_size, tau
        self.n_experts = d_ff // group_size
        self.mode: Mode = "dense"
        self._add_tensors(bias, device)
        self.register_buffer("threshold", torch.empty((), dtype=torch.float32, device=device))
        self.register_buffer("quantiles", torch.empty(N_QUANTILES, dtype=torch.float32, device=device))
        for name, given in (("cut", cut), ("input_cut", input_cut)):
            self.register_buffer(name, torch.empty((), dtype=torch.float32, device=device) if given else None)
        self.register_buffer("permutation", torch.empty(d_ff, dtype=torch.int64, device=device))
        # Set by a training stage, never saved: hard mode learns through its decision as if it were the score.
        self.straight_through = False
        self.recorder = Recorder()
        # Called with the hidden units h [..., d_ff] of every forward while calibration runs; None otherwise.
        self.observer: Callable[[Tensor], None] | None = None
        # How a lowered site reads its weights (lowered_forward.Plan); None where it is not lowered.
        self.plan: object | None = None
        self.thread: int | None = None  # the one that has this router to itself for a time (threads.unshared)
        self.turns = 0  # how often one had
        # Share of (token, expert) pairs active at the present threshold, as the table has it; None without a table.
        self.density: float | None = None
        self.reset()

    def _add_tensors(self, bias: bool, device: torch.device | str | None) -> None:
        """What scores: of another kind of router, something else."""
        self.weight = nn.Parameter(torch.empty(self.n_experts, self.d_model, dtype=torch.float32, device=device))
        self.bias = nn.Parameter(torch.empty(self.n_experts, dtype=torch.float32, device=device)) if bias else None

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Random start that leaves the global RNG alone; no table; identity permutation."""
        generator = generator or torch.Generator().manual_seed(0)
        with torch.no_grad():
            self._start(generator)
            self.threshold.fill_(logit(self.tau))
            self.quantiles.fill_(math.nan)
            for cut in (self.cut, self.input_cut):
                if cut is not None:
                    cut.fill_(-1.0)
            self.permutation.copy_(torch.arange(self.d_ff, device=self.permutation.device))

    def _start(self, generator: torch.Generator) -> None:
        if not self.weight.is_meta:
            start = torch.randn(self.weight.shape, generator=generator, dtype=torch.float32, device="cpu")
            self.weight.copy_(start * self.d_model**-0.5)
        if self.bias is not None:
            self.bias.zero_()

    def operands(self) -> tuple[Tensor | None, ...]:
        """What the sparse op takes of it, and a token reads."""
        own = self._parameters
        weight = own.get("weight")
        if self.coded is not None and self.coded.router is not None:
            return (*self.coded.router, self.bias)
        # a DataParallel replica keeps plain tensors as attributes
        return (self.weight, self.bias) if weight is None else (weight, own.get("bias"))

    def planes_of_down(self) -> tuple[Tensor, ...]:
        """What is read for neurons that keep low bits."""
        return ()

    def low_planes(self) -> tuple[Tensor, ...]:
        """What is read for active ones beside that."""
        return ()

    def reorder(self, order: Tensor) -> None:
        """The FFN's neurons were put into another order: neuron i was neuron order[i]."""
        self.permutation.copy_(self.permutation[order.to(self.permutation.device)])

    def of_experts(self, experts: Tensor) -> dict[str, Tensor]:
        """Its tensors where these experts alone are left; experts: int64, ascending. `permutation` counts the neurons
        that are left.
        """
        neurons = self.neurons_of(experts)
        left = self.permutation[neurons.to(self.permutation.device)]
        own = {name: tensor.detach().clone() for name, tensor in self.state_dict().items()}
        own |= {name: own[name][experts.to(own[name].device)] for name in ("weight", "bias") if self._by_expert(name)}
        return {**own, "permutation": left.argsort().argsort()}

    def neurons_of(self, experts: Tensor) -> Tensor:
        """experts: [n] int64 -> [n * group_size] int64."""
        return (experts[:, None] * self.group_size + torch.arange(self.group_size)).flatten()

    def _by_expert(self, name: str) -> bool:
        """Whether this parameter has an entry for each expert."""
        parameter = self._parameters.get(name)
        return parameter is not None and parameter.dim() > 0

    def forward(self, x: Tensor) -> Tensor | None:
        """x: [..., d_model] any float dtype -> logits [..., n_experts] fp32; None in dense mode, which needs none."""
        mode = self.mode
        require_own(self)
        if mode == "dense":
            return None
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                logits = self.logits(x.float())
        else:
            logits = self.logits(x.float())
        if torch.is_grad_enabled() and (mode == "soft" or self.recorder.count_inactive):
            self.recorder.record_logits(logits, self.threshold, tau=self.tau if mode == "soft" else None)
        return logits

    def logits(self, x: Tensor) -> Tensor:
        """x: [..., d_model] fp32 -> logits [..., n_experts] fp32, in every mode."""
        return nn.functional.linear(x, self.weight, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Moves with the model, but never changes dtype: `model.to(bfloat16)` keeps the decision in fp32."""

        def keep_dtype(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if moved.dtype == t.dtype else t.to(moved.device)

        super()._apply(keep_dtype, recurse)
        self._expect(self.density)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.note_density()

    def note_density(self) -> None:
        """Keep `density` up to date: a number, so that no call has to wait for the device to choose its kernels."""
        plain = type(self.threshold) is type(self.quantiles) is Tensor and not self.threshold.is_meta
        known = plain and not bool(self.quantiles.isnan().any())
        self._expect(float((self.quantiles > self.threshold).float().mean()) if known else None)

    def _expect(self, density: float | None) -> None:
        """On the threshold too, which is all that a backend sees of a router."""
        self.density = self.threshold.density = density  # type: ignore[attr-defined]

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: without what belongs to one forward, which no copy can take."""
        state: dict[str, Any] = super().__getstate__()
        return {**state, "recorder": self.recorder.emptied(), "observer": None, "thread": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also what earlier versions pickled, whose routers recorded by themselves."""
        own = {name: value for name, value in state.items() if name not in _RECORDED}
        flags = (state.get("count_inactive", False), state.get("share_neighbours", False))
        super().__setstate__({"recorder": Recorder(*flags), **own})

    def _replicate_for_data_parallel(self) -> Router:
        """A thread's own: what a replica records is lost with it."""
        replica: Router = super()._replicate_for_data_parallel()
        replica.recorder = self.recorder.emptied()
        return replica

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, n_experts={self.n_experts}, group_size={self.group_size}, mode={self.mode!r}"
