"""The tensors of a checkpoint against its site list and the model: names, dtypes and shapes before anything is read.

A header is what a safetensors file says of its tensors. Weights may hold any value, as in every model; a permutation
must be one, and a threshold must be a number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ltepass.checkpoint_checks import is_router
from ltepass.errors import CheckpointError
from ltepass.names import is_path, shown
from ltepass.router import N_QUANTILES
from ltepass.sites import FFNSite

Header = dict[str, tuple[str, tuple[int, ...]]]  # tensor -> (dtype as safetensors names it, shape)
FLOATS = ("F64", "F32", "F16", "BF16")
_AGAIN = "expected a directory written by save_pretrained of a transformed model; save it again"


def read_header(files: Iterable[Any]) -> Header:
    """Of all files together. Raises CheckpointError for what is no safetensors file, or not whole."""
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


def router_header(site: FFNSite, config: Mapping[str, Any]) -> Header:
    """The tensors of one router."""
    experts = site.d_ff // site.group_size
    header: Header = {
        "weight": ("F32", (experts, site.d_model)),
        "threshold": ("F32", ()),
        "quantiles": ("F32", (N_QUANTILES,)),
        "permutation": ("I64", (site.d_ff,)),
    }
    optional: Header = {"bias": ("F32", (experts,)), "cut": ("F32", ()), "input_cut": ("F32", ())}
    settings = ("router_bias", "hidden_sparsity", "input_sparsity")
    return header | {name: optional[name] for name, setting in zip(optional, settings, strict=True) if config[setting]}


def find_routers(sites: Sequence[FFNSite], header: Header) -> dict[str, str]:
    """The path of each site's router -> the path that the files give it; empty where they hold no router at all.

    The class that wrote the files may have put another prefix before its names than its modules have. Raises
    CheckpointError where some routers are missing, or the files hold one that no site has.
    """
    ends = (name.rpartition(".") for name in header)
    stored = {path for path, _, last in ends if last == "quantiles" and is_path(path) and is_router(path)}
    if not stored:
        return {}
    found = {site.router: site.router for site in sites if site.router in stored}
    left = stored - set(found.values())
    for site in sites:
        near = [path for path in left if _differ_in_prefix(site.router, path)] if site.router not in found else []
        if len(near) == 1:
            found[site.router] = near[0]
            left.remove(near[0])
    missing = [site.router for site in sites if site.router not in found]
    if missing:
        raise CheckpointError(
            f"the config lists {len(sites)} routers, and the weight files lack {len(missing)} of them (first: "
            f"{missing[0]}); {_AGAIN}"
        )
    if left:
        raise CheckpointError(
            f"the weight files hold a router {shown(min(left))} that the config does not list; {_AGAIN}"
        )
    return found


def _differ_in_prefix(one: str, other: str) -> bool:
    """Whether two paths have the same numbers and end alike: what differs is a head without numbers."""
    first, second = _heads(one, other)
    ends_alike = len(first) < one.count(".")
    return ends_alike and not any(part.isdigit() for part in first + second)


def _heads(one: str, other: str) -> tuple[list[str], list[str]]:
    """What stands before the parts in which two paths end alike."""
    first, second = one.split("."), other.split(".")
    while first and second and first[-1] == second[-1]:
        first.pop()
        second.pop()
    return first, second


def file_names(model_names: Sequence[str], stored_names: Sequence[str]) -> Callable[[str], str]:
    """From a name in the model to the one in the files, as learnt from routers: another head before the same path."""
    heads: dict[tuple[str, ...], tuple[str, ...]] = {}
    for one, other in zip(model_names, stored_names, strict=True):
        first, second = _heads(one, other)
        heads[tuple(first)] = tuple(second)

    def rename(name: str) -> str:
        parts = tuple(name.split("."))
        for head in sorted(heads, key=len, reverse=True):
            if parts[: len(head)] == head:
                return ".".join((*heads[head], *parts[len(head) :]))
        return name

    return rename


def check_routers(
    sites: Sequence[FFNSite], config: Mapping[str, Any], header: Header, found: Mapping[str, str]
) -> None:
    """Every router has just its tensors, of their dtypes and shapes."""
    for site in sites:
        prefix, expected = found[site.router] + ".", router_header(site, config)
        stored = {name.removeprefix(prefix): info for name, info in header.items() if name.startswith(prefix)}
        for name in sorted({*expected, *stored}):
            if expected.get(name) != stored.get(name):
                raise CheckpointError(
                    f"{prefix}{shown(name)[1:-1]} in the weight files is {_said(stored.get(name))}; site {site.name} "
                    f"expects {_said(expected.get(name))}; {_AGAIN}"
                )


def _said(info: tuple[str, tuple[int, ...]] | None) -> str:
    return "missing" if info is None else f"{info[0]} {list(info[1])}"


def check_weights(model: nn.Module, header: Header, rename: Callable[[str], str], *, heads: bool = False) -> None:
    """Weights that the model has by name are numbers of its kind; those inside its layers have its shapes too.

    heads: what is not inside a layer as well; it may be another task's, and transformers is asked for that.
    rename: from a name in the model to the one in the files.
    """
    for name, tensor in model.state_dict(keep_vars=True).items():
        if (info := header.get(rename(name))) is None:
            continue
        dtype, shape = info
        inside = heads or any(part.isdigit() for part in name.split("."))
        if tensor.is_floating_point() != (dtype in FLOATS) or (inside and shape != tuple(tensor.shape)):
            raise CheckpointError(
                f"{rename(name)} in the weight files is {_said(info)}; the model has {tensor.dtype} "
                f"{list(tensor.shape)} there; {_AGAIN}"
            )


def check_present(model: nn.Module, sites: Sequence[FFNSite], header: Header, rename: Callable[[str], str]) -> None:
    """The weights of every site are in the files, under one of the names that the model has for them."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for rows in (rows for site in sites for rows in site.neurons):
        parameter = model.get_parameter(rows.param)
        if not any(rename(name) in header for name in names[id(parameter)]):
            raise CheckpointError(f"{rename(rows.param)} is missing from the weight files; {_AGAIN}")


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
    check_weights(model, header, str, heads=True)


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
    table = tensors["quantiles"]
    assert table is not None
    if bool(table.isnan().any()) and not bool(table.isnan().all()):
        raise CheckpointError(f"the sparsity table of site {site.name} has gaps; {_AGAIN}")
