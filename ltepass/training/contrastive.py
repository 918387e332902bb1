"""Contrastive pruning, CAP (Xu et al., AAAI 2022, arXiv 2112.07198): the pruned model's representation of an example is
drawn to those that other models have of it, and of examples with its label.

The others are the paper's three: the pre-trained model (PrC), the fine-tuned one (FiC), and snapshots of earlier
pruning steps (SnC). A term is InfoNCE over cosines: with z_i of the model that learns, and as candidates c what a
module's models give of the batch and what the model itself gives (without gradient, but for z_i),

    L_i = -1 / |P(i)|  sum_{p in P(i)}  log  exp(cos(z_i, p) / t) / sum_c exp(cos(z_i, c) / t)

P(i) is, unsupervised, what the others give of example i; supervised, all candidates with its label.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from ltepass.errors import ConfigError, TrainingError
from ltepass.routed.batches import inputs_of

Pooling = Literal["mean", "first"]


@dataclass(frozen=True, kw_only=True)
class ContrastiveSettings:
    """Weights of the contrastive terms of a training stage (CAP, arXiv 2112.07198).

    Arguments:
        pretrained, finetuned, snapshots: weights of the three modules: towards the pre-trained model, the dense
            fine-tuned one and earlier pruning steps; 0 leaves one out.
        unsupervised, supervised: weights of the two kinds of positives in each: the same example, and examples with its
            label, which need one label a sequence.
        temperature: that cosines are divided by.
        pooling: an example's representation: "mean" of its tokens' last hidden states, or that of the "first" token.
    Raises: ConfigError.
    Example:
        >>> settings = ltepass.ContrastiveSettings(snapshots=0.0)
        >>> ltepass.LTESettings(distill=0.9, contrastive=settings).contrastive.temperature
        0.1
    """

    pretrained: float = 1.0
    finetuned: float = 1.0
    snapshots: float = 1.0
    unsupervised: float = 0.1
    supervised: float = 0.1
    temperature: float = 0.1
    pooling: Pooling = "mean"

    def __post_init__(self) -> None:
        for name in ("pretrained", "finetuned", "snapshots", "unsupervised", "supervised"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected a weight of at least 0")
        for either in (("pretrained", "finetuned", "snapshots"), ("unsupervised", "supervised")):
            if not any(getattr(self, name) for name in either):
                raise ConfigError(f"{', '.join(either)} are all 0; expected one above, or contrastive=None")
        if not self.temperature > 0:
            raise ConfigError(f"temperature is {self.temperature}; expected a number above 0, as 0.1")
        if self.pooling not in ("mean", "first"):
            raise ConfigError(f"pooling is {self.pooling!r}; expected mean or first")


def contrastive_loss(
    own: Tensor,
    others: Sequence[Tensor],
    labels: Tensor | None = None,
    *,
    unsupervised: float = 0.1,
    supervised: float = 0.1,
    temperature: float = 0.1,
) -> Tensor:
    """One contrastive term, for a loop of your own: towards the pre-trained model, the fine-tuned one or snapshots.

    Arguments:
        own: [B, d], the batch's representations in the model that learns; any float dtype.
        others: [B, d] each, the same examples' in the other models; they get no gradient.
        labels: [B] int64, of "supervised"; None leaves that part out.
        unsupervised, supervised, temperature: as in `ContrastiveSettings`.
    Returns: the mean over examples, a scalar fp32.
    Raises: TrainingError (shapes that do not fit, or no others).
    Example:
        >>> own = torch.eye(4, requires_grad=True)
        >>> near, far = (ltepass.contrastive_loss(own, [other]) for other in (torch.eye(4), -torch.eye(4)))
        >>> bool(near < far)
        True
    """
    wrong = [tuple(other.shape) for other in others if other.shape != own.shape]
    if own.dim() != 2 or not others or wrong:
        raise TrainingError(
            f"representations {tuple(own.shape)} of the model and {wrong or len(others)} of others; expected [B, d] of "
            "each, of the same examples, and one other at least"
        )
    z = nn.functional.normalize(own.float(), dim=-1)
    given = [z.detach(), *(nn.functional.normalize(other.detach().float(), dim=-1) for other in others)]
    itself = torch.eye(len(own), dtype=torch.bool, device=own.device)
    nobody = itself.new_zeros(itself.shape)
    hidden = torch.cat([itself, *(nobody for _ in others)], 1)  # [B, (1 + n) B]: an example is no candidate for itself
    scores = (z @ torch.cat(given).T / temperature).masked_fill(hidden, -torch.inf)
    log_p = scores.log_softmax(-1)
    loss = unsupervised * _mean(log_p, torch.cat([nobody, *(itself for _ in others)], 1))
    if labels is not None and supervised:
        alike = labels[:, None] == labels[None]
        loss = loss + supervised * _mean(log_p, torch.cat([alike] * len(given), 1) & ~hidden)
    return loss


def _mean(log_p: Tensor, positive: Tensor) -> Tensor:
    """-log p, over the positives of each example, and over examples."""
    return -(torch.where(positive, log_p, 0.0).sum(-1) / positive.sum(-1)).mean()


class Contrast:
    """The modules of one training: which models there are beside the one that learns."""

    def __init__(self, settings: ContrastiveSettings, pretrained: nn.Module | None, finetuned: nn.Module) -> None:
        if settings.pretrained and pretrained is None:
            raise ConfigError(
                "contrastive.pretrained is above 0 and no pre-trained model was given; expected "
                "LTETrainer(..., pretrained=model); pass it, or ContrastiveSettings(pretrained=0.0)"
            )
        self.settings, self.finetuned = settings, finetuned
        self.pretrained = None if pretrained is None else pretrained.eval().requires_grad_(False)
        self.snapshots: list[nn.Module] = []

    def add_snapshot(self, model: nn.Module) -> None:
        """A copy of the model as it is now is what later steps look back to."""
        self.snapshots.append(frozen(model))

    def loss(self, hidden: Tensor, inputs: Mapping[str, Tensor], labels: Tensor | None) -> Tensor:
        """hidden: [B, T, d], the last of the model that learns. Raises TrainingError."""
        s = self.settings
        if s.supervised and (labels is None or labels.dim() != 1 or labels.is_floating_point()):
            seen = "none" if labels is None else f"{labels.dtype} {list(labels.shape)}"
            raise TrainingError(
                f"contrastive.supervised expects one whole number a sequence as its label, and the batch has {seen}; "
                "pass ContrastiveSettings(supervised=0.0)"
            )
        modules: tuple[tuple[float, Sequence[nn.Module | None]], ...] = (
            (s.pretrained, [self.pretrained]),
            (s.finetuned, [self.finetuned]),
            (s.snapshots, self.snapshots),
        )
        own = pooled(hidden, inputs, s.pooling)
        loss = own.new_zeros((), dtype=torch.float32)
        for weight, models in modules:
            others = [self._of(model, inputs, own.device) for model in models if model is not None and weight]
            if others:  # no step was taken before the first one
                kinds = {"unsupervised": s.unsupervised, "supervised": s.supervised}
                loss = loss + weight * contrastive_loss(own, others, labels, **kinds, temperature=s.temperature)
        return loss

    @torch.no_grad()
    def _of(self, model: nn.Module, inputs: Mapping[str, Tensor], device: torch.device) -> Tensor:
        named = inputs_of(model.to(device), inputs)[1]
        return pooled(last_hidden(model(**named, output_hidden_states=True)), inputs, self.settings.pooling)


def last_hidden(outputs: object) -> Tensor:
    """[B, T, d] of a model of transformers that was asked for hidden states. Raises TrainingError."""
    hidden = getattr(outputs, "hidden_states", None)
    if not hidden:
        raise TrainingError(
            f"{type(outputs).__name__} has no hidden_states; contrastive expects models of transformers that give "
            "them, encoders or decoders, not both in one; write a loop with ltepass.contrastive_loss instead"
        )
    last: Tensor = hidden[-1]
    return last


def pooled(hidden: Tensor, inputs: Mapping[str, Tensor], pooling: Pooling) -> Tensor:
    """hidden: [B, T, d] -> [B, d], without padding where the inputs have an attention_mask [B, T]."""
    mask = inputs.get("attention_mask")
    if pooling == "first":
        first = 0 if mask is None else mask.to(torch.int64).argmax(-1)  # padding may stand before
        return hidden[torch.arange(len(hidden)), first]
    weights = hidden.new_ones(hidden.shape[:2]) if mask is None else mask.to(hidden)
    return (hidden * weights[..., None]).sum(1) / weights.sum(1, keepdim=True).clamp_min(1.0)


@torch.no_grad()
def frozen(model: nn.Module) -> nn.Module:
    """A copy that learns nothing, in the mode of the model."""
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, BasePruningMethod):  # its product has a gradient, which no copy can take
                hook(module, None)
    return copy.deepcopy(model).eval().requires_grad_(False)
