"""What a user may choose about the two stages: one frozen dataclass, checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ltepass.config import BUDGETS, Budget, check_sparsity
from ltepass.errors import ConfigError, TrainingError
from ltepass.training.contrastive import ContrastiveSettings

if TYPE_CHECKING:
    from transformers import TrainingArguments

Trainable = Literal["all", "lora", "routers"]


@dataclass(frozen=True, kw_only=True)
class LTESettings:
    """Settings of the two training stages (paper section 4.3).

    Arguments (beside TrainingArguments, which each stage uses as they are):
        lam: separability coefficient (0.5 in the paper).
        eta: first efficiency coefficient, then steered to
            `target_sparsity` (None: the model's config) unless `steer` is off, as in the paper.
        soft_steps, hard_steps: optimizer steps of each stage; None takes the arguments' epochs or max_steps, 0 none.
        settle: move thresholds at the end of each stage so that held-out sparsity meets the target.
        hold: in the hard stage, thresholds follow the measured sparsity step by step, so that settling is a small move.
        budget: "layer" brings every FFN to the target, "model" their mean, by one threshold for all; None: the
            config's.
        trainable: "all" (the paper; with inactive="low_bit" all but the FFNs' linears, whose place codes take), "lora"
            (low-rank updates of the FFNs' linears, merged after each stage; needs peft) or "routers". The routers learn
            in the soft stage; in the hard stage they are frozen, except with "routers", where nothing else is left to
            learn, or with `straight_through`: the hard decision's value, a sigmoid's gradient.
        through_op: the hard stage computes the active (token, expert) pairs alone, by the sparse op and its backward.
            What that saves of an FFN is in kernels/README.md, of whole steps in examples/results/step_time.csv.
        lora_rank: of "lora".
        distill: weight of the KL to the dense model; the labels' loss gets 1 - distill.
        contrastive: terms towards the pre-trained model, the dense one and earlier pruning steps (CAP), added to the
            loss; None adds none.
        union: coefficient of the soft stage's term by which neighbouring tokens share experts.
    Raises: ConfigError.
    Example:
        >>> ltepass.LTESettings(target_sparsity=0.7, trainable="routers").lam
        0.5
    """

    lam: float = 0.5
    eta: float = 0.3
    steer: bool = True
    target_sparsity: float | None = None
    soft_steps: int | None = None
    hard_steps: int | None = None
    settle: bool = True
    hold: bool = True
    budget: Budget | None = None
    trainable: Trainable = "all"
    straight_through: bool = False
    through_op: bool = False
    lora_rank: int = 16
    distill: float = 0.0
    contrastive: ContrastiveSettings | None = None
    union: float = 0.0

    def __post_init__(self) -> None:
        if self.target_sparsity is not None:
            check_sparsity(self.target_sparsity)
        for name, allowed in (("trainable", ("all", "lora", "routers")), ("budget", (None, *BUDGETS))):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(map(str, allowed))}")
        if not 0.0 <= self.distill <= 1.0:
            raise ConfigError(f"distill is {self.distill}; expected a share of the loss in [0, 1]")
        if not isinstance(self.contrastive, ContrastiveSettings | None):
            raise ConfigError(f"contrastive is {self.contrastive!r}; expected ltepass.ContrastiveSettings or None")
        for name in ("lam", "eta", "union"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected a coefficient of at least 0")
        if self.through_op and (self.trainable != "all" or self.straight_through):
            raise ConfigError(
                "through_op computes with a frozen decision and plain linears; expected trainable 'all' and no "
                "straight_through; pass one or the other"
            )
        if self.lora_rank < 1:
            raise ConfigError(f"lora_rank is {self.lora_rank}; expected at least 1")


def refuse_reentrant(args: TrainingArguments) -> None:
    """Of the TrainingArguments that every stage takes as they are: one setting that none can work with. Raises
    TrainingError.
    """
    new, old = "activation_checkpointing", "gradient_checkpointing"  # transformers renames it, and mirrors it at first
    name = new if hasattr(args, new) else old
    kwargs = getattr(args, f"{name}_kwargs", None) or {}
    if getattr(args, name) and kwargs.get("use_reentrant"):
        raise TrainingError(
            f"{name}_kwargs has use_reentrant=True, which silently drops the auxiliary gradient; "
            "expected non-reentrant checkpointing; pass {'use_reentrant': False}"
        )
