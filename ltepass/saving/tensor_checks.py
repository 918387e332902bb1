"""The tensors of a checkpoint against its site list and the model: names, dtypes and shapes before anything is read.

A header is what a safetensors file says of its tensors. Weights may hold any value, as in every model; a permutation
must be one, and a threshold must be a number.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ltepass.errors import CheckpointError, shown
from ltepass.kernels.proxy_codes import blocks_of, largest_multiplier
from ltepass.kernels.weight_formats import HALF
from ltepass.paths import is_path
from ltepass.routed.proxy_router import CONSTANTS
from ltepass.routed.quantile_table import N_QUANTILES
from ltepass.routed.sites import FFNSite
from ltepass.routed.tiered_router import PLANES
from ltepass.saving.site_checks import is_router

Header = dict[str, tuple[str, tuple[int, ...]]]  # tensor -> (dtype as safetensors names it, shape)
# What a router may hold.
ROUTER = ("weight", "bias", "threshold", "quantiles", "cut", "input_cut", "permutation", *CONSTANTS, *PLANES)
_ONLY_OURS = ("threshold", "quantiles", "permutation")
FLOATS = ("F64", "F32", "F16", "BF16")
_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.uint8: "U8"}
_AGAIN = "expected a directory written by save_pretrained of a transformed model; save it again"


def read_header(files: Iterable[str | Path]) -> Header:
    """The headers of all weight files. Raises CheckpointError for what is no safetensors file, or not whole."""
    header: Header = {}
    for file in files:
        if not str(file).endswith(".safetensors"):
            raise CheckpointError(f"{file} is no safetensors file; ltepass reads and writes only those; save it again")
        try:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 -- not a dict
                    part = tensors.get_slice(name)
                    header[name] = (part.get_dtype(), tuple(part.get_shape()))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read as safetensors ({error}); copy or save it again") from error
    return header


def noted(weights: Iterable[tuple[str, Tensor]], header: Header) -> Iterator[tuple[str, Tensor]]:
    """A checkpoint's tensors, as somebody else reads its files, put down in `header` as they go by."""
    for name, tensor in weights:
        header[name] = (_NAMES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape))
        yield name, tensor


def router_header(site: FFNSite, config: Mapping[str, object]) -> Header:
    """The tensors of one router."""
    experts = site.d_ff // site.group_size
    proxy = config.get("router") == "proxy"
    header: Header = {
        "weight": ("F32", (experts,) if proxy else (experts, site.d_model)),
        "threshold": ("F32", ()),
        "quantiles": ("F32", (N_QUANTILES,)),
        "permutation": ("I64", (site.d_ff,)),
    }
    if proxy:
        header |= _constants(site, blocks=config["proxy_scales"] == "blocks")
    if config.get("inactive") == "low_bit":
        header |= _planes(site)
    optional: Header = {"bias": ("F32", () if proxy else (experts,)), "cut": ("F32", ()), "input_cut": ("F32", ())}
    settings = ("router_bias", "hidden_sparsity", "input_sparsity")
    return header | {name: optional[name] for name, setting in zip(optional, settings, strict=True) if config[setting]}


def _constants(site: FFNSite, *, blocks: bool) -> Header:
    """The tensors of a proxy router in the header."""
    k, n = 1 if site.gate_rows is None else 2, blocks_of(site.d_model)
    header: Header = {
        "codes": ("U8", (k, site.d_ff, HALF * n)),
        "scales": ("F32", (k, site.d_ff)),
        "sizes": ("F32", (site.d_ff,)),
    }
    if blocks:
        header["multipliers"] = ("U8", (k, site.d_ff, n))
    if site.up_bias is not None or site.gate_bias is not None:
        header["biases"] = ("F32", (k, site.d_ff))
    return header


def _planes(site: FFNSite) -> Header:
    """The tensors of a router whose inactive neurons keep low bits, in the header."""
    n, header = blocks_of(site.d_model), Header()
    for plane, k in (("down", 1), ("low", 2 if site.gate_rows is None else 3)):
        header[f"{plane}_codes"] = ("U8", (k, site.d_ff, HALF * n))
        header[f"{plane}_multipliers"] = ("U8", (k, site.d_ff, n))
        header[f"{plane}_scales"] = ("F32", (k, site.d_ff))
    return header


def has_routers(sites: Sequence[FFNSite], header: Header) -> bool:
    """Whether the files hold any tensor of a router, of these sites or of others."""
    return bool(_stored(header)) or any(f"{site.router}.{name}" in header for site in sites for name in ROUTER)


def _stored(header: Header) -> set[str]:
    """Paths of the routers that the files hold, told by what a model's own router has not."""
    ends = (name.rpartition(".") for name in header)
    return {path for path, _, last in ends if last in _ONLY_OURS and is_path(path) and is_router(path)}


def check_routers(sites: Sequence[FFNSite], config: Mapping[str, object], header: Header) -> None:
    """Every site has its router and no other is there; each has just its tensors, of their dtypes and shapes."""
    routers, stored = {site.router for site in sites}, _stored(header)
    missing = [site.router for site in sites if site.router not in stored]
    if missing:
        raise CheckpointError(
            f"the config lists {len(sites)} routers, and the weight files lack {len(missing)} of them (first: "
            f"{missing[0]}); {_AGAIN}"
        )
    if stored - routers:
        other = shown(min(stored - routers))
        raise CheckpointError(f"the weight files hold a router {other} that the config does not list; {_AGAIN}")
    for site in sites:
        prefix, expected = site.router + ".", router_header(site, config)
        found = {name.removeprefix(prefix): info for name, info in header.items() if name.startswith(prefix)}
        for name in sorted({*expected, *found}):
            if expected.get(name) != found.get(name):
                raise CheckpointError(
                    f"{prefix}{shown(name)[1:-1]} in the weight files is {_said(found.get(name))}; site {site.name} "
                    f"expects {_said(expected.get(name))}; {_AGAIN}"
                )


def _said(info: tuple[str, tuple[int, ...]] | None) -> str:
    return "missing" if info is None else f"{info[0]} {list(info[1])}"


def check_weights(model: nn.Module, header: Header, *, heads: bool = False) -> None:
    """Weights that the model has by name are numbers of its kind; those inside its layers have its shapes too.

    heads: what is not inside a layer as well; it may be another task's, and transformers is asked for that.
    """
    for name, tensor in model.state_dict(keep_vars=True).items():
        if (info := header.get(name)) is None:
            continue
        dtype, shape = info
        inside = heads or any(part.isdigit() for part in name.split("."))
        if tensor.is_floating_point() != (dtype in FLOATS) or (inside and shape != tuple(tensor.shape)):
            raise CheckpointError(
                f"{name} in the weight files is {_said(info)}; the model has {tensor.dtype} "
                f"{list(tensor.shape)} there; {_AGAIN}"
            )


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def check_shapes(model: nn.Module, built: Mapping[str, tuple[int, ...]]) -> None:
    """Loaded weights have the shapes with which the class was built: beside a quantizer, older versions of transformers
    (5.17) take a file's as they are, whatever config.json says.
    """
    for name, shape in shapes_of(model).items():
        if shape != built.get(name, shape):
            raise CheckpointError(
                f"{name} in the weight files is {list(shape)}; config.json asks for {list(built[name])}; {_AGAIN}, or "
                "take a newer transformers, which replaces it with ignore_mismatched_sizes=True"
            )


def check_present(model: nn.Module, sites: Sequence[FFNSite], header: Header) -> None:
    """The files hold every weight of a site, and every weight whose like in another layer they hold.

    A weight that is tied stands there under one of its names; a whole kind of weight may be new to this class.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    later = getattr(model, "all_tied_weights_keys", None) or {}  # which transformers ties after they are loaded
    kinds = {_kind(name) for name in header}
    ffns = {id(model.get_parameter(rows.param)) for site in sites for rows in site.neurons}
    for key, aliases in names.items():
        wanted = key in ffns or any(_kind(name) in kinds for name in aliases)
        if wanted and not any(name in header or name in later for name in aliases):
            raise CheckpointError(f"{aliases[0]} is missing from the weight files; {_AGAIN}")


def _kind(name: str) -> str:
    """A weight's name without the numbers of its layers."""
    return re.sub(r"\d+", "#", name)


def check_all(model: nn.Module, header: Header, routers: Sequence[str]) -> None:
    """A module's tensors are all there, under one of their names, and beside them nothing but routers."""
    tensors = model.state_dict(keep_vars=True)
    stored = {id(tensor) for name, tensor in tensors.items() if name in header}
    missing = [name for name, tensor in tensors.items() if id(tensor) not in stored]
    if missing:
        raise CheckpointError(f"{missing[0]} is missing from the weight files; {_AGAIN}")
    own = tuple(router + "." for router in routers)
    unknown = [name for name in header if name not in tensors and not name.startswith(own)]
    if unknown:
        raise CheckpointError(f"the weight files hold {shown(unknown[0])}, which the model has not; {_AGAIN}")
    check_weights(model, header, heads=True)


def check_values(site: FFNSite, tensors: Mapping[str, Tensor | None]) -> None:
    """A router's decision and order: thresholds and cuts are numbers, the permutation is one, the table whole."""
    order = tensors["permutation"]
    assert order is not None
    if order.is_meta:
        return
    if sorted(order.tolist()) != list(range(len(order))):
        raise CheckpointError(f"the permutation of site {site.name} is none of {site.d_ff} neurons; {_AGAIN}")
    for name in ("threshold", "cut", "input_cut"):
        value = tensors.get(name)
        if value is not None and bool(value.isnan()):
            raise CheckpointError(f"the {name} of site {site.name} is not a number; {_AGAIN}")
    for name in ("multipliers", "down_multipliers", "low_multipliers"):
        multipliers = tensors.get(name)
        if multipliers is not None and int(multipliers.max()) > largest_multiplier(site.d_model):
            raise CheckpointError(
                f"one of the {name} of site {site.name} is {int(multipliers.max())}; expected at most "
                f"{largest_multiplier(site.d_model)}, beyond which sums do not fit in 32 bits; {_AGAIN}"
            )
    table = tensors["quantiles"]
    assert table is not None
    if bool(table.isnan().any()) and not bool(table.isnan().all()):
        raise CheckpointError(f"the sparsity table of site {site.name} has gaps; {_AGAIN}")
