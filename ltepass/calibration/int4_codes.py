"""4-bit codes of plain linears, w = code * scale in blocks of 32 along d_in, that know their inputs: GPTQ (`gptq.py`).

Of a down projection whose neurons are gathered a block is 32 outputs of one input, and each input has its own scales.
A block's scale is chosen when its first input is reached, of what its weights are by then: the one that loses least, an
input's error counted by the input's mean square.

Linears are done in their order, in TURNS passes over the batches; those of a later turn see what codes of the earlier
ones make of the text. torchao's GPTQ, which runs on CUDA alone, does the same a block of the model at a time.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from ltepass.calibration.gptq import TURNS, feed_back
from ltepass.errors import CalibrationError
from ltepass.kernels.weight_formats import BLOCK
from ltepass.progress import tell
from ltepass.routed.batches import Batch, run_batches
from ltepass.routed.observers import not_finite
from ltepass.routed.samples import turns
from ltepass.threads import one_thread

SHRINKS = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.75)
ENDS = (-8.0, 7.5)  # what a block's weight that is farthest from 0 is, in units of the scale: -8 is without counterpart
LEAST, MOST = -8, 7
Linears = Sequence[tuple[str, nn.Linear]]
# (linear, codes int8 [d_out, d_in], scale fp16 [d_out, d_in / 32], or [d_out / 32, d_in])
Put = Callable[[nn.Linear, Tensor, Tensor], None]


def quantise_to_int4(
    model: nn.Module, linears: Linears, batches: Sequence[Batch], put: Put, by_input: Container[str] = ()
) -> None:
    """Gives `put` the codes of each linear, by its path. A linear that no token reaches has its nearest codes.

    by_input: paths of those whose blocks lie along the outputs of an input.

    Raises CalibrationError where no token reaches any of them, or one saw values that are not finite.
    """
    reached, done = 0, 0
    tell("codes of 4 bits", done, len(linears))
    for turn in turns(linears, math.ceil(len(linears) / TURNS), lambda one: 4 * one[1].in_features ** 2):
        moments = [_Moment(linear) for _, linear in turn]
        with ExitStack() as hooks, torch.no_grad():
            for (_, linear), moment in zip(turn, moments, strict=True):
                hooks.callback(linear.register_forward_pre_hook(moment.see).remove)
            run_batches(model, _told(batches, moments))
        for (path, linear), moment in zip(turn, moments, strict=True):
            if not bool(moment.sum.isfinite().all()):
                raise not_finite(path)
            reached += moment.tokens
            make = int4_codes_by_input if path in by_input else int4_codes
            put(linear, *make(linear.weight.detach(), moment.sum))
            done += 1
            tell("codes of 4 bits", done, len(linears))
    if not reached:
        raise CalibrationError(
            "no token reached a linear; expected at least one batch that runs through the model; pass batches of token "
            "ids"
        )


@torch.no_grad()
def int4_codes(weight: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """weight: [d_out, d_in], d_in a multiple of 32; moment: [d_in, d_in], the inputs' second moment up to a factor
    -> codes int8 [d_out, d_in] in [-8, 7], scale fp16 [d_out, d_in / 32].
    """
    rows = weight.float()
    rounding = _Rounding(rows, moment.diagonal())
    feed_back(rows.T, moment, rounding)
    return rounding.codes, rounding.scale


@torch.no_grad()
def int4_codes_by_input(weight: Tensor, moment: Tensor | None) -> tuple[Tensor, Tensor]:
    """weight: [d_out, d_in], d_out a multiple of 32; moment: as above, None rounds each input by itself -> codes int8
    [d_out, d_in] in [-8, 7], scale fp16 [d_out / 32, d_in].
    """
    rounding = _ByInput(weight.float())
    if moment is None:
        rounding.all(weight.float().T)
    else:
        feed_back(weight.float().T, moment, rounding)
    return rounding.codes, rounding.scale


class _ByInput:
    """Rounds input i of all rows of [d_out, d_in], with the scales of what its weights have become."""

    def __init__(self, rows: Tensor) -> None:
        n, d = rows.shape
        self.codes = torch.zeros(n, d, dtype=torch.int8, device=rows.device)
        self.scale = torch.zeros(n // BLOCK, d, dtype=torch.float16, device=rows.device)

    def __call__(self, i: int, left: Tensor) -> Tensor:
        return self.put(slice(i, i + 1), left[i : i + 1])[0]

    def all(self, inputs: Tensor) -> None:
        """inputs: [d_in, d_out]."""
        self.put(slice(0, len(inputs)), inputs)

    def put(self, at: slice, inputs: Tensor) -> Tensor:
        """inputs: [n, d_out] of the n inputs `at` -> as they will stand."""
        blocks = inputs.unflatten(1, (-1, BLOCK)).flatten(0, 1)
        scale = best_scale(blocks, torch.ones(BLOCK, device=blocks.device))
        unit = scale.float()[:, None]
        codes = _nearest(blocks, unit)
        self.codes[:, at] = codes.view_as(inputs).T.to(torch.int8)
        self.scale[:, at] = scale.view(len(inputs), -1).T
        return (codes * unit).view_as(inputs)


class _Rounding:
    """Rounds input i of all rows of [d_out, d_in]; at each block's first, the scales of what the block has become."""

    def __init__(self, rows: Tensor, sizes: Tensor) -> None:
        """sizes: [d_in], mean squares of the inputs up to a factor."""
        n, d = rows.shape
        self.sizes = sizes if bool(sizes.any()) else torch.ones_like(sizes)
        self.codes = torch.zeros(n, d, dtype=torch.int8, device=rows.device)
        self.scale = torch.zeros(n, d // BLOCK, dtype=torch.float16, device=rows.device)

    def __call__(self, i: int, left: Tensor) -> Tensor:
        block = i // BLOCK
        if i % BLOCK == 0:
            self.scale[:, block] = best_scale(left[i : i + BLOCK].T, self.sizes[i : i + BLOCK])
        unit = self.scale[:, block].float()
        code = _nearest(left[i], unit)
        self.codes[:, i] = code.to(torch.int8)
        return code * unit


def best_scale(weights: Tensor, sizes: Tensor) -> Tensor:
    """fp16 [d_out] of a block [d_out, 32]: the one that loses least; sizes: [32], how much an input's error counts."""
    farthest = weights.gather(1, weights.abs().argmax(1, keepdim=True))[:, 0]
    tried = torch.stack([farthest * shrink / end for end in ENDS for shrink in SHRINKS]).half()
    lost = [((_nearest(weights, unit) * unit - weights).square() * sizes).sum(1) for unit in tried.float()[..., None]]
    return tried.gather(0, torch.stack(lost).argmin(0, keepdim=True))[0]


def _nearest(weights: Tensor, scale: Tensor) -> Tensor:
    """Codes in the weights' dtype; 0 where the scale is."""
    inverse = torch.where(scale == 0, 0, 1 / scale)
    return (weights * inverse).round().clamp(LEAST, MOST)


class _Moment:
    """X^T X of one linear's inputs, of tokens that are no padding. mask: of the batch that runs, or None."""

    def __init__(self, linear: nn.Linear) -> None:
        self.tokens, self.thread = 0, threading.get_ident()
        self.mask: Tensor | None = None
        self.sum = torch.zeros(linear.in_features, linear.in_features, device=linear.weight.device)

    def see(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        """A hook before the linear's forward; what another thread passes through it is none of the batches'."""
        if threading.get_ident() != self.thread:
            return
        x = args[0]
        if self.mask is not None and self.mask.shape == x.shape[:-1]:
            x = x[self.mask.to(x.device) > 0]
        rows = x.flatten(0, -2).float()
        self.tokens += len(rows)
        with one_thread():  # the same sums on every machine
            self.sum.addmm_(rows.T, rows)


def _told(batches: Sequence[Batch], moments: Sequence[_Moment]) -> Iterator[Batch]:
    """The batches, whose padding the moments know."""
    for batch in batches:
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        for moment in moments:
            moment.mask = mask if isinstance(mask, Tensor) else None
        yield batch
