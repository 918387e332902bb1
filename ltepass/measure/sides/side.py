"""What every side has: a description to send to a process (`Side`), what it opens there, and what a row says of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypedDict

import torch
from torch import Tensor

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Of one side: what a row says beside the times. position_bytes: of keys and values, for each earlier token.

    weight_bytes: that a token reads; held_bytes: of weights in memory.
    """

    how: str
    format: str
    head: str
    weight_bytes: float
    held_bytes: float
    position_bytes: float
    perplexity: float
    sparsity: float = 0.0
    active: float = 1.0
    router: str = ""
    router_share: float = 0.0
    group_size: int = 0


class Sparse(TypedDict, total=False):
    """Of Facts, what a dense side lacks."""

    sparsity: float
    active: float
    router: str
    router_share: float
    group_size: int


class Engine(Protocol):
    """A model in memory that runs."""

    def times(self, prompt: Tensor, tokens: Tensor) -> list[float]:
        """Seconds that each given token took, the first of which comes out of the prompt."""

    def facts(self, ids: Tensor, prompt_tokens: int, blocks: Tensor) -> Facts:
        """ids: prompt and timed tokens, [T]; blocks: [n, T'] for the perplexity. Comes last: nothing is timed after."""

    def read_pass(self) -> tuple[int, float]:
        """Bytes of the weights, and the seconds of reading them once."""


class Side(Protocol):
    """name: of the program. Sent to a process of its own."""

    @property
    def name(self) -> str: ...

    def imports(self) -> None:
        """What memory is counted after."""

    def open(self, length: int) -> Engine:
        """length: tokens that a call sees at most."""
