"""Models whose parameters FSDP has cut up: what needs whole ones says so."""

from __future__ import annotations

from torch import nn

from ltepass.errors import ShardedError


def require_whole(model: nn.Module, what: str, *, flat_only: bool = False) -> None:
    """Raises ShardedError where FSDP has cut parameters up, or (flat_only) put them into one that has no names."""
    for path, module in model.named_modules():
        own = module.__dict__
        if own.get("_is_fsdp_managed_module") and not (flat_only and own.get("_fsdp_use_orig_params")):
            raise ShardedError(
                f"{path or type(module).__name__} was wrapped by FullyShardedDataParallel or fully_shard, and holds a "
                f"share of its weights only; {what} expects whole ones; call it before wrapping"
            )
