"""Unstructured: masks of single weights, by magnitude or to first order, held by torch.nn.utils.prune.

First order: |w dL/dw|, what the loss changes by where w becomes 0 (Molchanov et al., arXiv 1611.06440, section 2.2).
All chosen linears are ranked together, and what is masked stays so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from ltepass.errors import CalibrationError, ConfigError, LoweredError, MetaWeightsError, PruningError
from ltepass.passes.lower.lower_model import is_lowered
from ltepass.routed.batches import Batch, inputs_of, mapping_of
from ltepass.routed.routed import require_whole
from ltepass.routed.sites import is_ordinary
from ltepass.routed.undo import undo_by

Names = str | Sequence[str]  # patterns of modules, such as "model.layers.*.mlp.*"
WEIGHT, ORIGINAL, MASK = "weight", "weight_orig", "weight_mask"  # as torch.nn.utils.prune names them


def mask_weights(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    first_order: bool,
    sparsity: float,
    only: Names | None,
    skip: Names | None,
    permanent: bool,
) -> None:
    """Of `ltepass.prune`, with method "magnitude" or "first_order"."""
    require_whole(model, "prune")
    if is_lowered(model):
        raise LoweredError("the model is lowered; prune expects it as it was; call ltepass.unlower(model) first")
    linears = chosen(model, only, skip)
    scores = _first_order(model, linears, batches) if first_order else [_own(m).detach().abs() for m in linears]
    masks = _masks(linears, scores, sparsity)
    for linear, mask in zip(linears, masks, strict=True):
        _mask(linear, mask)
        if permanent:
            original = linear.get_parameter(ORIGINAL)
            undo_by(partial(setattr, original, "data", original.data))
            prune.remove(linear, WEIGHT)


def chosen(model: nn.Module, only: Names | None, skip: Names | None) -> list[nn.Module]:
    """The linears whose weights are the model's own floats, and no table of tokens as well. Raises ConfigError."""
    linears = {name: m for name, m in model.named_modules() if _is_linear(m)}
    holders: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            holders.setdefault(id(parameter), set()).add(id(module))
    alone = {name: m for name, m in linears.items() if len(holders[id(_own(m))]) == 1}
    picked = set(alone) if only is None else _named("only", only, alone)
    picked -= set() if skip is None else _named("skip", skip, alone)
    if not picked:
        raise ConfigError(
            f"{type(model).__name__} has {len(alone)} linears with weights of their own, and none is left to prune; "
            "expected one at least; look at only and skip"
        )
    if any(_own(alone[name]).is_meta for name in picked):
        raise MetaWeightsError("prune expects real weights and the model is on the meta device; load them first")
    return [module for name, module in alone.items() if name in picked]


def _is_linear(module: nn.Module) -> bool:
    if not isinstance(module, nn.Linear) and type(module).__name__ != "Conv1D":
        return False
    weight = module._parameters.get(ORIGINAL, module._parameters.get(WEIGHT))
    return weight is not None and is_ordinary(weight) and weight.is_floating_point()


def _own(linear: nn.Module) -> Tensor:
    """Its weight as it learns, masked or not."""
    return linear.get_parameter(ORIGINAL if ORIGINAL in linear._parameters else WEIGHT)


def _named(argument: str, names: Names, linears: Mapping[str, nn.Module]) -> set[str]:
    patterns = [names] if isinstance(names, str) else list(names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in linears):
            raise ConfigError(
                f"{argument} names {pattern!r}, which no linear with a weight of its own has; the first are "
                f"{', '.join(list(linears)[:3])}"
            )
    return {name for name in linears if any(fnmatchcase(name, pattern) for pattern in patterns)}


def _first_order(model: nn.Module, linears: Sequence[nn.Module], batches: Sequence[Batch]) -> list[Tensor]:
    """|w dL/dw| of every weight, over the batches; modes, flags and gradients stay as they were."""
    if not batches:
        raise CalibrationError("no batches were given; first_order expects some with labels; pass them")
    weights = [_own(linear) for linear in linears]
    flags = {module: module.training for module in model.modules()}
    learns = [weight.requires_grad for weight in weights]
    scores = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    try:
        model.eval()
        for weight in weights:
            weight.requires_grad_(True)
        with torch.enable_grad():
            for batch in batches:
                gradients = torch.autograd.grad(_loss(model, batch), weights, allow_unused=True)
                for score, weight, gradient in zip(scores, weights, gradients, strict=True):
                    if gradient is not None:
                        score += (weight.detach() * gradient).abs()
    finally:
        for module, flag in flags.items():
            module.training = flag
        for weight, flag in zip(weights, learns, strict=True):
            weight.requires_grad_(flag)
    return scores


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    named = inputs_of(model, mapping_of(batch))[1]
    labels = mapping_of(batch).get("labels")
    if not isinstance(labels, Tensor):
        raise CalibrationError("a batch has no labels; first_order expects those that the loss is made of; add them")
    loss = getattr(model(**{**named, "labels": labels.to(next(model.parameters()).device)}), "loss", None)
    if not isinstance(loss, Tensor):
        raise CalibrationError(
            f"{type(model).__name__} returns no loss for a batch with labels; first_order expects an output with "
            "`loss`, as models of transformers have it"
        )
    return loss


def _masks(linears: Sequence[nn.Module], scores: Sequence[Tensor], sparsity: float) -> list[Tensor]:
    """Where a weight stays: all but the least of all linears together. Raises ConfigError, PruningError."""
    before = [linear._buffers.get(MASK) for linear in linears]
    flat = torch.cat(
        [
            (score.float() if mask is None else score.float().masked_fill(mask == 0, -1.0)).flatten().cpu()
            for score, mask in zip(scores, before, strict=True)
        ]
    )
    if bool(flat.isnan().any()):
        raise PruningError("a weight or its gradient is not a number; prune expects finite ones; train anew")
    wanted, gone = round(sparsity * flat.numel()), int((flat < 0).sum())
    if wanted < gone:
        raise ConfigError(
            f"sparsity is {sparsity}, and {gone / flat.numel():.4f} of these weights are masked already; expected at "
            "least that share: what is masked stays so"
        )
    stays = _without_least(flat, wanted)
    parts = stays.split([score.numel() for score in scores])
    return [part.reshape(score.shape).to(score.device) for part, score in zip(parts, scores, strict=True)]


def _without_least(scores: Tensor, number: int) -> Tensor:
    """bool: all but so many of the least; of equal ones the first go."""
    if not number:
        return torch.ones_like(scores, dtype=torch.bool)
    limit = scores.kthvalue(number).values  # a sort of millions takes ten times as long
    stays = scores >= limit
    stays[(scores == limit).nonzero()[: number - int((~stays).sum()), 0]] = False
    return stays


def _mask(linear: nn.Module, mask: Tensor) -> None:
    """Put it on, or in the place of a smaller one: torch would hang a second mask behind the first."""
    if ORIGINAL not in linear._parameters:
        prune.custom_from_mask(linear, WEIGHT, mask)
        return
    original = linear.get_parameter(ORIGINAL)
    linear._buffers[MASK] = mask.to(original)
    linear.weight = original * mask  # as torch's hook does before each forward
