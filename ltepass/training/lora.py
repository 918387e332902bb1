"""Low-rank updates of the FFNs' linears: put in place for one stage, merged into the weights after it."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ltepass.errors import ConfigError
from ltepass.sites import require_state


def ffn_linears(model: nn.Module) -> list[str]:
    """Paths of every site's linears, each once."""
    state = require_state(model, "LoRA on the FFN")
    return sorted({path for s in state.sites for path in (s.up, s.gate, s.down) if path})


def add_lora(model: nn.Module, rank: int) -> None:
    """Wrap the FFNs' linears with trainable low-rank updates, in place; peft freezes all else.

    Raises ConfigError where peft is missing or a site has no linears to wrap.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError(f"trainable='lora' needs peft ({error}); pip install peft") from error
    names = ffn_linears(model)
    if not all(isinstance(model.get_submodule(n), nn.Linear) for n in names):
        kinds = sorted({type(model.get_submodule(n)).__name__ for n in names})
        raise ConfigError(f"trainable='lora' expects FFNs of nn.Linear; found {', '.join(kinds)}; use trainable='all'")
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names), model)


def merge_lora(model: nn.Module) -> None:
    """Add the updates to the weights and put the plain linears back: same names, same classes as before."""
    for path, layer in list(_layers(model)):
        layer.merge()  # type: ignore[operator]
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.base_layer)


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError:
        return
    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield path, module
