"""A site as JSON, written and read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ltepass.kernels.reference import ACTIVATIONS
from ltepass.paths import is_path
from ltepass.routed.json_entry import Entry, Json
from ltepass.routed.sites import PATHS, ROWS, FFNSite, NeuronRows

VERSION = 4  # of what write_state gives


_CUSTOM = re.compile(r"custom\([\w,.<>]*\)", re.ASCII)  # the names of its operations; no kernel runs it


_NODE = re.compile(r"[A-Za-z_]\w*", re.ASCII)


def write_site(site: FFNSite) -> dict[str, Json]:
    names = list(dict.fromkeys(rows.param for rows in site.neurons))
    neurons = [
        {"parameter": names.index(r.param), "dim": r.dim, "start": r.start, "step": r.step} for r in site.neurons
    ]
    rows = {f: None if getattr(site, f) is None else site.neurons.index(getattr(site, f)) for f in ROWS}
    plain = (*PATHS, "kind", "activation", "d_model", "d_ff", "group_size")
    return {
        **{f: getattr(site, f) for f in plain},
        **({} if site.out_width is None else {"out_width": site.out_width}),
        "nodes": list(site.nodes),
        "parameters": names,
        "neurons": neurons,
        **rows,
    }


def read_site(value: object, where: str = "a site", version: int | None = None) -> FFNSite:
    """A site in the form of a version; without one, in the form that it has."""
    entry = Entry(where, value)
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
        out_width=entry.integer("out_width", 1) if "out_width" in entry.rest else None,
        down_bias=entry.optional("down_bias", entry.path),
        group_size=entry.integer("group_size", 1),
        nodes=_nodes(entry),
        **dict(_read_rows_v1(entry) if first else _read_rows(entry)),
    )
    entry.end()
    return site if site.down_bias is None else replace(site, down_bias=_nearby(site.down_bias, site.down))


def _name(entry: Entry) -> str:
    """A site's name: a path, with a number where an owner has several sites."""
    name = entry.text("name")
    path, several, number = name.partition("#")
    good = is_path(path) and (not several or (number.isdecimal() and number.isascii()))
    return name if good else entry.wrong("name", "dotted names")


def _activation(entry: Entry) -> str:
    name = entry.text("activation")
    good = name in ACTIVATIONS or _CUSTOM.fullmatch(name)
    return name if good else entry.wrong("activation", f"custom(...) or one of {', '.join(ACTIVATIONS)}")


def _nodes(entry: Entry) -> tuple[str, ...]:
    given = entry.list("nodes")
    nodes = tuple(n for n in given if isinstance(n, str) and _NODE.fullmatch(n))
    wanted = 3 if entry.seen["kind"] == "graph" else 0
    if not len(nodes) == len(given) == wanted:
        entry.wrong("nodes", f"{wanted} names")
    return nodes


def _read_rows(entry: Entry) -> Iterator[tuple[str, Any]]:
    given = entry.list("parameters")
    names = [n for n in given if isinstance(n, str) and is_path(n)]
    if len(set(names)) != len(given):
        entry.wrong("parameters", "dotted names, each once")
    rows = [Entry(f"{entry.where}, neurons", r) for r in entry.list("neurons")]
    used = [row.integer("parameter", 0, len(names)) for row in rows]
    if set(used) != set(range(len(names))):
        entry.wrong("parameters", "only what neurons count")
    neurons = tuple(_rows(row, names[i]) for row, i in zip(rows, used, strict=True))
    yield "neurons", neurons
    for f in ROWS:
        index = entry.optional(f, lambda key: entry.integer(key, 0, len(neurons)))
        yield f, _present(entry, f, None if index is None else neurons[index])


def _read_rows_v1(entry: Entry) -> Iterator[tuple[str, Any]]:
    def read(value: object, key: str) -> NeuronRows:
        row = Entry(f"{entry.where}, {key}", value)
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


def _rows(row: Entry, param: str) -> NeuronRows:
    rows = NeuronRows(
        param=param, dim=row.integer("dim", 0, 8), start=row.integer("start", 0), step=row.integer("step", 1)
    )
    row.end()
    return rows


def _present(entry: Entry, key: str, rows: NeuronRows | None) -> NeuronRows | None:
    """up and down always have rows, gate where there is one; a gate's bias only beside a gate."""
    gated = entry.seen["gate"] is not None
    needed = key in ("up_rows", "down_rows") or (key == "gate_rows" and gated)
    possible = gated or not key.startswith("gate")
    if (rows is None and needed) or (rows is not None and not possible):
        entry.wrong(key, "rows beside a gate, and only there" if key.startswith("gate") else "rows")
    return rows
