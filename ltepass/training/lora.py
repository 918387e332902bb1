"""Low-rank updates of the FFNs' linears: put in place for one stage, merged into the weights after it.

An adapter of the user's own stays what it is, also on the same linears: ours goes below it, around the plain linear.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ltepass.errors import ConfigError
from ltepass.routed.routed import Routed
from ltepass.routed.sites import read_rows

ADAPTER = "ltepass"  # the name that tells our layers from the user's


def ffn_linears(routed: Routed) -> list[str]:
    """Paths of every site's linears, each once."""
    return sorted({path for s in routed.sites for path in (s.up, s.gate, s.down) if path})


def add_lora(routed: Routed, rank: int) -> None:
    """Wrap the FFNs' linears with trainable low-rank updates, in place; the weights below them are frozen.

    Raises ConfigError where peft is missing or a site has no linears to wrap.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError(f"trainable='lora' needs peft ({error}); pip install peft") from error
    places = [_place(routed.model, path) for path in ffn_linears(routed)]
    if not all(isinstance(parent._modules[child], nn.Linear) for parent, child in places):
        kinds = sorted({type(parent._modules[child]).__name__ for parent, child in places})
        raise ConfigError(f"trainable='lora' expects FFNs of nn.Linear; found {', '.join(kinds)}; use trainable='all'")
    linears = {id(parent._modules[child]): parent._modules[child] for parent, child in places}
    # A holder of nothing but these linears: peft freezes and renames nothing of the user's model.
    holder = nn.ModuleDict({str(key): linear for key, linear in linears.items()})  # type: ignore[misc]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(holder))
    inject_adapter_in_model(config, holder, ADAPTER)
    for parent, child in places:
        parent._modules[child] = holder[str(id(parent._modules[child]))]


def _place(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """(parent, name) of the plain linear at a path: below the user's adapters, or the copy that PEFT trains of it."""
    name, _, child = path.rpartition(".")
    parent = model.get_submodule(name)
    while True:
        found: Any = parent._modules[child]
        if hasattr(found, "modules_to_save"):
            parent, child = found.modules_to_save, found.active_adapters[0]
        elif getattr(found, "lora_variant", None) or (hasattr(found, "base_layer") and not hasattr(found, "lora_A")):
            raise ConfigError(
                f"{path} carries an adapter ({type(found).__name__}) that does more than add to the linear; "
                "trainable='lora' expects plain LoRA or none there; use trainable='all' or 'routers'"
            )
        elif hasattr(found, "base_layer"):
            parent, child = found, "base_layer"
        else:
            return parent, child


def merge_lora(model: nn.Module) -> None:
    """Add our updates to the weights and put the plain linears back: same names, same classes as before."""
    for parent in list(model.modules()):
        for child, layer in list(parent._modules.items()):
            # no getattr: PEFT's wrapper of modules_to_save hands that on to what it wraps
            if layer is not None and ADAPTER in layer._modules.get("lora_A", ()):  # type: ignore[operator]
                layer.merge()  # type: ignore[operator]  # a second time, where sites share it, does nothing
                parent._modules[child] = layer.base_layer  # type: ignore[assignment]


def require_bare_linears(routed: Routed) -> None:
    """Of FFNs whose inactive neurons keep low bits. Raises ConfigError where an adapter stands in a linear's place."""
    held = {rows.param: read_rows(routed.model, site, rows) for site in routed.sites for rows in site.neurons}
    lost = [name for name, rows in held.items() if rows is None]
    if lost:
        raise ConfigError(
            f'{lost[0]} is no parameter any more: an adapter stands in its place. With inactive="low_bit" the '
            "router's codes compute the FFN, so that what is added to its linears has no effect; expected adapters "
            'beside the FFNs, as on attention, or inactive="zero"'
        )
