"""Soft, hard or dense: what the gates of a whole model do."""

from __future__ import annotations

from torch import nn

from ltepass.config import Mode, check_mode
from ltepass.routed import padding
from ltepass.routed.sites import require_trained, routers_of
from ltepass.routed.undo import verb
from ltepass.sparsity.thresholds import remember_densities


@verb
def set_mode(model: nn.Module, mode: Mode) -> None:
    """Switch every router. Paper section 4.2.

    Arguments:
        model: a transformed model, not lowered.
        mode: "soft" and "hard" as the paper has them; "dense" leaves the gates open.
    Returns: None.
    Raises: ConfigError, NotTransformedError, LoweredError.
    Example:
        >>> ltepass.set_mode(model, "hard")
        >>> set(ltepass.report(model).modes.values())
        {'hard'}
    """
    check_mode(mode)
    require_trained(model, "set_mode")
    for router in routers_of(model):
        router.mode = mode
        router.kept.clear()
    if mode == "soft":
        padding.attach(model)  # what a forward leaves for the losses begins anew with the next
    else:
        padding.detach(model)
    remember_densities(model)
