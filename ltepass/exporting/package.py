"""Write the folder of `ltepass.export`: a decode step and a prefill, compiled ahead of time, with one set of weights.

decode.pt2    (ids [1, 1], position [], cache) -> logits [1, 1, vocab]; AOTInductor's package
prefill.pt2   the same for 2 tokens and more
weights.pt    what both read, by name: `torch.save`'s dict of tensors
kernels.so    our ops' kernels, and ops.so their schemas, for a process without Python; load ops.so
decoder.json  what a loop has to know: `Decoder`
"""

from __future__ import annotations

import json
import logging
import pickle
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ltepass.errors import ConfigError, ExportError, LoweredError
from ltepass.exporting.ops_library import write_ops
from ltepass.kernels.cpu import build, loading
from ltepass.kernels.linear_checks import FLOATS
from ltepass.passes import EXPORT
from ltepass.passes.capture.decoder_step import DecoderStep, capture_step
from ltepass.passes.graph.leaves_and_linears import held
from ltepass.passes.graph.node_kinds import op_name
from ltepass.passes.graph.pipeline import GraphJob, Pass, run_passes
from ltepass.passes.lower.lower_model import is_lowered, require_hard
from ltepass.passes.lower.plain_linears import is_ordinary
from ltepass.passes.lower.quantise_linears import Format, QuantiseLinears
from ltepass.routed.routed import Routed, is_transformed, require_whole, unwrapped
from ltepass.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("ltepass")

MOST = 2048  # tokens of a cache that nobody asked a length for
SCALAR_TYPES = {"float16": 5, "float32": 6, "bfloat16": 15}  # c10::ScalarType's numbers
FORMAT = 1  # of the folder; a later one that means something else counts on
DECODE, PREFILL, WEIGHTS, ABOUT = "decode.pt2", "prefill.pt2", "weights.pt", "decoder.json"


@dataclass(frozen=True, kw_only=True)
class About:
    """decoder.json. cache: its shape, [layers, 2, 1, kv_heads, length, size]. isa: what the kernels assume of a CPU.

    token_bytes: of weights that every token reads; gated_bytes: of those whose neurons are read where they are active.
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


def passes(linears: Format | None) -> tuple[Pass[GraphJob], ...]:
    """What is done to the captured step, in order."""
    return tuple(replace(p, format=linears) if isinstance(p, QuantiseLinears) else p for p in EXPORT)


def export_model(
    model: nn.Module,
    folder: Path,
    *,
    length: int | None = None,
    linears: Format | None = None,
    cache_dtype: torch.dtype | None = None,
) -> Path:
    """What `ltepass.export` does."""
    language_model = _checked(unwrapped(model), linears, cache_dtype)
    if length is None:
        length = min(getattr(language_model.config.get_text_config(), "max_position_embeddings", MOST), MOST)
    if length < 2:
        raise ConfigError(f"length is {length}; expected at least 2 tokens")
    if not loading.load():
        raise ExportError("the CPU kernels could not be built (the warning says why), and a package needs them")
    step = capture_step(language_model, length, cache_dtype)
    job = run_passes(passes(linears), GraphJob(step.graph))
    for router, reason in job.notes.items():
        log.warning("export: %s: kept masked-dense: %s", router, reason)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as made:
        _write(step, Path(made), language_model, linears)
        _put(Path(made), folder)
    return folder


def _put(made: Path, folder: Path) -> None:
    """What says that the folder is one of ours goes first and comes last: an export that ends half way mixes no two."""
    (folder / ABOUT).unlink(missing_ok=True)
    for file in sorted(made.iterdir(), key=lambda file: file.name == ABOUT):
        file.replace(folder / file.name)


def _checked(model: nn.Module, linears: Format | None, cache_dtype: torch.dtype | None) -> PreTrainedModel:
    """The model, which can be exported. Raises what `ltepass.export` says."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ExportError(f"{type(model).__name__} is no model of transformers; export expects a language model of it")
    require_whole(model, "export")
    if is_lowered(model):
        raise LoweredError("the model is lowered; export does that itself; call ltepass.unlower(model) first")
    if is_transformed(model):
        routed = Routed.of(model, "export")
        routed.require_gates("export")
        require_hard(routed)
    for name, tensor in model.named_parameters():
        if not is_ordinary(tensor) or tensor.device.type != "cpu":
            seen = f"{name} is a {type(tensor).__name__} on {tensor.device}"
            raise ExportError(f"{seen}; export expects plain weights on the CPU, and quantises them itself (linears=)")
    if linears not in (None, *get_args(Format)):
        raise ConfigError(f"linears is {linears!r}; expected None or one of {', '.join(get_args(Format))}")
    if cache_dtype not in (None, *FLOATS):
        raise ConfigError(
            f"cache_dtype is {cache_dtype}; expected None, torch.float32, torch.bfloat16 or torch.float16"
        )
    return model


def _write(step: DecoderStep, folder: Path, model: PreTrainedModel, linears: Format | None) -> None:
    token_bytes, gated_bytes = bytes_read(step.graph)
    programs = {DECODE: _decode(step), PREFILL: _prefill(step)}
    state = {**programs[DECODE].constants, **programs[DECODE].state_dict}
    about = About(
        format=FORMAT,
        ltepass=__version__,
        torch=torch.__version__,
        isa=build.isa(),
        cache=list(step.cache.shape),
        cache_dtype=str(step.cache.dtype).removeprefix("torch."),
        eos=_eos(model),
        dtype=str(model.dtype).removeprefix("torch."),
        linears=linears,
        token_bytes=token_bytes,
        gated_bytes=gated_bytes,
    )
    layouts = {name: layout(tensor) for name, tensor in state.items() if isinstance(tensor, Tensor)}
    metadata = {**about.call(), "weights": json.dumps(layouts)}
    # One token's own loops are short: a team of threads for them costs more than it gains, and takes our pool's cores.
    threads = {DECODE: 1, PREFILL: -1}
    names: set[str] = set()
    for target, program in programs.items():
        names |= _compile(program, folder / target, {"aot_inductor.metadata": metadata, "cpp.threads": threads[target]})
    torch.save({name: state[name].detach() for name in sorted(names)}, folder / WEIGHTS)
    write_ops(folder)
    (folder / ABOUT).write_text(json.dumps(asdict(about), indent=1) + "\n")


def bytes_read(graph: GraphModule) -> tuple[int, int]:
    """Of weights: of all that a token reads whole, and of those that it reads an active neuron at a time."""
    whole, gated = 0, 0
    for leaf in graph.graph.find_nodes(op="get_attr"):
        tensor = held(graph, leaf)
        if any(_gathers(user, leaf) for user in leaf.users):
            gated += tensor.nbytes
        elif leaf.users:
            row = all((op_name(user) or "").startswith("embedding") for user in leaf.users)  # else it is the head's too
            whole += tensor[0].nbytes if row else tensor.nbytes
    return whole, gated


def _gathers(node: Node, leaf: Node) -> bool:
    """Whether a sparse op reads those rows or columns of the leaf whose neurons are active."""
    if op_name(node) not in ("routed_ffn", "routed_proxy_ffn"):
        return False
    assert isinstance(node.target, torch._ops.OpOverload), "one of our ops"
    names = [argument.name for argument in node.target._schema.arguments]
    return any(node.args[names.index(name)] is leaf for name in ("up", "gate", "down"))


def _decode(step: DecoderStep) -> torch.export.ExportedProgram:
    ids, position, cache = step.inputs
    with torch.no_grad():
        return torch.export.export(step.graph, (ids[:, :1], position, cache), strict=False)


def _prefill(step: DecoderStep) -> torch.export.ExportedProgram:
    shapes = ({1: torch.export.Dim("tokens", min=2, max=step.cache.shape[4])}, None, None)
    with torch.no_grad():
        return torch.export.export(step.graph, step.inputs, dynamic_shapes=shapes, strict=False)


def _compile(program: torch.export.ExportedProgram, target: Path, more: dict[str, object]) -> set[str]:
    """Writes the package, without weights, and returns the names of those that it reads."""
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    # Kept by name: else a threshold becomes a constant without one, whose value nothing would hold.
    options: dict[str, object] = {"always_keep_tensor_constants": True}
    options |= {"aot_inductor.package_constants_in_so": False, **more}
    path = aoti_compile_and_package(program, package_path=str(target), inductor_configs=options)
    return set(aoti_load_package(path).get_constant_fqns())


def layout(tensor: Tensor) -> str:
    """What a compiled graph takes for granted of a weight."""
    return f"{tensor.dtype} {list(tensor.shape)} strides {list(tensor.stride())}"


def _eos(model: PreTrainedModel) -> list[int]:
    eos = getattr(model.generation_config, "eos_token_id", None)
    return [] if eos is None else list(eos) if isinstance(eos, (list, tuple)) else [int(eos)]


def weights(folder: Path) -> dict[str, Tensor]:
    """Raises ExportError where the file is none, or cut short."""
    try:
        state = torch.load(folder / WEIGHTS, weights_only=True, mmap=True)  # read from disk where they are needed
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise ExportError(f"{folder / WEIGHTS} cannot be read ({error}); export the model again") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ExportError(f"{folder / WEIGHTS} holds no tensors by name; export the model again")
    return state
