"""The folder of `ltepass.export`: what lies in it, and how it is read.

decode.pt2    (ids [1, 1], position [], cache) -> logits [1, 1, vocab]; AOTInductor's package
prefill.pt2   the same for 2 tokens and more
weights.pt    what both read, by name: `torch.save`'s dict of tensors
kernels.so    our ops' kernels, and ops.so their schemas, for a process without Python; load ops.so
decoder.json  what a loop has to know: `About`
"""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ltepass.errors import ExportError
from ltepass.kernels import shortlist
from ltepass.kernels.cpu import build
from ltepass.kernels.proxy_codes import Codes
from ltepass.kernels.routed_schema import OPS
from ltepass.passes.graph.leaves_and_linears import held
from ltepass.passes.graph.node_kinds import op_name

DECODE, PREFILL, WEIGHTS, ABOUT = "decode.pt2", "prefill.pt2", "weights.pt", "decoder.json"
SCALAR_TYPES = {"float16": 5, "float32": 6, "bfloat16": 15}  # c10::ScalarType's numbers
FORMAT = 1  # of the folder; a later one that means something else counts on


@dataclass(frozen=True, kw_only=True)
class About:
    """decoder.json. cache: its shape, [layers, 2, 1, kv_heads, length, size]. isa: what the kernels assume of a CPU.

    linears: what they are quantised to, by the export or before it; head: the same of the head, or its dtype, and what
    shortlist it has.

    token_bytes: of weights that every token reads; gated_bytes: of those whose neurons are read where they are active,
    of tiers of bits the low plane.
    """

    format: int
    ltepass: str
    torch: str
    isa: str
    cache: list[int]
    cache_dtype: str
    eos: list[int]
    dtype: str
    linears: str | None
    token_bytes: int
    gated_bytes: int
    head: str | None = None  # folders of before do not say: as the other linears

    def __post_init__(self) -> None:
        """Raises TypeError where a file said something else."""
        numbers = all(isinstance(v, list) and {*map(type, v)} <= {int} for v in (self.cache, self.eos))
        if not numbers or self.cache_dtype not in list(SCALAR_TYPES):
            raise TypeError(f"expected numbers in cache and eos, and cache_dtype as one of {', '.join(SCALAR_TYPES)}")

    def call(self) -> dict[str, str]:
        """How the graphs are called, in words that a program in C++ reads without a parser."""
        return {
            "cache": " ".join(map(str, self.cache)),
            "cache_dtype": str(SCALAR_TYPES[self.cache_dtype]),
            "eos": " ".join(map(str, self.eos)),
        }


def read_about(folder: Path) -> About:
    try:
        entries = json.loads((folder / ABOUT).read_text())
        known = {**entries}.get("format") == FORMAT
        about = About(**entries) if known else None
    except (OSError, TypeError, ValueError, RecursionError) as error:
        raise ExportError(f"{folder} is no folder that `ltepass export` wrote: {error}") from error
    if about is None:
        raise ExportError(f"{folder} has format {entries.get('format')}; this version reads {FORMAT}: export again")
    if about.torch != torch.__version__:
        raise ExportError(f"{folder} was compiled for torch {about.torch}; here is {torch.__version__}: export again")
    if about.isa not in build.levels():
        raise ExportError(f"{folder} was compiled for {about.isa}; this machine runs {', '.join(build.levels())}")
    return about


def is_gated(folder: Path) -> bool:
    """Whether the folder's model has routers. Raises ExportError."""
    return read_about(folder).gated_bytes > 0


def layout(tensor: Tensor) -> str:
    """What a compiled graph takes for granted of a weight."""
    return f"{tensor.dtype} {list(tensor.shape)} strides {list(tensor.stride())}"


def weights(folder: Path) -> dict[str, Tensor]:
    """Raises ExportError where the file is none, or cut short."""
    try:
        state = torch.load(folder / WEIGHTS, weights_only=True, mmap=True)  # read from disk where they are needed
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise ExportError(f"{folder / WEIGHTS} cannot be read ({error}); export the model again") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ExportError(f"{folder / WEIGHTS} holds no tensors by name; export the model again")
    return state


SHORTLISTED = ("x", "codes", "scale", "scan_codes", "scan_scale", "rows")  # of a head
GATHERED = ("up", "gate", "down", "up_scale", "gate_scale")  # by neuron
LOW = ("low", *(f"low_{part}" for part in Codes._fields))  # the same, of the active ones in tiers of bits
KEPT = tuple(f"down_{part}" for part in Codes._fields)  # by those that add anything there


def bytes_read(graph: GraphModule, kept: float = 1.0) -> tuple[int, int]:
    """Bytes of an exported step's weights: of those that a token reads whole, and of those that it reads an active
    neuron at a time.

    kept: in tiers of bits, the share of neurons that add anything; as much of their columns counts with the whole.
    """
    whole, gated = 0, 0
    for leaf in graph.graph.find_nodes(op="get_attr"):
        tensor = held(graph, leaf)
        if any(_takes(user, leaf, GATHERED + LOW) for user in leaf.users):
            gated += tensor.nbytes
        elif any(_takes(user, leaf, KEPT) for user in leaf.users):
            whole += round(kept * tensor.nbytes)
        elif leaf.users:
            rows = tensor.shape[0] if tensor.dim() else 1
            whole += max(_rows_read(user, leaf, rows) for user in leaf.users) * (tensor.nbytes // max(rows, 1))
    return whole, gated


def _rows_read(node: Node, leaf: Node, rows: int) -> int:
    """Of a table of tokens one; of a head with a shortlist those of 8 bits; else all."""
    if (op_name(node) or "").startswith("embedding"):
        return 1
    args = dict(zip(SHORTLISTED, node.args, strict=False)) if op_name(node) == shortlist.NAME else {}
    some = args.get("rows") if leaf in (args.get("codes"), args.get("scale")) else None
    return min(some, rows) if isinstance(some, int) else rows


def _takes(node: Node, leaf: Node, arguments: tuple[str, ...]) -> bool:
    """Whether a sparse op takes the leaf as one of these: rows or columns are read by neuron."""
    if op_name(node) not in {"tiered_ffn", "packed_tiered_ffn", *(op.name for op in OPS)}:
        return False
    assert isinstance(node.target, torch._ops.OpOverload), "one of our ops"
    names = [argument.name for argument in node.target._schema.arguments]
    return any(node.args[names.index(name)] is leaf for name in arguments if name in names)
