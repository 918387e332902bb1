"""`ltepass::cached_attention`: causal attention over a static cache that the op itself writes to.

Schema, fake, dispatch, and the definition. Importing this registers the op and builds nothing.

One cache holds all layers, so that a decoder has one tensor of state: [layers, 2, batch, kv_heads, length, size], keys
first. Only the keys that the tokens see are read, however long the cache is. For inference: there is no gradient.
"""

# mypy: disable-error-code="no-untyped-call"
# (torch leaves Library.impl untyped)
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 -- the name everybody uses

from ltepass.errors import LTEError
from ltepass.kernels.dispatch import any_device
from ltepass.kernels.linear import FLOATS, words

_library = torch.library.Library("ltepass", "FRAGMENT")
_library.define(
    "cached_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) cache, int layer, Tensor position, float scale, "
    "int? window=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_op = torch.ops.ltepass.cached_attention.default


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: Tensor,
    layer: int,
    position: Tensor,
    scale: float,
    window: int | None = None,
) -> None:
    """What no path can make sense of; the C++ kernel makes the same checks itself."""
    if q.dim() != 4 or q.dtype not in FLOATS:
        raise LTEError(f"q is {words(q)}; expected float32, bfloat16 or float16 [batch, heads, tokens, size]")
    fits = k.dim() == 4 and k.shape == v.shape and q.dtype == k.dtype == v.dtype
    fits = fits and (q.shape[0], *q.shape[2:]) == (k.shape[0], *k.shape[2:])
    if not (fits and k.shape[1] > 0 and q.shape[1] % k.shape[1] == 0):
        raise LTEError(
            f"q is {words(q)}, k {words(k)} and v {words(v)}; expected one dtype and [batch, heads, tokens, size], "
            "where the heads of q are a multiple of k's and v's"
        )
    wanted = (2, k.shape[0], k.shape[1], k.shape[3])
    if (
        cache.dim() != 6
        or cache.dtype not in FLOATS
        or not cache.is_contiguous()
        or (*cache.shape[1:4], cache.shape[5]) != wanted
    ):
        expected = f"contiguous floats [layers, 2, {k.shape[0]}, {k.shape[1]}, length, {k.shape[3]}]"
        raise LTEError(f"cache is {words(cache)}; expected {expected}")
    if not 0 <= layer < cache.shape[0]:
        raise LTEError(f"layer is {layer}; expected one of {cache.shape[0]}")
    if position.numel() != 1 or position.dtype != torch.int64:
        raise LTEError(f"position is {words(position)}; expected int64 []")
    if window is not None and window < 1:
        raise LTEError(f"window is {window}; expected at least 1")


def definition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: Tensor,
    layer: int,
    position: Tensor,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """What the op means. q [batch, heads, tokens, size], k and v the same with kv_heads, all of the tokens at
    `position` and behind it; returns [batch, tokens, heads, size].
    """
    check(q, k, v, cache, layer, position, scale, window)
    first, tokens = int(position), q.shape[2]
    end = first + tokens
    if first < 0 or end > cache.shape[4]:
        raise LTEError(f"tokens {first} to {end} do not fit into a cache of {cache.shape[4]}")
    keys, values = cache[layer]
    keys[:, :, first:end] = k
    values[:, :, first:end] = v
    token, key = torch.arange(first, end, device=q.device)[:, None], torch.arange(end, device=q.device)
    seen = (key <= token) & (key > token - (end if window is None else window))
    groups = q.shape[1] // k.shape[1]
    k, v = (half[:, :, :end].to(q.dtype).repeat_interleave(groups, 1) for half in (keys, values))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale).transpose(1, 2).contiguous()


def _fake(q: Tensor, *others: Any) -> Tensor:
    check(q, *others)
    batch, heads, tokens, size = q.shape
    return q.new_empty((batch, tokens, heads, size))


_library.impl("cached_attention", any_device(_op, definition), "CompositeExplicitAutograd")
torch.library.register_fake("ltepass::cached_attention", _fake, lib=_library)
