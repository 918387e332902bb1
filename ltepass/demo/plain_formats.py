"""What plain rounding makes of the dense model: what a user would take in place of leaving neurons out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ltepass.demo.results import Plain
from ltepass.kernels import weight_formats as formats
from ltepass.measure.quality import perplexity

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Rounded = tuple[Tensor, int]  # the weight as it would be read, and the bytes that hold it


def int8(weight: Tensor) -> Rounded:
    codes, scale = formats.quantise_int8(weight)
    return formats.dequantise_int8(codes, scale), codes.nbytes + scale.nbytes


def q4_1(weight: Tensor) -> Rounded:
    """GGUF's format: blocks of 32 with a scale and a minimum, 5 bits a weight."""
    codes, scale, minimum = formats.quantise_int4(weight, with_minimum=True)
    assert minimum is not None
    return formats.dequantise_int4(codes, scale, minimum), codes.nbytes + scale.nbytes + minimum.nbytes


FORMATS: dict[str, Callable[[Tensor], Rounded]] = {"int8": int8, "Q4_1": q4_1}


@torch.no_grad()
def plain_formats(model: PreTrainedModel, test: Tensor) -> dict[str, Plain]:
    """By format, with every linear but the head rounded; the model stays as it is."""
    return {name: _measured(copy.deepcopy(model), round_, test) for name, round_ in FORMATS.items()}


def _measured(model: PreTrainedModel, round_: Callable[[Tensor], Rounded], test: Tensor) -> Plain:
    """Of a model whose linears are rounded so, in place: perplexity, and their bytes."""
    head = model.get_output_embeddings()
    held = whole = 0
    for linear in (m for m in model.modules() if isinstance(m, nn.Linear) and m is not head):
        weight, size = round_(linear.weight)
        held, whole = held + size, whole + linear.weight.nbytes
        linear.weight.copy_(weight)
    return {"perplexity": perplexity(model, test), "bytes_share": held / whole}
