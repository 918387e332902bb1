"""The entry that a checkpoint's config holds: a transformed model's sites and settings as JSON, written and read.

Reading trusts nothing: every field has its type and its syntax, none is missing, none is unknown. What it says about
the model is checked later, against the model (checkpoint_checks.py). Raises CheckpointError, and nothing else.

version 1: the rows of a site repeat the name of their parameter in `neurons`, `up_rows`, ...
version 2: each name stands once in `parameters`; `neurons` counts in that list, `up_rows`, ... count in `neurons`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from typing import Any, TypeVar

from ltepass.config import BUDGETS, GROUPINGS, SEEDS, LTEConfig
from ltepass.errors import CheckpointError, ConfigError
from ltepass.kernels.reference import ACTIVATIONS
from ltepass.names import is_path, shown
from ltepass.routed.sites import PATHS, ROWS, FFNSite, LTEState, NeuronRows, Refusal

VERSION = 2  # of what write_state gives
METHOD = "lte"

T = TypeVar("T")
_CUSTOM = re.compile(r"custom\([\w,.<>]*\)", re.ASCII)  # the names of its operations; no kernel runs it
_NODE = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_RELEASE = re.compile(r"[0-9A-Za-z.+_-]{1,40}")
_LARGEST = 2**31  # of a size or an index


def write_state(state: LTEState) -> dict[str, Any]:
    from ltepass import __version__

    return {
        "quant_method": METHOD,
        "version": VERSION,
        "written_by": __version__,
        "config": dict(state.config),
        "grouping": state.grouping,
        "sites": [write_site(site) for site in state.sites],
        "refusals": [asdict(refusal) for refusal in state.refusals],
    }


def write_site(site: FFNSite) -> dict[str, Any]:
    names = list(dict.fromkeys(rows.param for rows in site.neurons))
    neurons = [
        {"parameter": names.index(r.param), "dim": r.dim, "start": r.start, "step": r.step} for r in site.neurons
    ]
    rows = {f: None if getattr(site, f) is None else site.neurons.index(getattr(site, f)) for f in ROWS}
    plain = (*PATHS, "kind", "activation", "d_model", "d_ff", "group_size")
    return {
        **{f: getattr(site, f) for f in plain},
        "nodes": list(site.nodes),
        "parameters": names,
        "neurons": neurons,
        **rows,
    }


def read_state(value: object) -> LTEState:
    version = value.get("version") if isinstance(value, dict) else None
    if type(version) is int and version > VERSION:
        raise CheckpointError(_newer(value, version))
    if type(version) is not int or version < 1:
        raise CheckpointError(
            f"the checkpoint's LTE entry has version {shown(version)}; this ltepass reads versions 1 to {VERSION}; "
            "load it with the ltepass that wrote it, or delete quantization_config to load it dense"
        )
    entry = _Entry("quantization_config", value)
    known = {
        "config": _read_config(entry.take("config"), version),
        "grouping": entry.one_of("grouping", [g for g in GROUPINGS if g != "auto"]),
        "sites": [read_site(site, f"site {i}", version) for i, site in enumerate(entry.list("sites"))],
        "refusals": [_read_refusal(r, f"refusal {i}") for i, r in enumerate(entry.list("refusals"))],
    }
    if not known["sites"]:
        entry.wrong("sites", "at least one site")
    if entry.text("quant_method", default=METHOD) != METHOD:
        entry.wrong("quant_method", METHOD)
    entry.text("written_by", default="")
    entry.end("version")
    return LTEState(**known)


def _newer(value: Any, version: int) -> str:
    from ltepass import __version__

    release = value.get("written_by")
    known = isinstance(release, str) and _RELEASE.fullmatch(release) is not None
    writer, needed = (f"ltepass {release}", f"ltepass {release} or newer") if known else ("a newer one",) * 2
    return (
        f"the checkpoint's LTE entry has version {shown(version)} and was written by {writer}; this is ltepass "
        f"{__version__}, which reads versions 1 to {VERSION}; install {needed}, or delete quantization_config to load "
        "it dense"
    )


class _Entry:
    """One JSON object, read key by key; what is left at the end is unknown. `where` names it in messages."""

    def __init__(self, where: str, value: object) -> None:
        if not isinstance(value, dict):
            raise CheckpointError(f"{where} is {shown(value)}; expected a JSON object; {_ADVICE}")
        self.where, self.rest = where, dict(value)
        self.seen: dict[str, Any] = {}

    def take(self, key: str, default: Any = ...) -> Any:
        if key not in self.rest and default is ...:
            raise CheckpointError(f"{self.where} lacks a key (KeyError: {key!r}); {_ADVICE}")
        self.seen[key] = self.rest.pop(key, default)
        return self.seen[key]

    def wrong(self, key: str, expected: str) -> Any:
        raise CheckpointError(f"{self.where}: {key} is {shown(self.seen[key])}; expected {expected}; {_ADVICE}")

    def end(self, *ignored: str) -> None:
        unknown = [key for key in self.rest if key not in ignored]
        if unknown:
            raise CheckpointError(f"{self.where} has an unknown key (TypeError: {shown(unknown[0])}); {_ADVICE}")

    def text(self, key: str, default: Any = ...) -> str:
        value = self.take(key, default)
        return value if isinstance(value, str) else self.wrong(key, "a string")

    def list(self, key: str, default: Any = ...) -> list[Any] | tuple[Any, ...]:
        value = self.take(key, default)
        return value if isinstance(value, (list, tuple)) else self.wrong(key, "a list")

    def integer(self, key: str, low: int, high: int = _LARGEST, default: Any = ...) -> int:
        value = self.take(key, default)
        return value if type(value) is int and low <= value < high else self.wrong(key, f"an integer of at least {low}")

    def one_of(self, key: str, names: Any) -> Any:
        value = self.take(key)
        return value if isinstance(value, str) and value in names else self.wrong(key, f"one of {', '.join(names)}")

    def path(self, key: str, *, root: bool = False) -> str:
        """Dotted names; the empty path is the root."""
        value = self.text(key)
        return value if is_path(value) or (root and not value) else self.wrong(key, "dotted names")

    def optional(self, key: str, read: Callable[[str], T]) -> T | None:
        if key in self.rest and self.rest[key] is None:
            return self.take(key)  # type: ignore[no-any-return]
        return read(key)


_ADVICE = "ltepass did not write this: save the model again, or delete quantization_config to load it dense"


def read_site(value: object, where: str = "a site", version: int | None = None) -> FFNSite:
    """A site in the form of a version; without one, in the form that it has."""
    entry = _Entry(where, value)
    first = "parameters" not in entry.rest if version is None else version == 1
    site = FFNSite(
        name=_name(entry),
        owner=entry.path("owner", root=True),
        kind=entry.one_of("kind", ("aligned", "inline", "graph")),
        router=entry.path("router"),
        up=entry.path("up", root=True),
        gate=entry.optional("gate", lambda key: entry.path(key, root=True)),
        down=entry.path("down", root=True),
        activation=_activation(entry),
        d_model=entry.integer("d_model", 1),
        d_ff=entry.integer("d_ff", 1),
        down_bias=entry.optional("down_bias", entry.path),
        group_size=entry.integer("group_size", 1),
        nodes=_nodes(entry),
        **dict(_read_rows_v1(entry) if first else _read_rows(entry)),
    )
    entry.end()
    return site if site.down_bias is None else replace(site, down_bias=_nearby(site.down_bias, site.down))


def _name(entry: _Entry) -> str:
    """A path, with a number where an owner has several sites."""
    name = entry.text("name")
    path, several, number = name.partition("#")
    good = is_path(path) and (not several or (number.isdecimal() and number.isascii()))
    return name if good else entry.wrong("name", "dotted names")


def _activation(entry: _Entry) -> str:
    name = entry.text("activation")
    good = name in ACTIVATIONS or _CUSTOM.fullmatch(name)
    return name if good else entry.wrong("activation", f"custom(...) or one of {', '.join(ACTIVATIONS)}")


def _nodes(entry: _Entry) -> tuple[str, ...]:
    nodes = entry.list("nodes")
    wanted = 3 if entry.seen["kind"] == "graph" else 0
    if len(nodes) != wanted or not all(isinstance(n, str) and _NODE.fullmatch(n) for n in nodes):
        entry.wrong("nodes", f"{wanted} names")
    return tuple(nodes)


def _read_rows(entry: _Entry) -> Iterator[tuple[str, Any]]:
    names = entry.list("parameters")
    if not all(isinstance(n, str) and is_path(n) for n in names) or len(set(names)) != len(names):
        entry.wrong("parameters", "dotted names, each once")
    rows = [_Entry(f"{entry.where}, neurons", r) for r in entry.list("neurons")]
    used = [row.integer("parameter", 0, len(names)) for row in rows]
    if set(used) != set(range(len(names))):
        entry.wrong("parameters", "only what neurons count")
    neurons = tuple(_rows(row, names[i]) for row, i in zip(rows, used, strict=True))
    yield "neurons", neurons
    for f in ROWS:
        index = entry.optional(f, lambda key: entry.integer(key, 0, len(neurons)))
        yield f, _present(entry, f, None if index is None else neurons[index])


def _read_rows_v1(entry: _Entry) -> Iterator[tuple[str, Any]]:
    def read(value: object, key: str) -> NeuronRows:
        row = _Entry(f"{entry.where}, {key}", value)
        return _rows(row, row.path("param"))

    neurons = tuple(read(value, "neurons") for value in entry.list("neurons"))
    yield "neurons", neurons
    for f in ROWS:
        rows = entry.optional(f, lambda key: read(entry.take(key), key))
        same = [n for n in neurons if rows is not None and _same_but_prefix(n, rows)]
        if rows is not None and len(same) != 1:
            entry.wrong(f, "what neurons say too")
        yield f, _present(entry, f, same[0] if same else None)


# AutoModel once renamed `neurons` and left the other fields of a site with the prefix of the model with a head.
def _same_but_prefix(one: NeuronRows, other: NeuronRows) -> bool:
    alike = replace(one, param=other.param) == other
    return alike and (one.param == other.param or _ends(one.param, other.param) or _ends(other.param, one.param))


def _nearby(bias: str, linear: str) -> str:
    """A bias's name as the linear's path has it, where only the prefix differs."""
    expected = f"{linear}.{bias.rpartition('.')[2]}"
    return expected if _ends(bias, expected) or _ends(expected, bias) else bias


def _ends(path: str, end: str) -> bool:
    return path.endswith("." + end)


def _rows(row: _Entry, param: str) -> NeuronRows:
    rows = NeuronRows(
        param=param, dim=row.integer("dim", 0, 8), start=row.integer("start", 0), step=row.integer("step", 1)
    )
    row.end()
    return rows


def _present(entry: _Entry, key: str, rows: NeuronRows | None) -> NeuronRows | None:
    """up and down always have rows, gate where there is one; a gate's bias only beside a gate."""
    gated = entry.seen["gate"] is not None
    needed = key in ("up_rows", "down_rows") or (key == "gate_rows" and gated)
    possible = gated or not key.startswith("gate")
    if (rows is None and needed) or (rows is not None and not possible):
        entry.wrong(key, "rows beside a gate, and only there" if key.startswith("gate") else "rows")
    return rows


def _read_refusal(value: object, where: str) -> Refusal:
    entry = _Entry(where, value)
    refusal = Refusal(
        **{f.name: entry.text(f.name) for f in fields(Refusal) if f.name != "nearest"},
        nearest=entry.text("nearest", default=""),
    )
    entry.end()
    return refusal


def _read_config(value: object, version: int) -> dict[str, Any]:
    entry = _Entry("config", value)
    for f in fields(LTEConfig):
        later = version == 1 and f.name in _LATER
        setting = entry.take(f.name, f.default if later else ...)
        if not _CONFIG[f.name](setting):
            entry.wrong(f.name, f"what LTEConfig takes as {f.name}")
    entry.end()
    try:
        return LTEConfig(**entry.seen).to_dict()
    except ConfigError as error:
        raise CheckpointError(f"config: {error}; {_ADVICE}") from error


_LATER = ("budget", "hidden_sparsity", "input_sparsity")  # settings that came while the version was 1


def _number(value: object) -> bool:
    return type(value) in (int, float)


_CONFIG: dict[str, Callable[[Any], bool]] = {
    "group_size": lambda v: v == "auto" or (type(v) is int and v < _LARGEST),
    "target_sparsity": _number,
    "grouping": lambda v: isinstance(v, str) and v in GROUPINGS,
    "budget": lambda v: isinstance(v, str) and v in BUDGETS,
    "hidden_sparsity": _number,
    "input_sparsity": _number,
    "router_bias": lambda v: type(v) is bool,
    "tau": _number,
    "seed": lambda v: type(v) is int and v in SEEDS,
}
