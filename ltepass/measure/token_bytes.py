"""What one token has to read of a model: weights of active neurons, everything else once, keys and values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ltepass.passes.lower.lower_linear_modules import weights_read as read_by_linears
from ltepass.routed.ffn_bits import bytes_by_neuron, unread
from ltepass.routed.routed import Routed, is_transformed, routers_of
from ltepass.routed.router import Router
from ltepass.routed.sites import FFNSite
from ltepass.routed.tiered_router import TieredRouter
from ltepass.routed.torchao_weights import holds_codes, parts_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def buffers(model: PreTrainedModel) -> list[Tensor]:
    """What a token reads as a whole, in its order of use: parameters, or what lowered linears read in their place."""
    tables = {id(table) for table in _tables(model)}
    stored: dict[Tensor, tuple[Tensor, ...]] = {p: read for p, read in read_by_linears(model).items()}
    stored |= {weight: () for router in routers_of(model) if router.coded for weight in router.coded.weights_left()}
    read = (tensor for p in model.parameters() if id(p) not in tables for tensor in stored.get(p, _stored(p)))
    return [tensor.detach() for tensor in read] + [
        codes for router in routers_of(model) for codes in _constants(router)
    ]


def _stored(parameter: nn.Parameter) -> tuple[Tensor, ...]:
    """What is read of it: torchao's codes pass for floats."""
    return tuple(t for t in parts_of(parameter) if t is not None) if holds_codes(parameter) else (parameter,)


def held(model: PreTrainedModel) -> int:
    """Bytes of all weights in memory."""
    return sum(tensor.nbytes for tensor in [*_tables(model), *buffers(model)])


def _constants(router: Router) -> list[Tensor]:
    """What tokens read of it that is no parameter."""
    codes = [] if router.coded is None else router.coded.tensors()
    if isinstance(router, TieredRouter) and router.packed_once is not None:
        tensors = router.packed_tiers()
    else:
        tensors = (*router.operands(), *codes, *router.planes_of_down(), *router.low_planes())
    return [t for t in tensors if t is not None and not isinstance(t, nn.Parameter)]


def weights_read(model: PreTrainedModel, active: float = 1.0) -> float:
    """Bytes of weights that one token reads. active: share of neurons, over all sites alike."""
    rows = sum(table[0].nbytes for table in _tables(model))
    return float(rows + sum(p.nbytes for p in buffers(model)) - sum(_unread(model, active)))


def _unread(model: PreTrainedModel, active: float) -> Iterator[float]:
    """By site: bytes of its weights that a token leaves alone."""
    if not is_transformed(model):
        return
    routed = Routed.of(model, "bench model")
    for site, router in routed:
        nbytes = bytes_by_neuron(routed, site, router)
        assert nbytes is not None, "a model that decodes holds its weights as parameters"
        yield unread(routed, site, router, nbytes, active)


def _tables(model: PreTrainedModel) -> list[Tensor]:
    """Embeddings of which a token reads one row: all but a matrix that is the head's too."""
    head = getattr(model.get_output_embeddings(), "weight", None)
    return [m.weight for m in model.modules() if isinstance(m, nn.Embedding) and m.weight is not head]


@torch.no_grad()
def position_bytes(model: PreTrainedModel, prompt: Tensor) -> float:
    """Bytes of keys and values that one earlier position adds to what a token reads. prompt: [P] int64."""
    cache = model(input_ids=prompt[None], use_cache=True).past_key_values
    kept = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return float(sum(tensor.nbytes for tensor in kept) / len(prompt))


def router_share(model: nn.Module, sites: Sequence[FFNSite]) -> float:
    """r: bytes of all routers over bytes of all FFN weights."""
    parameters = dict(model.named_parameters())
    ffn = {rows.param: parameters[rows.param] for site in sites for rows in site.neurons}
    routers = [t for router in routers_of(model) for t in router.operands() if t is not None]
    return sum(t.nbytes for t in routers) / sum(p.nbytes for p in ffn.values())
