"""Mutants of what a checkpoint says: one field of a JSON tree or of a safetensors header, changed, dropped or added."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

Path = tuple[Any, ...]
PAYLOAD = 'x") or __import__("os").system("ltepass-payload") or ("'

_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 130),
    st.sampled_from([2**31, 2**64, 10**12, 10**40, 10**4000]),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(
        [PAYLOAD, "", ".", "a..b", "__class__", "a\nb", "\x1b[2J", "[/red]", "hooks", "graph", "silu", "gelu"]
    ),
    st.sampled_from(["model", "model.layers", "model.layers.0.mlp", "model.layers.0.self_attn.q_proj", "lm_head"]),
)
VALUES = st.recursive(
    _SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=8), v, max_size=3), max_leaves=6
)


def paths(tree: Any, path: Path = ()) -> Iterator[Path]:
    """Of every value below the root."""
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, child in children:
        yield (*path, key)
        yield from paths(child, (*path, key))


def at(tree: Any, path: Path) -> Any:
    for key in path:
        tree = tree[key]
    return tree


@st.composite
def mutant(draw: st.DrawFn, tree: Any) -> Any:
    """A copy of the tree with one to three changes."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        everywhere = list(paths(tree))
        if not everywhere:
            break
        *parents, key = draw(st.sampled_from(everywhere))
        parent = at(tree, tuple(parents))
        _change(draw, parent, key, at(tree, draw(st.sampled_from(everywhere))))
    return tree


def _change(draw: st.DrawFn, parent: Any, key: Any, other: Any) -> None:
    """other: a value from elsewhere in the same tree."""
    kind = draw(st.sampled_from(["set", "elsewhere", "near", "drop", "add"]))
    if kind == "drop":
        del parent[key]
    elif kind == "elsewhere":
        parent[key] = copy.deepcopy(other)
    elif kind == "near" and type(parent[key]) is int:
        parent[key] += draw(st.sampled_from([-1, 1, 5, 60]))
    elif kind == "near" and isinstance(parent[key], str):
        parent[key] += draw(st.sampled_from([".0", "_", ".weight", PAYLOAD, "\n"]))
    elif kind == "add" and isinstance(parent, dict):
        parent[draw(st.text(max_size=8))] = draw(VALUES)
    elif kind == "add":
        parent.append(copy.deepcopy(other))
    else:
        parent[key] = draw(VALUES)
