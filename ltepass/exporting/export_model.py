"""Write the folder of `ltepass.export`: a decode step and a prefill, compiled ahead of time, with one set of weights.

`folder.py` says what lies in it. The kernels go there as libraries for a process without Python: ops.so names our ops,
kernels.so computes them. Python names the ops itself (ltepass/kernels): a process that imports ltepass loads neither.
"""

from __future__ import annotations

import json
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ltepass.errors import ConfigError, ExportError, LoweredError
from ltepass.exporting.folder import ABOUT, DECODE, FORMAT, PREFILL, WEIGHTS, About, bytes_read, layout
from ltepass.kernels.cpu import build, loading
from ltepass.kernels.linear import FLOATS
from ltepass.kernels.weight_formats import Format, kept_codes
from ltepass.passes import EXPORT
from ltepass.passes.capture.decoder_step import DecoderStep, capture_step
from ltepass.passes.graph.edit import drop_unread
from ltepass.passes.graph.pipeline import GraphJob, Pass, run_passes
from ltepass.passes.lower.lower_model import check_format, is_lowered
from ltepass.passes.lower.lower_sites import require_hard
from ltepass.passes.lower.quantise_linears import QuantiseLinears
from ltepass.passes.lower.quantise_routed_ffn import QuantiseRoutedFFN
from ltepass.passes.lower.shortlist_head import HEAD, ShortlistHead
from ltepass.passes.lower.why_not_linear import why_not_held, why_not_weight
from ltepass.progress import tell
from ltepass.routed.routed import Routed, is_transformed, require_whole, unwrapped
from ltepass.routed.sites import is_ordinary
from ltepass.routed.torchao_weights import holds_codes, holds_int4, weights_of
from ltepass.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel
import subprocess

log = logging.getLogger("ltepass")

STEP, STEPS = "exporting", 5  # captured, passes run, two programs compiled, written
MOST = 2048  # tokens of a cache that nobody asked a length for


def passes(linears: Format | None, shortlist: int | None = None) -> tuple[Pass[GraphJob], ...]:
    """What is done to the captured step, in order."""

    def asked(one: Pass[GraphJob]) -> Pass[GraphJob]:
        if isinstance(one, (QuantiseRoutedFFN, QuantiseLinears)):
            return replace(one, format=linears)
        return replace(one, rows=shortlist) if isinstance(one, ShortlistHead) else one

    return tuple(asked(one) for one in EXPORT)


@contextmanager
def _one_warning_less() -> Iterator[None]:
    """Of torch's own code, in copies of a traced graph."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning)
        yield


@_one_warning_less()
def export_model(
    model: nn.Module,
    folder: Path,
    *,
    length: int | None = None,
    linears: Format | None = None,
    cache_dtype: torch.dtype | None = None,
    shortlist: int | None = None,
) -> Path:
    """What `ltepass.export` does."""
    language_model = _checked(unwrapped(model), linears, cache_dtype)
    if shortlist is not None and shortlist < 1:
        raise ConfigError(f"shortlist is {shortlist}; expected at least 1 row of the head, or None")
    if length is None:
        length = min(getattr(language_model.config.get_text_config(), "max_position_embeddings", MOST), MOST)
    if length < 2:
        raise ConfigError(f"length is {length}; expected at least 2 tokens")
    if not loading.load():
        raise ExportError("the CPU kernels could not be built (the warning says why), and a package needs them")
    tell(STEP, 0, STEPS)
    step = capture_step(language_model, length, cache_dtype)
    tell(STEP, 1, STEPS)
    job = run_passes(passes(linears, shortlist), GraphJob(step.graph, step.codes))
    if HEAD in job.notes:
        raise ExportError(f"shortlist is {shortlist}, and {job.notes[HEAD]}; expected linears='int8', or no shortlist")
    drop_unread(step.graph)  # else they are kept by name
    tell(STEP, 2, STEPS)
    for router, reason in job.notes.items():
        log.warning("export: %s: kept masked-dense: %s", router, reason)
    for leaf in step.graph.graph.find_nodes(op="get_attr"):
        if str(leaf.target) in job.codes:
            log.warning("export: %s: kept in floats: no op reads its codes there", leaf.target)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as made:
        _write(step, Path(made), language_model, linears, shortlist)
        _put(Path(made), folder)
    tell(STEP, STEPS, STEPS)
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
        require_hard(routed)
    for name, tensor in model.named_parameters():
        reason = (
            None if is_ordinary(tensor) else _why_not_codes(tensor) if holds_codes(tensor) else "no export reads it"
        )
        if reason or tensor.device.type != "cpu":
            seen = f"{name} is a {type(tensor).__name__} on {tensor.device}" + (f", and {reason}" if reason else "")
            raise ExportError(f"{seen}; export expects floats on the CPU, or the codes of ltepass.quantize")
    check_format(linears)
    if cache_dtype not in (None, *FLOATS):
        raise ConfigError(
            f"cache_dtype is {cache_dtype}; expected None, torch.float32, torch.bfloat16 or torch.float16"
        )
    return model


def _why_not_codes(weight: Tensor) -> str | None:
    return why_not_held(weight) if holds_int4(weight) else why_not_weight(weight)


def _kept(model: nn.Module) -> float:
    """The share of neurons whose high bits of down a token reads, where inactive ones keep low bits."""
    return 1.0 - float(Routed.of(model, "export").config.get("low_bit_sparsity", 0.0)) if is_transformed(model) else 1.0


def _about(step: DecoderStep, model: PreTrainedModel, linears: Format | None, shortlist: int | None = None) -> About:
    token_bytes, gated_bytes = bytes_read(step.graph, kept=_kept(model))
    return About(
        format=FORMAT,
        ltepass=__version__,
        torch=torch.__version__,
        isa=build.isa(),
        cache=list(step.cache.shape),
        cache_dtype=str(step.cache.dtype).removeprefix("torch."),
        eos=_eos(model),
        dtype=str(model.dtype).removeprefix("torch."),
        linears=weights_of(model) or linears,
        token_bytes=token_bytes,
        gated_bytes=gated_bytes,
        head=_head(model, linears) if shortlist is None else f"int8, shortlist {shortlist}",
    )


def _write(
    step: DecoderStep, folder: Path, model: PreTrainedModel, linears: Format | None, shortlist: int | None
) -> None:
    about = _about(step, model, linears, shortlist)
    programs = {DECODE: _decode(step), PREFILL: _prefill(step)}
    state = {**programs[DECODE].constants, **programs[DECODE].state_dict}
    layouts = {name: layout(tensor) for name, tensor in state.items() if isinstance(tensor, Tensor)}
    metadata = {**about.call(), "weights": json.dumps(layouts)}
    # One token's own loops are short: a team of threads for them costs more than it gains, and takes our pool's cores.
    threads = {DECODE: 1, PREFILL: -1}
    names: set[str] = set()
    for done, (target, program) in enumerate(programs.items(), 3):
        names |= _compile(program, folder / target, {"aot_inductor.metadata": metadata, "cpp.threads": threads[target]})
        tell(STEP, done, STEPS)
    torch.save({name: state[name].detach() for name in sorted(names)}, folder / WEIGHTS)
    write_ops(folder)
    (folder / ABOUT).write_text(json.dumps(asdict(about), indent=1) + "\n")


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


def _eos(model: PreTrainedModel) -> list[int]:
    eos = getattr(model.generation_config, "eos_token_id", None)
    return [] if eos is None else list(eos) if isinstance(eos, (list, tuple)) else [int(eos)]


def _head(model: PreTrainedModel, linears: Format | None) -> str:
    weight = getattr(model.get_output_embeddings(), "weight", None)
    if isinstance(weight, Tensor) and holds_codes(weight):
        return "int4" if holds_int4(weight) else "int8"
    if linears == "gguf" and isinstance(weight, Tensor) and kept_codes(weight.detach()) is None:
        return "int8"
    return linears or str(model.dtype).removeprefix("torch.")


OPS, KERNELS = "ops.so", "kernels.so"


def write_ops(folder: Path) -> None:
    """Raises ExportError where the compiler fails."""
    (folder / KERNELS).write_bytes(loading.object_path().read_bytes())
    with tempfile.TemporaryDirectory() as made:
        source = Path(made) / "ops.cpp"
        source.write_text(_source())
        # Loaded first, and found beside it by its name alone: the folder may move.
        link = ["-Wl,--no-as-needed", f"-L{folder}", f"-l:{KERNELS}", "-Wl,-rpath,$ORIGIN"]
        command = [*build.compile_command(), "-O1", "-std=c++20", "-fPIC", "-shared", f"-I{_torch() / 'include'}"]
        command += [f"-DTORCH_TARGET_VERSION={build.STABLE_ABI}", str(source), "-o", str(folder / OPS)]
        command += [f"-L{_torch() / 'lib'}", "-ltorch_cpu", *link]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ExportError(f"{command[0]} failed with exit status {done.returncode}: {done.stderr[-800:]}")


def _torch() -> Path:
    return Path(torch.__file__).parent


def _source() -> str:
    """The schemas of all our ops, as Python has registered them."""
    schemas = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith("ltepass::")]
    lines = "".join(f'  m.def(R"({str(s).removeprefix("ltepass::")})");\n' for s in schemas)
    return f"#include <torch/csrc/stable/library.h>\n\nSTABLE_TORCH_LIBRARY(ltepass, m) {{\n{lines}}}\n"
