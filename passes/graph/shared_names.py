"""What a model holds under several names: modules, and tied parameters."""

from __future__ import annotations

from torch import nn


def aliases_of(root: nn.Module) -> dict[str, str]:
    """Paths of modules that the root holds under several, to the first of them."""
    first = {id(m): path for path, m in root.named_modules()}
    return {path: first[id(m)] for path, m in root.named_modules(remove_duplicate=False) if first[id(m)] != path}


def sharers_of(root: nn.Module) -> dict[str, list[str]]:
    """First names of parameters that several modules hold, tied, to the paths of these modules."""
    first: dict[int, str] = {}
    holders: dict[str, list[str]] = {}
    for path, module in root.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            holders.setdefault(first.setdefault(id(parameter), join(path, name)), []).append(path)
    return {name: paths for name, paths in holders.items() if len(paths) > 1}


def join(*paths: str) -> str:
    return ".".join(p for p in paths if p)
