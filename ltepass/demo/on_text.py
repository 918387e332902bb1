"""What LTE costs on one kind of text, and how sparse it is there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ltepass.demo.results import OnText
from ltepass.measure.paired import ratio_of_perplexities
from ltepass.measure.quality import token_losses
from ltepass.measure.sparsity import counting_inactive
from ltepass.routed.routed import Routed

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def on_text(
    model: PreTrainedModel, rivals: Sequence[PreTrainedModel], blocks: Tensor
) -> tuple[OnText, dict[str, float]]:
    """(figures, sparsity by site name) of a transformed model in hard mode, over the dense model that is best on blocks
    [n, T] int64: tuned on another kind of text, it may be worse than as it came."""
    with counting_inactive(Routed.trained(model, "on_text")) as shares:
        losses = token_losses(model, blocks)
    dense = min((token_losses(rival, blocks) for rival in rivals), key=lambda found: float(found.mean()))
    ratio, sparsity = ratio_of_perplexities(losses, dense), shares()
    found: OnText = {
        "tokens": blocks.numel(),
        "perplexity": math.exp(float(losses.mean())),
        "dense": math.exp(float(dense.mean())),
        "ratio": ratio.value,
        "low": ratio.low,
        "high": ratio.high,
        "sparsity": sum(sparsity.values()) / len(sparsity),
    }
    return found, sparsity
