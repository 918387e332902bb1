"""What a user may choose: one frozen dataclass, checked when it is made."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from ltepass.errors import ConfigError
from ltepass.grouping_methods import AUTO, GROUPINGS

Mode = Literal["soft", "hard", "dense"]
Budget = Literal["layer", "model"]
Scope = Literal["ffn", "model"]  # of lowering
RouterKind = Literal["linear", "proxy"]
ProxyScales = Literal["blocks", "rows"]
Inactive = Literal["zero", "low_bit"]
Quantiser = Literal["gptq", "nearest"]

MODES: tuple[Mode, ...] = ("soft", "hard", "dense")
BUDGETS: tuple[Budget, ...] = ("layer", "model")
ROUTERS: tuple[RouterKind, ...] = ("linear", "proxy")
PROXY_SCALES: tuple[ProxyScales, ...] = ("blocks", "rows")
INACTIVE: tuple[Inactive, ...] = ("zero", "low_bit")
QUANTISERS: tuple[Quantiser, ...] = ("gptq", "nearest")
SEEDS = range(-(2**63), 2**64)  # what torch.Generator takes


def check_mode(mode: str) -> Mode:
    if mode not in MODES:
        raise ConfigError(f"mode is {mode!r}; expected one of {', '.join(MODES)}; pass one of these")
    return mode  # narrowed by the check above


def check_sparsity(value: float, name: str = "target_sparsity") -> float:
    if not 0.0 <= value < 1.0:
        raise ConfigError(f"{name} is {value}; expected a share of inactive neurons in [0, 1); pass e.g. 0.5")
    return float(value)


@dataclass(frozen=True, kw_only=True)
class LTEConfig:
    """Settings of `ltepass.transform`.

    Arguments:
        group_size: neurons per expert; "auto" picks a divisor of each site's d_ff near 32 (the paper's value), and
            single neurons for a proxy.
        target_sparsity: share of inactive neurons that training steers to, in [0, 1).
        grouping: how neurons become experts: a method of `ltepass.grouping_methods.GROUPINGS`, or "auto", which takes
            output_aware where calibration data is given and identity where it is not.
        budget: "layer" brings every FFN to the target; "model" their mean, by one threshold for all: FFNs to whose
            experts the loss is less sensitive give up more (calibration measures it, with one backward pass).
        hidden_sparsity: share of the hidden units of active experts, the smallest, that the down projection does not
            read; 0 in the paper. `ltepass.set_hidden_sparsity` changes it and places the cuts.
        input_sparsity: share of an FFN's inputs, the smallest, that its up and gate projections do not read; 0 in the
            paper. `ltepass.set_input_sparsity` changes it and places the cuts.
        router: "linear" (the paper's) knows groups of neurons; "proxy" single ones, by a 4-bit copy of gate and up that
            it holds and reads for every token (a sixth of the FFN's bytes in bf16). It is nearly as good as an oracle
            before any training.
        proxy_scales: of the copy: "blocks" of 32 inputs have a multiplier each (4.25 bits a weight), or "rows" share
            one scale (4 bits, less exact).
        inactive: "zero", or "low_bit" (proxies of single neurons alone): neurons that are not active keep the value
            that 4-bit weights give them, and active ones have 8 bits, as two planes of 4. Training stages leave the
            codes as calibration made them: what is no FFN learns around them. CPUs alone have a kernel for it.
        low_bit_sparsity: of inactive="low_bit": share of neurons, those that score least, that add nothing at all:
            their columns of down are not read.
        low_bit_quantiser: of inactive="low_bit": how calibration makes the 4-bit codes. "gptq" makes later inputs'
            weights up for what rounding the earlier ones' lost; "nearest" rounds. Without data they are rounded.
        router_bias: the paper's router has none; a calibrated start fits better with one.
        tau: threshold on the sigmoid score (0.5 everywhere in the paper).
        seed: for grouping and router start.
    Raises: ConfigError.
    Example:
        >>> ltepass.LTEConfig(target_sparsity=0.7).tau
        0.5
        >>> ltepass.LTEConfig(router="proxy", proxy_scales="rows").group_size  # single neurons
        'auto'
    """

    group_size: int | Literal["auto"] = "auto"
    target_sparsity: float = 0.5
    grouping: str = "auto"
    budget: Budget = "layer"
    hidden_sparsity: float = 0.0
    input_sparsity: float = 0.0
    router: RouterKind = "linear"
    proxy_scales: ProxyScales = "blocks"
    inactive: Inactive = "zero"
    low_bit_sparsity: float = 0.0
    low_bit_quantiser: Quantiser = "gptq"
    router_bias: bool = True
    tau: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        check_sparsity(self.target_sparsity)
        check_sparsity(self.hidden_sparsity, "hidden_sparsity")
        check_sparsity(self.input_sparsity, "input_sparsity")
        if self.group_size != "auto" and (type(self.group_size) is not int or self.group_size < 1):
            raise ConfigError(f'group_size is {self.group_size!r}; expected "auto" or an integer of at least 1')
        if self.grouping not in (AUTO, *GROUPINGS):
            raise ConfigError(f"grouping is {self.grouping!r}; expected one of {', '.join((AUTO, *GROUPINGS))}")
        if self.budget not in BUDGETS:
            raise ConfigError(f"budget is {self.budget!r}; expected one of {', '.join(BUDGETS)}")
        for name, allowed in (
            ("router", ROUTERS),
            ("proxy_scales", PROXY_SCALES),
            ("inactive", INACTIVE),
            ("low_bit_quantiser", QUANTISERS),
        ):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(allowed)}")
        check_sparsity(self.low_bit_sparsity, "low_bit_sparsity")
        self._check_tiers()
        if self.router == "proxy" and not self.router_bias:
            raise ConfigError(
                "a proxy's scores are never negative: its bias stands for the threshold that training moves; "
                "pass router_bias=True"
            )
        if self.budget == "model" and not self.router_bias:
            raise ConfigError('budget "model" puts what an FFN matters into its router\'s bias; pass router_bias=True')
        if type(self.seed) is not int or self.seed not in SEEDS:
            raise ConfigError(f"seed is {self.seed!r}; expected an integer that torch.manual_seed takes; pass e.g. 0")
        if type(self.router_bias) is not bool:
            raise ConfigError(f"router_bias is {self.router_bias!r}; expected True or False")
        if not 0.0 < self.tau < 1.0:
            raise ConfigError(f"tau is {self.tau}; expected a sigmoid score in (0, 1); the paper uses 0.5")

    def _check_tiers(self) -> None:
        if self.inactive == "zero":
            wanted: dict[str, tuple[object, ...]] = {"low_bit_sparsity": (0.0,), "low_bit_quantiser": ("gptq",)}
        else:
            wanted = {
                "router": ("proxy",),
                "group_size": (1, "auto"),
                "proxy_scales": ("blocks",),
                "hidden_sparsity": (0.0,),
                "input_sparsity": (0.0,),
            }
        for name, allowed in wanted.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ConfigError(
                    f'{name} is {value!r} beside inactive="{self.inactive}"; expected {allowed[0]!r}; pass it, or '
                    f'inactive="{"low_bit" if self.inactive == "zero" else "zero"}"'
                )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
